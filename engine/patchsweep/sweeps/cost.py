"""The cost of a sweep, estimated before it runs."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from patchsweep.attribution.run import token_layers
from patchsweep.data.show import count, esc, number, table_html
from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel
from patchsweep.models.compute import name_of, sentence
from patchsweep.models.offload import device_of, is_offloaded, is_tied, main_device, place_of
from patchsweep.runners.packed.budget import default_cache, default_max_tokens
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.shards import blocks_of, site_groups_of
from patchsweep.spec.spec import Request
from patchsweep.sweeps.bf16 import recheck_cost, recheck_variables
from patchsweep.sweeps.layout import site_variables
from patchsweep.sweeps.methods import EXACT, MethodSpec
from patchsweep.sweeps.noise import null_cost
from patchsweep.sweeps.saving import Saving


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site's patches."""

    site: str
    n_patches: int
    n_live: int
    n_exact: int  # live patches that run exactly; of a screen: the least number
    n_units: int  # shards
    token_layers: int  # of the patches that run exactly
    loop_token_layers: int  # of one full forward pass per patch


@dataclass(frozen=True)
class Part:
    """Cost of work besides exact patches, for all sites together."""

    name: str  # such as atp
    token_layers: int  # a backward pass counts as a forward pass


@dataclass(frozen=True)
class Weights:
    """Where the weights of a model are stored, and the bytes fetched when modules run."""

    places: dict[str, int]  # bytes on each GPU, on the `cpu` and on `disk`
    blocks: tuple[int, ...]  # bytes fetched each time a block runs
    around: int  # bytes fetched for the modules before and after the blocks

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.places.values())

    @property
    def fetched(self) -> int:
        """Bytes that one pass over the whole model fetches."""
        return sum(self.blocks) + self.around


@dataclass(frozen=True)
class Cost:
    """The cost of a sweep."""

    sites: tuple[SiteCost, ...]
    parts: tuple[Part, ...]  # estimates, the bound of a screen, the recheck of bf16
    n_slices: int  # processes that divide the run
    n_batches: int  # packed batches; several sites may share one
    flops: float  # multiplications and additions of the blocks' weights, for all passes
    seconds: float  # at the matrix-product rate measured now; without attention and norms
    result_bytes: int  # values written
    cache_bytes: int  # activations kept of one pair's base and source runs
    cache_budget: int  # bytes of activations that stay in memory; the rest spills to files
    weights: Weights
    arithmetic: str  # the compute dtype, in words
    cast_bytes: int  # fp32 copies of a running block's 16-bit weights
    slowdown: float  # relative to products in the weights' dtype, measured now
    n_captures: int  # passes over unpatched prompts
    read_bytes: int  # weights that captures and packed batches fetch from the CPU or from disk
    saving: Saving | None = None  # of the tolerance, from a sample; None: no patch was run

    @property
    def n_patches(self) -> int:
        return sum(site.n_patches for site in self.sites)

    @property
    def n_live(self) -> int:
        return sum(site.n_live for site in self.sites)

    @property
    def token_layers(self) -> int:
        """Token-layers of all passes, over all slices."""
        exact = sum(site.token_layers for site in self.sites)
        return exact + sum(part.token_layers for part in self.parts)

    @property
    def loop_token_layers(self) -> int:
        return sum(site.loop_token_layers for site in self.sites)

    def _repr_html_(self) -> str:
        """Return a table of the cost, one row per site and other part."""
        rows = [
            [
                esc(site.site),
                *(count(n) for n in (site.n_patches, site.n_live, site.token_layers)),
                count(site.loop_token_layers),
            ]
            for site in self.sites
        ]
        rows += [[esc(part.name), "", "", count(part.token_layers), ""] for part in self.parts]
        names = ["site", "patches", "live", "token-layers", "a loop needs"]
        return table_html(names, rows) + (
            f"<p>about {number(self.seconds)} s at this machine's rate, {esc(self.arithmetic)}; "
            f"{count(self.result_bytes)} bytes of values</p>"
        )


