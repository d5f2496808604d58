"""`lens`: predictions from every layer, point and position of a run, and of the run patched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.logit_lens.patches import Patch, Patching, Sublayer, removal
from patchsweep.analyses.logit_lens.predictions import read_streams
from patchsweep.analyses.logit_lens.stream import (
    POINTS,
    Streams,
    check_readable,
    check_removed,
    place_index,
    run_streams,
)
from patchsweep.arguments import whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.spec.batch import Batch, make_batches
from patchsweep.spec.finite import check_finite
from patchsweep.spec.interventions import Direction, get_intervention
from patchsweep.spec.spec import SweepSpec, check_pairs, model_shape
from patchsweep.store.attributes import flat_attributes
from patchsweep.sweeps.identity import identity_of, read_weights
from patchsweep.sweeps.layout import analysis_attrs

Which = Literal["clean", "corrupted", "base", "source"]
# tokens of prompts that run together
MAX_TOKENS = 2048
NUMBERS = tuple(f"{k}_{n}" for k in ("answer", "wrong") for n in ("prob", "log_prob", "rank"))


@runs_model
def lens(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    which: Which | None = None,
    direction: Direction | None = SweepSpec.direction,
    remove: Sublayer | None = None,
    patch: Patch | Sequence[Patch] = (),
    top: int = 5,
    config: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Predictions from every place of the stream, dims [run, pair, layer, point, pos(, top)].

    Runs are `unpatched` and, if a patch or a removal is given, `patched`. Points are `resid_pre`
    (before attention), `resid_mid` (before the MLP) and `resid_post`; parallel blocks have no
    `resid_mid`. Variables: `top_token` (text) and `top_prob`; `answer_prob`, `answer_log_prob`
    (nats) and `answer_rank` (tokens above it, 0 is the best), and the same of the wrong answer as
    `wrong_*`. Of answers of several tokens the first that tells the two apart is read, after the
    tokens that they share; the coordinate `answer_pos` [pair] is the position after which it is
    expected. NaN, or "", beyond a prompt's end and where there
    is no such point.

    Args:
        which: the prompt to look at, `clean` or `corrupted`, or `base` or `source`, which
            `direction` makes one of them. Default: the base run, see `direction`.
        direction: `denoising`: the base is the corrupted prompt; `noising`: the clean one.
            Default: what suits the first patch, as in `sweep`; the clean prompt without any.
        remove: a sublayer whose write is zeroed, such as `("mlp", 19)`; the run goes on without.
        patch: patches of the run looked at, all of them in one run; resampled values come from
            the pair's other prompt.
        top: how many of the most probable tokens to keep.
        config: kept in the provenance.

    Raises:
        PatchsweepError: an argument breaks a rule; nothing has run then.
        MethodError: the model's stream is not what its final norm and unembedding read.
    """
    asked = _asked(model, pairs, which, direction, remove, patch, top)
    attrs = _attrs(model, pairs, asked, remove, top, config)
    # the lens reads the unembedding itself
    with cast_while(model, compute_dtype_of(model), hold=[model.unembed]):
        found = _read(model, pairs, asked, remove, top)
    return found.dataset(attrs)


def _read(
    model: TransformerBridge,
    pairs: PromptPairs,
    asked: _Asked,
    remove: Sublayer | None,
    top: int,
) -> _Grid:
    """Run the prompts, and read the streams."""
    batches = _batches(model, pairs, asked.direction)
    found = _Grid(model, pairs, asked.n_runs, max(b.length for b in batches), top)
    if asked.patching is not None:
        asked.patching.prepare()
    for batch in batches:
        found.tell(batch)
        found.put(0, batch, run_streams(model, batch.base))
        if asked.patching is None:
            continue
        hooks = asked.patching.hooks(batch)
        streams = run_streams(model, batch.base, hooks)
        if remove is not None and not asked.more:
            check_removed(streams, remove, int(model.cfg.n_layers))
        found.put(1, batch, streams)
    return found


