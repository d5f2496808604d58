"""Sweeps beside plain hooks on the unwrapped Hugging Face modules: `compare(architecture)`.

The oracle knows neither TransformerLens nor patchsweep: it is the model as transformers builds it,
with forward hooks, each row of a batch under a patch of its own. Its sites are what the plain
modules have at their borders: inputs and outputs of blocks, the input of attention's output
projection (z), the outputs of the projections q, k and v.
"""

from __future__ import annotations

import copy
import logging
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.errors import PatchsweepError
from patchsweep.models.load import as_bridge
from patchsweep.sweeps.api import sweep
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tools.architectures.configs import D_HEAD, N_HEADS, N_LAYERS
from tools.architectures.table import one_line, tiny_model

SITES = ("resid_pre", "resid_post", "z", "q", "k", "v")
INTERVENTIONS = ("resample", "zero", "constant")
CONSTANT = 0.3
N_PATCHES = 6  # of each site, intervention and pair
LENGTHS = ((6, 10), (11, 16))  # fewest and most words of each pair's prompts
WORDS = "When Then Paul went to the shops gave a bottle of milk drink After said that park".split()

# the projections by the names that families give them
PROJECTIONS = {
    "z": ("o_proj", "out_proj", "c_proj", "dense", "wo", "o"),
    "q": ("q_proj", "wq"),
    "k": ("k_proj", "wk"),
    "v": ("v_proj", "wv"),
}
# what makes q, but before rotary where the site is after it (latent attention); zeros and values of
# another run are the same patch at both
BEFORE_ROTARY = ("q_b_proj",)
# one projection for all three, by the names of its attention: in which order they stand, and
# whether all heads of one come first or all three of a head
JOINT: dict[str, tuple[str, Literal["by kind", "by head"]]] = {
    "Attention": ("qkv", "by kind"),  # of OpenAI GPT
    "BloomAttention": ("qkv", "by head"),
    "CodeGenAttention": ("qvk", "by head"),
    "FalconAttention": ("qkv", "by kind"),
    "GPT2Attention": ("qkv", "by kind"),
    "GPTBigCodeAttention": ("qkv", "by kind"),
    "GPTNeoXAttention": ("qkv", "by head"),
    "MptAttention": ("qkv", "by kind"),
    "Phi3Attention": ("qkv", "by kind"),
}
JOINT_NAMES = ("c_attn", "query_key_value", "qkv_proj", "Wqkv")


@dataclass(frozen=True)
class Comparison:
    """What the oracle found of one architecture."""

    architecture: str
    n_cells: int = 0  # compared
    difference: float = 0.0  # largest |sweep - oracle|, in logit_diff
    relative: float = 0.0  # largest |sweep - oracle| as a share of the metric, at least 1
    effect: float = 0.0  # largest |patched - unpatched| by the oracle
    refused: str = ""  # why nothing was compared


