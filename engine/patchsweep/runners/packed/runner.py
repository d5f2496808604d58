"""`PackedRunner`: captures a batch, runs its patches in packed batches, computes metrics."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ModelError
from patchsweep.forward.activation_store import ActivationStore, Budget
from patchsweep.forward.block_args import dry_run
from patchsweep.forward.capture import (
    ActivationCache,
    capture,
    check_attention_sites,
    embed_to_stream,
)
from patchsweep.forward.site_locations import SiteLocation, resolve_site
from patchsweep.forward.unembed import Unembed
from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel
from patchsweep.models.memory import is_out_of_memory
from patchsweep.models.moves import Arriving, move_together, on_cpu, on_its_way
from patchsweep.runners.base import Runner
from patchsweep.runners.packed.bf16 import use_bf16_products
from patchsweep.runners.packed.budget import default_cache, default_max_tokens, keep_batch_memory
from patchsweep.runners.packed.forward import run_packed_batch
from patchsweep.runners.packed.graphs import BlockGraphs
from patchsweep.runners.packed.schedule import PackedBatch, make_packed_batches
from patchsweep.runners.packed.tables import PackedInput, PatchValues
from patchsweep.spec.batch import Batch
from patchsweep.spec.directions import Live
from patchsweep.spec.interventions import Custom, Intervention, Spans, values_of
from patchsweep.spec.metrics import Logits, Metric, Sum, compute
from patchsweep.spec.plan import Column, Ints, PatchSet, Plan, SitePlan
from patchsweep.spec.sites import Site

log = logging.getLogger("patchsweep")
Precision = Literal["model", "bf16"]
Batched = TypeVar("Batched", bound=PackedBatch)


@dataclass
class Loaded:
    """A captured batch with its patch values."""

    batch: Batch
    base: ActivationCache
    source: ActivationCache
    # patch values: site -> [pair, pos, width] per layer at which they are written
    patch_values: dict[str, Sequence[Tensor]]
    base_resid: Float[Tensor, "pair read d_model"]  # final residuals
    source_resid: Float[Tensor, "pair read d_model"]
    targets: Int[Tensor, "pair read 2"]  # right and wrong answers, of the vocabulary
    _logits: dict[str, Tensor] = field(default_factory=dict)  # of base and source, made on demand


class PackedRunner(Runner):
    """Runs exact patches in packed batches of at most `max_tokens` tokens (None: see `budget`).

    Activations of loaded batches stay in memory up to `cache_budget` bytes (None: a fraction of
    free memory); the rest spills to memory-mapped files, see `forward.activation_store`.
    Computes in the model's own dtype, or in `compute_dtype`, to which 16-bit weights are cast block
    by block; `precision="bf16"` multiplies in bf16, see `bf16`.

    Raises:
        Unsupported: the packed runner cannot run the model or one of `sites`.
    """

    name = "packed"
    joins = True

    def __init__(
        self,
        bridge: TransformerBridge,
        sites: Sequence[Site],
        max_tokens: int | None = None,
        precision: Precision = "model",
        cache_budget: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        keep_batch_memory(bridge)
        self.unwrapped = UnwrappedModel(bridge, compute_dtype)
        if precision == "bf16":
            # these layers multiply weights in their stored dtype, or cast once to bf16
            self.unwrapped.cast_no_weights_of(use_bf16_products(self.unwrapped.blocks))
        self.points: dict[str, SiteLocation] = {
            s.name: resolve_site(self.unwrapped, s) for s in sites
        }
        check_attention_sites(self.unwrapped, [*self.points.values()])
        self.unembed = Unembed(self.unwrapped)
        self.graphs = BlockGraphs.of(self.unwrapped)
        self.max_tokens = (
            default_max_tokens(bridge, self.unwrapped.dtype) if max_tokens is None else max_tokens
        )
        self.budget = Budget(default_cache(bridge) if cache_budget is None else cache_budget)

    def check(self, plans: Sequence[SitePlan]) -> None:
        """Check that packed batches can run the patches of `plans`, at prompts of every length.

        Raises:
            Unsupported: attention patterns are patched in several layers at once. (A pattern is
                patched as its z with the base run's values, which differ after another patch.)
                Or the longest prompts' mask is not supported.
        """
        dry_run(self.unwrapped, 1, max(int(plan.full_lengths.max()) for plan in plans))
        for plan in plans:
            if plan.site.is_pattern and any(len(layers) > 1 for layers in plan.axes.layers):
                raise Unsupported(f"{plan.site.name} is patched in several layers at once")

    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """See `Runner`."""
        run = capture(self.unwrapped, tokens, list(self.points.values()))
        return {name: run.layers_of(name) for name in self.points}

    def load(
        self, batch: Batch, intervention: Intervention, keep: Sequence[SiteLocation] = ()
    ) -> Loaded:
        """See `Runner`. Runs one forward pass over all base and source prompts, or one over the
        base prompts and one over the source prompts if their lengths differ.

        The base run's activations of the sites `keep` are cached too.
        """
        n = len(batch.base)
        sites = [*self.points.values(), *(p for p in keep if p.site.name not in self.points)]
        prompts = [batch.base, batch.source]
        if batch.partner is None:  # base and source have one length
            prompts = [torch.cat(prompts)]
        runs = [capture(self.unwrapped, x, sites, ActivationStore(self.budget)) for x in prompts]
        base, source = runs[0].half(slice(0, n)), runs[-1].half(slice(-n, None))
        # blocks only add to the stream, so a value that is not finite would stay in it
        if not all(bool(torch.isfinite(run.resid[-1]).all()) for run in runs):
            _check_finite(base, "base", batch)
            _check_finite(source, "source", batch)
        source_resid = read_of(source.resid[-1], batch.source_reads).to(base.devices[-1])
        if batch.partner is not None:
            source = source.moved(batch.at_base)
        return Loaded(
            batch=batch,
            base=base,
            source=source,
            patch_values={
                name: self.values(point, intervention, base, source, batch.spans)
                for name, point in self.points.items()
            },
            base_resid=read_of(base.resid[-1], batch.reads).to(base.devices[-1]),
            source_resid=source_resid,
            targets=self.unembed.checked(
                torch.stack([batch.answer, batch.wrong], dim=-1).to(base.devices[-1])
            ),
        )

    def references(
        self, loaded: Loaded, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """See `Runner`."""
        pair = torch.arange(len(loaded.batch.base), device=loaded.base_resid.device)
        return (
            self.metrics_of(loaded, loaded.base_resid, pair, metrics),
            self.metrics_of(loaded, loaded.source_resid, pair, metrics),
        )

    def run_together(
        self,
        loaded: Loaded,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> list[Float[Tensor, "metric patch"]]:
        """See `Runner`; all sets share packed batches."""
        return self.start_together(loaded, sets, metrics, null).read()

    def start_together(
        self,
        loaded: Loaded,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> Arriving[list[Float[Tensor, "metric patch"]]]:
        """Launch what `run_together` does; a GPU may still run it when this returns."""
        all_sets = (*sets, *null)
        patch_values = [self.patch_values(patch_set, loaded) for patch_set in sets]
        patch_values += [
            PatchValues(self.points[patch_set.plan.site.name], None) for patch_set in null
        ]
        sizes = [len(patch_set.patches) for patch_set in all_sets]
        packed_input = PackedInput(loaded.base, patch_values, loaded.batch.local)
        done = self.run_batches(
            lambda places: make_packed_batches(all_sets, self.max_tokens, places),
            lambda packed: self._run_packed_batch(loaded, packed, packed_input, metrics),
        )
        values = torch.empty(len(metrics), sum(sizes), device="cpu")
        if not done:
            return Arriving(lambda: list(values.split(sizes, dim=1)), ready=True)
        place = np.concatenate([place for place, _ in done])
        results = on_its_way(torch.cat([result for _, result in done], dim=1))

        def read() -> list[Float[Tensor, "metric patch"]]:
            values[:, place] = results.read()
            return list(values.split(sizes, dim=1))

        return Arriving(read, results.ready)

    def run_batches(
        self, make: Callable[[Ints | None], Iterable[Batched]], run: Callable[[Batched], Tensor]
    ) -> list[tuple[Ints, Tensor]]:
        """Return the places of each batch and its results, which stay on the device.

        `make` makes batches of the patches at some places (None: all). If one does not fit in
        memory, it and those behind it are made again, in half the size.
        """
        done: list[tuple[Ints, Tensor]] = []  # a copy to the CPU would wait
        batches = deque(make(None))
        while batches:
            packed = batches.popleft()
            try:
                done.append((packed.place, run(packed)))
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(packed.patch) == 1:
                    raise
            # here the error is gone, and with it its traceback, which held the batch's tensors
            torch.cuda.empty_cache()  # does nothing without CUDA
            # later packed batches are as small; finished ones are kept
            self.max_tokens = max(1, packed.n_tokens // 2)
            log.warning("out of memory: packed batches are halved to %d tokens", self.max_tokens)
            batches = deque(make(np.concatenate([w.place for w in (packed, *batches)])))
        return done

    def patch_values(self, chosen: PatchSet, loaded: Loaded) -> PatchValues:
        """Return the patch values of the set `chosen`."""
        point = self.points[chosen.plan.site.name]
        values = loaded.patch_values[point.site.name]
        return PatchValues(point, values, _cell_rows(chosen.plan, loaded.batch))

    def _run_packed_batch(
        self, loaded: Loaded, packed: PackedBatch, given: PackedInput, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric row"]:
        local = loaded.batch.local
        hidden = run_packed_batch(self.unwrapped, packed, given, self.graphs)
        pair = on_cpu([local[p] for p in packed.pair.tolist()])
        return self.read(loaded, packed, hidden, loaded.base_resid, pair, pair, metrics)

    def read(
        self,
        loaded: Loaded,
        packed: PackedBatch,
        hidden: Float[Tensor, "token d_model"],
        resid: Float[Tensor, "run read d_model"],
        run: Int[Tensor, " row"],
        pair: Int[Tensor, " row"],
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        """Return the metrics of the rows of a batch with the final residuals `hidden`.

        Row i continues run `run[i]` of those with the residuals `resid`, and is of `pair[i]`.
        """
        # a row ends at the last position read; positions before its start equal the run's
        end = np.cumsum(packed.length - packed.start)
        reads = loaded.batch.reads
        inside = [np.flatnonzero(packed.start <= read) for read in reads]
        tokens = [
            end[rows] - (packed.length - read) for rows, read in zip(inside, reads, strict=True)
        ]
        tables = [run, pair, *map(on_cpu, (*inside, *tokens))]
        run, pair, *tables = move_together(tables, hidden.device)
        own = resid[run]
        for i in range(len(reads)):
            own[tables[i], i] = hidden[tables[len(reads) + i]]
        return self.metrics_of(loaded, own, pair, metrics)

    def metrics_of(
        self,
        loaded: Loaded,
        resid: Float[Tensor, "row read d_model"],
        pair: Tensor,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        """Return the metrics of rows with the final residuals `resid`; row i is of `pair[i]`."""
        batch = loaded.batch
        n_reads = len(batch.reads)
        targets = loaded.targets.to(resid.device)
        flat = resid.flatten(0, 1)
        sums = sorted({name for metric in metrics for name in metric.sums})
        reducible = all(metric.needs == "answers" or metric.sums for metric in metrics)
        # each reduction computes all logits again, block by block: for two, storing them is cheaper
        if reducible and (not sums or (len(sums) == 1 and self.unembed.is_direct(flat))):
            chosen = rearrange(targets[pair], "row read k -> (row read) k")
            logits = self.unembed.token_logits(flat, chosen, checked=True)
            answers = rearrange(logits, "(row read) k -> k row read", read=n_reads)
            reductions = {
                name: self._sum(name, loaded, flat, pair).view(-1, n_reads) for name in sums
            }
            return compute(metrics, Logits(answers[0], answers[1], sums=reductions))
        references = any(metric.needs == "references" for metric in metrics)
        parts = []
        with self.unwrapped.unembed_in_memory():
            for rows in self.unembed.chunks(len(resid), n_reads):
                full = self._full(resid[rows])
                right, wrong = full.gather(2, targets[pair[rows]]).unbind(2)
                base = source = None
                if references:
                    base = self.logits_of(loaded, "base")[pair[rows]]
                    source = self.logits_of(loaded, "source")[pair[rows]]
                parts.append(compute(metrics, Logits(right, wrong, full, base, source)))
        return torch.cat(parts, dim=1)

    def _sum(
        self, name: Sum, loaded: Loaded, final: Float[Tensor, "row_read d_model"], pair: Tensor
    ) -> Float[Tensor, " row_read"]:
        base = name.endswith("_base")
        reference = (loaded.base_resid if base else loaded.source_resid).flatten(0, 1)
        n_reads = len(loaded.batch.reads)
        row = pair[:, None] * n_reads + torch.arange(n_reads, device=pair.device)
        return self.unembed.sum_over_vocab(name, final, reference, row.flatten())

    def _full(self, resid: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row read d_vocab"]:
        logits = self.unembed.logits(resid.flatten(0, 1)).float()
        return rearrange(logits, "(row read) v -> row read v", read=resid.shape[1])

    def logits_of(self, loaded: Loaded, which: Literal["base", "source"]) -> Tensor:
        """Return the fp32 logits `[pair, read, d_vocab]` of the unpatched runs."""
        if which not in loaded._logits:
            resid = loaded.base_resid if which == "base" else loaded.source_resid
            loaded._logits[which] = self._full(resid)
        return loaded._logits[which]

    def values(
        self,
        point: SiteLocation,
        intervention: Intervention,
        base: ActivationCache,
        source: ActivationCache,
        spans: Sequence[Spans],
    ) -> Sequence[Tensor]:
        """Return the patch values of a site, per layer at which packed batches write them."""
        site = point.site
        if site.written_as is not None and isinstance(intervention, Custom | Live):
            # resample, zero and mean commute with W_O; custom values may not
            raise Unsupported(f"custom values of {site.name} are no values of {site.written_as}")
        pairs = zip(base.layers_of(site.name), source.layers_of(site.name), strict=True)
        values = []
        for layer, (b, s) in enumerate(pairs):
            value = values_of(intervention, site, layer, b, s, spans)
            # the source run's own values are in its activation store already
            values.append(s if value is s else base.storage.keep(value.contiguous()))
        if site.shift:  # the first `shift` blocks write nothing; their entries are placeholders
            return [*values[:1] * site.shift, *values]
        if not site.layered:
            return [embed_to_stream(self.unwrapped, values[0])]
        if site.cells:
            return _CellValues(base.sites[site.name], values, base.values)
        if site.is_pattern:
            # a patched pattern changes only its own token's z, so it is patched as z
            return [
                base.storage.keep(_attend(pattern, v))
                for pattern, v in zip(values, base.values, strict=True)
            ]
        return values


def read_of(
    resid: Float[Tensor, "pair pos d"], reads: Sequence[int]
) -> Float[Tensor, "pair read d"]:
    """Return what is at the positions `reads`."""
    return torch.stack([resid[:, read] for read in reads], dim=1)  # an index of the CPU would wait


def _check_finite(run: ActivationCache, name: str, batch: Batch) -> None:
    """Raise ModelError if the residual stream holds NaN or infinity; the text says where first."""
    for layer, resid in enumerate(run.resid):
        if not bool(torch.isfinite(resid).all()):
            row, pos = torch.nonzero(~torch.isfinite(resid).all(dim=-1))[0].tolist()
            where = "the final residual" if layer == len(run.calls) else f"block {layer}'s input"
            raise ModelError(
                f"the {name} run of pair {batch.pairs[row]} holds NaN or infinity, first in "
                f"{where} at position {pos}; check the weights, or load the model in float32 "
                "or bfloat16 if float16 overflows"
            )


class _CellValues(Sequence[Tensor]):
    """Per layer `[cell, width]`: a token's z when one cell (dest, src) of its pattern is patched.

    Cells are in the order pair, dest, src. Each layer is computed on access: all layers together
    would be `[layer, pos, pos, width]`.
    """

    def __init__(self, base: list[Tensor], new: list[Tensor], values: list[Tensor]) -> None:
        self._base, self._new, self._values = base, new, values

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, layer: Any) -> Any:
        v = self._values[layer]
        z = _attend(self._base[layer], v)
        groups = self._base[layer].shape[1] // v.shape[1]
        v = repeat(v, "pair kv src d -> pair (kv g) src d", g=groups)
        # what spilled is on the CPU, the rest on the device
        new, base = (x[layer].to(v.device) for x in (self._new, self._base))
        change = (new - base).to(v)
        change = einsum(change, v, "pair head dest src, pair head src d -> pair dest src head d")
        rows = rearrange(change, "pair dest src head d -> pair dest src (head d)") + z[:, :, None]
        return rows.flatten(0, 2)


def _cell_rows(plan: Plan, batch: Batch) -> Column | None:
    """Return the column `[patch]` of its row in `_CellValues`; None unless the site has cells."""
    if not plan.axes.n_sources:
        return None
    local = np.array([batch.local.get(pair, 0) for pair in range(plan.shape[0])])

    def of(patches: Ints) -> Ints:
        cells = plan.cells(patches)
        # sources past the end of a shorter prompt are dead, so their rows are never read
        source = cells.unit_set % plan.axes.n_sources
        return (local[cells.pair] * batch.length + cells.start) * batch.length + source

    return Column(of)


def _attend(
    pattern: Float[Tensor, "pair head dest src"], v: Float[Tensor, "pair kv_head src d"]
) -> Float[Tensor, "pair dest width"]:
    groups = pattern.shape[1] // v.shape[1]
    v = repeat(v, "pair kv src d -> pair (kv g) src d", g=groups)
    return rearrange(pattern.to(v) @ v, "pair head dest d -> pair dest (head d)")