def estimate(
    request: Request,
    max_tokens: int | None = None,
    cache_budget: int | None = None,
    *,
    method_spec: MethodSpec = EXACT,
    runner: str = "auto",
    proven: bool = False,
    n_slices: int = 1,
) -> Cost:
    """Return the cost of `request` in packed batches of `max_tokens` tokens; runs no model.

    `runner="auto"` counts as packed; the hooked runner needs a whole
    forward pass per patch. `proven`: bf16 products with a recheck in fp32.
    """
    if max_tokens is None:
        max_tokens = default_max_tokens(request.bridge, request.compute_dtype)
    if cache_budget is None:
        cache_budget = default_cache(request.bridge)
    is_packed = method_spec.exact and runner != "hooked"
    batches = _count_batches(request, max_tokens) if is_packed else Counter[int]()
    sites = tuple(_site_cost(request, plan, method_spec, is_packed) for plan in request.plans)
    parts = _parts(request, method_spec, proven)
    weights = weights_of(request)
    n_captures = count_captures(request) if method_spec.exact else 0
    n_passed = sum(site.token_layers for site in sites) + sum(part.token_layers for part in parts)
    flops = 2.0 * n_passed * request.shape.block_parameters
    shape = request.shape
    longest = max(int(plan.full_lengths.max()) for plan in request.plans)
    per_token = shape.d_model * (shape.n_layers + 1) + 2 * shape.n_layers * (
        shape.n_kv_heads * shape.d_head
    )
    per_token += shape.n_layers * shape.d_model * len(sites)
    dtype, own = request.compute_dtype, request.bridge.cfg.dtype
    device = device_of(request.bridge)
    rate = matmul_rate(device, dtype)
    return Cost(
        sites=sites,
        parts=parts,
        n_slices=n_slices,
        n_batches=sum(batches.values()),
        flops=flops,
        seconds=flops / rate,
        result_bytes=_result_bytes(request, method_spec, proven),
        cache_bytes=2 * longest * per_token * dtype.itemsize,
        cache_budget=cache_budget,
        weights=weights,
        arithmetic=sentence(name_of(own), name_of(dtype)),
        cast_bytes=0 if own == dtype else dtype.itemsize * shape.block_parameters,
        slowdown=1.0 if own == dtype else matmul_rate(device, own) / rate,
        n_captures=n_captures,
        read_bytes=bytes_read(weights, request, n_captures, batches),
    )