class Place(NamedTuple):
    """Where a site lies in the plain model."""

    module: nn.Module
    side: Literal["in", "out"]  # which of its tensors
    joint: tuple[str, str] | None = None  # of a projection for q, k and v: see `JOINT`

    def columns(self, site: str, head: int, n_heads: int, width: int) -> slice:
        """Which of `width` numbers of a token belong to one head (of `n_heads`) of the site."""
        if self.joint is None:
            each = width // n_heads
            return slice(head * each, (head + 1) * each)
        order, layout = self.joint
        if layout == "by head":
            begin = (head * 3 + order.index(site)) * D_HEAD
        else:
            n_keys = (width // D_HEAD - N_HEADS) // 2
            begin = (order.index(site) and N_HEADS + (order.index(site) - 1) * n_keys) * D_HEAD
            begin += head * D_HEAD
        return slice(begin, begin + D_HEAD)


@dataclass(frozen=True)
class Patch:
    """A cell of a sweep: one patch of one pair."""

    site: str
    intervention: str
    place: Place
    layer: int
    pos: int
    head: int
    n_heads: int  # of the site; 1 where it is not cut into heads
    value: float  # what the sweep says

    def write(self, x: Tensor, donor: Tensor) -> None:
        """Put the new values into `x` `[pos, ...]`, a contiguous row."""
        into, given = x[self.pos].view(-1), donor[self.pos].flatten()
        part = self.place.columns(self.site, self.head, self.n_heads, len(into))
        match self.intervention:
            case "zero":
                into[part] = 0.0
            case "constant":
                into[part] = CONSTANT
            case _:
                into[part] = given[part]


class PlainModel:
    """A plain Hugging Face model, patched by forward hooks.

    Raises:
        LookupError: its blocks are not one list of modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == N_LAYERS]
        if not lists:
            raise LookupError("its blocks are not one list of modules")
        self.blocks = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))

    def place(self, site: str, layer: int, names: Sequence[str]) -> Place | None:
        """Where the site lies in the block, of projections called one of `names`; None: nowhere."""
        block = self.blocks[layer]
        if site in ("resid_pre", "resid_post"):
            return Place(block, "in" if site == "resid_pre" else "out")
        found = [
            Place(child, "in" if site == "z" else "out", joint)
            for module in block.modules()
            if type(module).__name__.endswith("Attention")
            for name, child in module.named_children()
            for joint in [JOINT.get(type(module).__name__) if site != "z" else None]
            if name in (names if joint is None else JOINT_NAMES)
        ]
        return found[0] if len(found) == 1 else None

    @torch.no_grad()
    def metrics(self, pair: PromptPair, patches: Sequence[Patch]) -> np.ndarray:
        """logit_diff of the corrupted prompt, unpatched and then under each of `patches`."""
        base, source = torch.tensor(pair.corrupted), torch.tensor(pair.clean)
        places = list(dict.fromkeys(patch.place for patch in patches))
        donors: dict[Place, Tensor] = {}

        def keep(place: Place, x: Tensor) -> Tensor:
            donors[place] = x[0].clone()
            return x

        def write(place: Place, x: Tensor) -> Tensor:
            x = x.clone(memory_format=torch.contiguous_format)
            for row, patch in enumerate(patches, 1):
                if patch.place == place:
                    patch.write(x[row], donors[place])
            return x

        self._logits(source[None], places, keep)
        logits = self._logits(base.expand(1 + len(patches), -1), places, write)
        difference = logits[:, pair.answer[0]] - logits[:, pair.wrong_answer[0]]
        return difference.double().numpy()

    def _logits(
        self, tokens: Tensor, places: Sequence[Place], edit: Callable[[Place, Tensor], Tensor]
    ) -> Tensor:
        """Logits at the last token, `[row, vocabulary]`, with what `edit` gives at each place."""
        with ExitStack() as stack:
            for place in places:
                stack.enter_context(_hooked(place, edit))
            logits: Tensor = self.model(tokens, use_cache=False).logits[:, -1]
        return logits


@contextmanager
def _hooked(place: Place, edit: Callable[[Place, Tensor], Tensor]) -> Iterator[None]:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (edit(place, args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": edit(place, kwargs["hidden_states"])}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(place, output[0]), *output[1:])
        return edit(place, output)

    if place.side == "in":
        handle = place.module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def compare(architecture: str) -> Comparison:
    """Random cells of sweeps of a tiny random model, beside plain hooks on the same weights.

    Prompts, sites' layers, positions and heads are drawn by the architecture's name.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # slow paths that transformers points out
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compare(architecture)
    finally:
        logging.disable(level)


def _compare(architecture: str) -> Comparison:
    rng = np.random.default_rng(zlib.crc32(architecture.encode()))
    try:
        model, tokenizer = tiny_model(architecture)
        unwrapped = copy.deepcopy(model)
        bridge = as_bridge(f"tiny-{model.config.model_type}", model, tokenizer)
    except Exception as error:  # whatever the two libraries raise
        return Comparison(architecture, refused=one_line(error))
    texts = [_texts(rng, *bounds) for bounds in LENGTHS]
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[clean for clean, _ in texts],
        corrupted=[corrupted for _, corrupted in texts],
        answers=[(" Mary", " John")] * len(texts),
    )
    swept, refused = _sweeps(bridge, pairs)
    if not swept:
        return Comparison(architecture, refused=refused)
    plain = PlainModel(unwrapped)
    found = np.empty((0, 3))  # sweep, oracle, unpatched
    for i, pair in enumerate(pairs):
        patches = [
            patch
            for (site, intervention), ds in swept.items()
            for patch in _draw(rng, plain, ds.isel(pair=i), site, intervention, pair)
        ]
        unpatched, *expected = plain.metrics(pair, patches)
        rows = [(p.value, e, unpatched) for p, e in zip(patches, expected, strict=True)]
        found = np.concatenate([found, rows])
    value, expected, unpatched = found.T
    size = np.maximum(1.0, np.maximum(abs(expected), abs(unpatched)))
    return Comparison(
        architecture,
        n_cells=len(found),
        difference=float(abs(value - expected).max()),
        relative=float((abs(value - expected) / size).max()),
        effect=float(abs(expected - unpatched).max()),
    )