def describe(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    which: Which | None = None,
    direction: Direction | None = SweepSpec.direction,
    remove: Sublayer | None = None,
    patch: Patch | Sequence[Patch] = (),
    top: int = 5,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Attributes by which a store knows what `lens` gives for these arguments; runs nothing.

    Raises:
        PatchsweepError: an argument breaks a rule.
    """
    asked = _asked(model, pairs, which, direction, remove, patch, top)
    read_weights(model)
    return _attrs(model, pairs, asked, remove, top, config)


def base_direction(
    which: Any, direction: Any, default: Direction
) -> tuple[Direction, Literal["clean", "corrupted"]]:
    """The direction whose base is the prompt to look at, and which prompt that is.

    Raises:
        PlanError: `which` or `direction` is not known.
    """
    if which not in (None, "clean", "corrupted", "base", "source"):
        raise PlanError(
            f"which={which!r} is no run of a pair; use 'clean' or 'corrupted', or 'base' or "
            "'source'"
        )
    if direction not in (None, "denoising", "noising"):
        raise PlanError(
            f"direction={direction!r} is not known; use 'denoising' (base is the corrupted "
            "prompt) or 'noising' (base is the clean prompt)"
        )
    noising = (direction or default) == "noising"
    if which in ("clean", "corrupted"):
        noising = which == "clean"
    elif which == "source":
        noising = not noising
    return ("noising", "clean") if noising else ("denoising", "corrupted")


@dataclass(frozen=True)
class _Asked:
    """What a lens is to show, checked."""

    prompt: str  # clean or corrupted
    direction: Direction  # under which that prompt is the base
    patches: tuple[Patch, ...]  # a removal among them, at the end
    patching: Patching | None  # None: there is no patch
    more: bool  # there are patches besides the removal

    @property
    def n_runs(self) -> int:
        return 1 if self.patching is None else 2


def _asked(
    model: TransformerBridge,
    pairs: PromptPairs,
    which: Any,
    direction: Any,
    remove: Any,
    patch: Any,
    top: Any,
) -> _Asked:
    shape = model_shape(model)
    check_pairs(model, pairs)
    whole_number("top", top, least=1, most=shape.d_vocab)
    given = (patch,) if isinstance(patch, Patch) else tuple(patch)
    patches = given if remove is None else (*given, removal(model, remove))
    default: Direction = "noising"
    if given and isinstance(given[0], Patch):
        default = get_intervention(given[0].intervention).default_direction
    direction, prompt = base_direction(which, direction, default)
    patching = Patching(model, pairs, patches, direction) if patches else None
    check_readable(model)
    return _Asked(prompt, direction, patches, patching, bool(given))


def _attrs(
    model: TransformerBridge,
    pairs: PromptPairs,
    asked: _Asked,
    remove: Sublayer | None,
    top: int,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    settings = {
        "prompt": f"{asked.prompt}, the base of {asked.direction}",
        "patches": [patch.identity() for patch in asked.patches],
        "top": top,
    }
    identity = identity_of("lens", model, pairs, settings)
    return {
        **analysis_attrs(model, identity, config),
        "prompt": asked.prompt,
        "removed": "" if remove is None else f"{remove[0]} {remove[1]}",
        "patches": [{**patch.told(), **patch.means(pairs)} for patch in asked.patches],
        "top": top,
    }


def _batches(model: TransformerBridge, pairs: PromptPairs, direction: Direction) -> list[Batch]:
    longest = max(len(pair) for pair in pairs)
    size = max(1, MAX_TOKENS // longest)
    device = device_of(model)
    return [
        batch
        for first in range(0, len(pairs), size)
        for batch in make_batches(
            pairs, range(first, min(first + size, len(pairs))), direction, -1, device
        )
    ]


class _Grid:
    """The arrays of a lens, filled batch by batch."""

    def __init__(
        self, model: TransformerBridge, pairs: PromptPairs, n_runs: int, length: int, top: int
    ) -> None:
        self.model, self.pairs, self.top = model, pairs, top
        self.n_layers = int(model.cfg.n_layers)
        shape = (n_runs, len(pairs), self.n_layers, len(POINTS), length)
        self.numbers = {name: np.full(shape, np.nan, np.float32) for name in NUMBERS}
        self.numbers["top_prob"] = np.full((*shape, top), np.nan, np.float32)
        self.ids = np.full((*shape, top), -1)
        self.token = np.full((len(pairs), length), "", dtype=object)

    def tell(self, batch: Batch) -> None:
        """Keep the words of the batch's prompts."""
        tokenizer: Any = self.model.tokenizer
        for row, members in zip(batch.pairs, batch.base.tolist(), strict=True):
            self.token[row, : batch.length] = [tokenizer.decode([i]) for i in members]

    def put(self, run: int, batch: Batch, streams: Streams) -> None:
        """Read the streams of the batch and keep what they say, as that run's."""
        rows, n_pos = list(batch.pairs), batch.length
        found = read_streams(self.model, streams, batch, self.top)
        places = [*streams]
        for name in ("answer_log_prob", "wrong_log_prob"):
            check_finite(
                found[name][None],
                [name],
                lambda place, row, pos: (
                    f"{places[place][1]} of layer {places[place][0]}, pair {rows[row]}, pos {pos}"
                ),
            )
        for (layer, point), index in place_index(streams, self.n_layers).items():
            for name, values in self.numbers.items():
                values[run, rows, layer, point, :n_pos] = found[name][index]
            self.ids[run, rows, layer, point, :n_pos] = found["top_id"][index]

    def dataset(self, attrs: Mapping[str, Any]) -> xr.Dataset:
        """Everything that was put."""
        tokenizer: Any = self.model.tokenizer
        used = np.unique(self.ids).tolist()
        names = {i: tokenizer.decode([i]) for i in used if i >= 0} | {-1: ""}
        words = np.vectorize(names.get, otypes=[object])(self.ids)
        dims = ("run", "pair", "layer", "point", "pos")
        n_runs, n_pairs, n_layers, _, length = self.ids.shape[:-1]
        return xr.Dataset(
            {
                "top_token": ((*dims, "top"), words),
                **{
                    name: ((*dims, "top") if name == "top_prob" else dims, values)
                    for name, values in self.numbers.items()
                },
            },
            coords={
                "run": _strings(["unpatched", "patched"][:n_runs]),
                "pair": np.arange(n_pairs),
                "layer": np.arange(n_layers),
                "point": _strings(POINTS),
                "pos": np.arange(length),
                "token": (("pair", "pos"), self.token),
                "answer": ("pair", _strings([p.answer_text for p in self.pairs])),
                "wrong_answer": ("pair", _strings([p.wrong_answer_text for p in self.pairs])),
                "answer_pos": ("pair", np.array([len(p) - 1 + p.differ for p in self.pairs])),
            },
            attrs=flat_attributes(attrs),
        )


def _strings(values: Any) -> NDArray[Any]:
    return np.array(values, dtype=object)