def _count_batches(request: Request, max_tokens: int) -> Counter[int]:
    """Return first block -> number of packed batches that begin there.

    Follows `make_packed_batches`, but counts from the tokens of each (pair, layer set) instead of
    single patches: a packed batch holds prompts of one length and an equal part of their tokens, in
    the order of their entry.
    """
    blocks, site_groups = blocks_of(request.plans), site_groups_of(request.plans)
    groups = list(dict.fromkeys(site_groups.values()))
    parts, counted = [], []
    for plan in request.plans:
        n_pairs, n_layers = blocks[plan.site.name]
        pair, layer = np.nonzero(live := plan.live_by_layer()[1])
        group = np.full_like(pair, groups.index(site_groups[plan.site.name]))
        item = (group, pair // n_pairs, layer // n_layers, plan.lengths[pair])
        parts.append(np.stack([*item, plan.entry_of_set[layer]]))
        counted.append(live[pair, layer])
    keys, tokens = np.concatenate(parts, axis=1), np.concatenate(counted)
    if not tokens.size:
        return Counter()
    order = np.lexsort(keys[::-1])  # by work item and length; items are in the order of entry
    keys, tokens = keys[:, order], tokens[order]
    new = np.append(True, (np.diff(keys[:-1]) != 0).any(axis=0))
    first, member = np.flatnonzero(new), np.cumsum(new) - 1
    total = np.add.reduceat(tokens, first)
    end = np.cumsum(tokens) - (np.cumsum(total) - total)[member]
    n_batches = -(-total // max_tokens)
    # batch b begins at token b * total // n_batches: so many have begun at the end of each entry
    columns = (column.tolist() for column in (n_batches[member], end, total[member]))
    begun = np.array([-(-n * e // t) for n, e, t in zip(*columns, strict=True)])  # no overflow
    begun[1:] -= np.where(new[1:], 0, begun[:-1])  # in the entry itself
    counts: Counter[int] = Counter()
    for entry in np.unique(keys[-1]).tolist():
        counts[entry] = int(begun[keys[-1] == entry].sum())
    return counts


def _site_cost(
    request: Request, plan: SitePlan, method_spec: MethodSpec, is_packed: bool
) -> SiteCost:
    pairs, layers = blocks_of(request.plans)[plan.site.name]
    share = (
        0.0
        if not method_spec.exact
        else 1.0
        if method_spec.screen is None
        else method_spec.screen.share_of(plan)
    )
    token_layers = plan.token_layers
    if not is_packed:  # the hooked runner: whole forward passes
        live = plan.live_by_layer()[0].sum(axis=1)  # [pair]
        token_layers = int((live * plan.full_lengths).sum()) * plan.n_layers
    return SiteCost(
        site=plan.site.name,
        n_patches=plan.n_patches,
        n_live=plan.n_live,
        n_exact=round(plan.n_live * share),
        n_units=-(-plan.shape[0] // pairs) * -(-plan.shape[1] // layers),
        token_layers=round(token_layers * share),
        loop_token_layers=plan.loop_token_layers,
    )


def _parts(request: Request, method_spec: MethodSpec, proven: bool) -> tuple[Part, ...]:
    parts = [Part(method.name, token_layers(request, method)) for method in method_spec.methods]
    if method_spec.screen is not None and method_spec.screen.subsets:
        pairs = range(len(request.pairs))
        bound = sum(method_spec.screen.bound_cost(plan, pairs) for plan in request.plans)
        parts.append(Part("bound on the rest", bound))
    if proven:
        parts.append(Part("again in fp32", recheck_cost(request)))
    elif request.noisy and method_spec.exact:
        parts.append(Part("noise floor", null_cost(request)))
    return tuple(parts)


def _result_bytes(request: Request, method_spec: MethodSpec, proven: bool) -> int:
    exact = site_variables(request, {"": "{}"}) if method_spec.exact else ()
    more = recheck_variables(request) if proven else ()
    variables = (*exact, *method_spec.variables(request), *more)
    return 4 * sum(math.prod(variable.shape) for variable in variables)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of a product of 1024 x 1024 x 1024, like a packed batch's, best of 6."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()  # item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best


def weights_of(request: Request) -> Weights:
    """Count the weights of the model of `request`; reads none of them."""
    model = request.bridge.original_model
    offloaded = is_offloaded(model)
    here = str(main_device(model)) if offloaded else ""
    blocks: Sequence[nn.Module] = ()
    try:
        # the plain modules, since the bridge may hold parts of a weight twice
        unwrapped = UnwrappedModel(request.bridge)
        plain, blocks = unwrapped.model, unwrapped.blocks
    except Unsupported:
        plain = model
    layer_of = {module: layer for layer, block in enumerate(blocks) for module in block.modules()}
    places: dict[str, int] = defaultdict(int)
    of_block = [0] * len(blocks)
    around = 0
    for path, module in plain.named_modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            n_bytes = weight.numel() * weight.element_size()
            place = _place(request, f"{path}.{name}")
            if not is_tied(model, f"{path}.{name}"):  # a tied weight is stored once, fetched twice
                places[place] += n_bytes
            remote = place == "disk" or (place == "cpu" and here != "cpu")
            if not offloaded or not remote or weight.ndim < 2:  # UnwrappedModel keeps vectors
                continue
            if module in layer_of:
                of_block[layer_of[module]] += n_bytes
            else:
                around += n_bytes
    return Weights(dict(places), tuple(of_block), around)


def _place(request: Request, name: str) -> str:
    """Return where the weight called `name` is stored."""
    device_map = getattr(request.bridge.original_model, "hf_device_map", None)
    if device_map is None:
        return str(device_of(request.bridge))
    return place_of(device_map, name.replace("_original_component.", ""))


def count_captures(request: Request) -> int:
    """Count the passes over unpatched prompts: one per length of the prompts and block of pairs."""
    n_pairs = min(pairs for pairs, _ in blocks_of(request.plans).values())
    lengths = [(len(p.clean), len(p.corrupted), len(p.answer)) for p in request.pairs]
    return sum(
        len(set(lengths[first : first + n_pairs])) for first in range(0, len(lengths), n_pairs)
    )


def bytes_read(
    weights: Weights, request: Request, n_captures: int, batches: Mapping[int, int]
) -> int:
    """Return the bytes that all captures and packed batches fetch; `batches`: first block -> number
    of packed batches that begin there."""
    needs_vocab = any(metric.needs != "answers" for metric in request.metrics)
    # answers alone need only a few rows of the unembedding
    around = weights.around if needs_vocab else 0
    total = n_captures * (weights.fetched + 2 * around)  # 2: the metrics of base and source
    return total + sum(n * (sum(weights.blocks[first:]) + around) for first, n in batches.items())