def _texts(rng: np.random.Generator, fewest: int, most: int) -> tuple[str, str]:
    """A clean and a corrupted prompt of random words that differ in a name."""
    words = rng.choice(WORDS, int(rng.integers(fewest, most + 1))).tolist()
    at = int(rng.integers(len(words) - 2))
    clean, corrupted = (
        " ".join([*words[:at], name, *words[at + 1 :]]) for name in ("John", "Mary")
    )
    return clean, corrupted


def _sweeps(
    bridge: TransformerBridge, pairs: PromptPairs
) -> tuple[dict[tuple[str, str], xr.Dataset], str]:
    """(site, intervention) -> the Dataset that holds it, where it can be swept; else why not."""
    found: dict[tuple[str, str], xr.Dataset] = {}
    refused = ""
    for intervention in INTERVENTIONS:
        given: Any = CONSTANT if intervention == "constant" else intervention
        waiting = [SITES]
        while waiting:
            sites = waiting.pop()
            try:
                ds = sweep(
                    bridge,
                    pairs,
                    sites,
                    direction="denoising",
                    intervention=given,
                    positions=range(max(map(len, pairs))),
                )
            except PatchsweepError as error:
                refused = one_line(error)
                waiting += [(site,) for site in sites if len(sites) > 1]
            else:
                found |= {(site, intervention): ds for site in sites}
    return found, refused


def _draw(
    rng: np.random.Generator,
    plain: PlainModel,
    ds: xr.Dataset,
    site: str,
    intervention: str,
    pair: PromptPair,
) -> Iterator[Patch]:
    """Random patches of one pair at a site, and what the sweep says of them."""
    names = PROJECTIONS.get(site, ())
    if site == "q" and intervention != "constant":
        names += BEFORE_ROTARY
    places = [plain.place(site, layer, names) for layer in range(N_LAYERS)]
    layers = [layer for layer, place in enumerate(places) if place is not None]
    unit = next((dim for dim in ("head", "kv_head") if dim in ds[site].dims), None)
    n_heads = ds.sizes[unit] if unit else 1
    first = 0
    if intervention == "resample":  # before the first token that differs it changes nothing
        first = [a != b for a, b in zip(pair.clean, pair.corrupted, strict=True)].index(True)
    for _ in range(N_PATCHES if layers else 0):
        layer = int(rng.choice(layers))
        pos, head = int(rng.integers(first, len(pair))), int(rng.integers(n_heads))
        cell = {"metric": 0, "layer": layer, "pos": pos} | ({unit: head} if unit else {})
        place = places[layer]
        assert place is not None
        value = float(ds[site].isel(cell))
        yield Patch(site, intervention, place, layer, pos, head, n_heads, value)
