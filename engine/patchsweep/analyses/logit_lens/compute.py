"""`lens`: predictions from every layer, point and position of a run, and of a patched run."""

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
from patchsweep.arguments import check_config, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.spec.batch import Batch, make_batches
from patchsweep.spec.finite import check_finite
from patchsweep.spec.interventions import Direction, get_intervention
from patchsweep.spec.spec import SweepSpec, check_direction, check_pairs, model_shape
from patchsweep.store.attributes import flat_attributes
from patchsweep.sweeps.identity import identity_of, read_weights
from patchsweep.sweeps.layout import analysis_attrs

Which = Literal["clean", "corrupted", "base", "source"]
# most prompt tokens of one batch
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
    """Return predictions from every point of the stream, [run, pair, layer, point, pos(, top)].

    Runs are `unpatched` and, with a patch or a removal, `patched`. Points are `resid_pre` (before
    attention), `resid_mid` (before the MLP) and `resid_post`; parallel blocks have no `resid_mid`.
    Variables: `top_token` (text) and `top_prob`; `answer_prob`, `answer_log_prob` (nats) and
    `answer_rank` (number of more probable tokens), and the same for the wrong answer as `wrong_*`.
    For answers of several tokens, the first token that differs is read, after the tokens that the
    answers share; the coordinate `answer_pos` [pair] is the position that predicts it. Entries
    are NaN, or "", beyond a prompt's end and where the model has no such point.

    Args:
        which: the prompt to read, `clean` or `corrupted`, or `base` or `source` under
            `direction`. Default: the base run.
        direction: `denoising`: the base is the corrupted prompt; `noising`: the clean one.
            Default: as in `sweep` for the first patch's intervention; `noising` without a patch.
        remove: a sublayer whose output is set to zero, such as `("mlp", 19)`.
        patch: patches of the run, all applied in one run; resampled values come from the pair's
            other prompt.
        top: number of most probable tokens to keep.
        config: kept in the provenance.

    Raises:
        PatchsweepError: an argument breaks a rule; raised before any forward pass.
        MethodError: final norm and unembedding do not give the model's own predictions.
    """
    check_config(config)
    spec = _asked(model, pairs, which, direction, remove, patch, top)
    attrs = _attrs(model, pairs, spec, remove, top, config)
    # the lens calls the unembedding itself, so that it must stay cast
    with cast_while(model, compute_dtype_of(model), hold=[model.unembed]):
        grid = _read(model, pairs, spec, remove, top)
    return grid.dataset(attrs)


def _read(
    model: TransformerBridge,
    pairs: PromptPairs,
    asked: _Asked,
    remove: Sublayer | None,
    top: int,
) -> _Grid:
    """Run the prompts and read their streams."""
    batches = _batches(model, pairs, asked.direction)
    grid = _Grid(model, pairs, asked.n_runs, max(b.length for b in batches), top)
    if asked.patching is not None:
        asked.patching.prepare()
    for batch in batches:
        grid.tell(batch)
        grid.put(0, batch, run_streams(model, batch.base))
        if asked.patching is None:
            continue
        hooks = asked.patching.hooks(batch)
        streams = run_streams(model, batch.base, hooks)
        if remove is not None and not asked.more:
            check_removed(streams, remove, int(model.cfg.n_layers))
        grid.put(1, batch, streams)
    return grid


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
    """Return the attributes that identify `lens`'s results in a store; runs nothing.

    Raises:
        PatchsweepError: an argument breaks a rule.
    """
    check_config(config)
    spec = _asked(model, pairs, which, direction, remove, patch, top)
    read_weights(model)
    return _attrs(model, pairs, spec, remove, top, config)


def base_direction(
    which: Any, direction: Any, default: Direction
) -> tuple[Direction, Literal["clean", "corrupted"]]:
    """Return the direction whose base is the prompt to read, and the name of that prompt.

    Raises:
        PlanError: `which` is not known.
        ConfigError: `direction` is not.
    """
    if which not in (None, "clean", "corrupted", "base", "source"):
        raise PlanError(
            f"which={which!r} is no run of a pair; use 'clean' or 'corrupted', or 'base' or "
            "'source'"
        )
    check_direction(direction)
    noising = (direction or default) == "noising"
    if which in ("clean", "corrupted"):
        noising = which == "clean"
    elif which == "source":
        noising = not noising
    return ("noising", "clean") if noising else ("denoising", "corrupted")


@dataclass(frozen=True)
class _Asked:
    """The checked arguments of a lens."""

    prompt: str  # clean or corrupted
    direction: Direction  # the direction whose base is that prompt
    patches: tuple[Patch, ...]  # a removal is the last of them
    patching: Patching | None  # None: no patch
    more: bool  # whether there are patches besides the removal

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
    user_patches = (patch,) if isinstance(patch, Patch) else tuple(patch)
    patches = user_patches if remove is None else (*user_patches, removal(model, remove))
    default: Direction = "noising"
    if user_patches and isinstance(user_patches[0], Patch):
        default = get_intervention(user_patches[0].intervention).default_direction
    direction, prompt = base_direction(which, direction, default)
    patching = Patching(model, pairs, patches, direction) if patches else None
    check_readable(model)
    return _Asked(prompt, direction, patches, patching, bool(user_patches))


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
        """Store the tokens of the batch's prompts as text."""
        tokenizer: Any = self.model.tokenizer
        for row, members in zip(batch.pairs, batch.base.tolist(), strict=True):
            self.token[row, : batch.length] = [tokenizer.decode([i]) for i in members]

    def put(self, run: int, batch: Batch, streams: Streams) -> None:
        """Store the predictions from the batch's streams as those of `run`."""
        rows, n_pos = list(batch.pairs), batch.length
        predictions = read_streams(self.model, streams, batch, self.top)
        places = [*streams]
        for name in ("answer_log_prob", "wrong_log_prob"):
            check_finite(
                predictions[name][None],
                [name],
                lambda place, row, pos: (
                    f"{places[place][1]} of layer {places[place][0]}, pair {rows[row]}, pos {pos}"
                ),
            )
        for (layer, point), index in place_index(streams, self.n_layers).items():
            for name, values in self.numbers.items():
                values[run, rows, layer, point, :n_pos] = predictions[name][index]
            self.ids[run, rows, layer, point, :n_pos] = predictions["top_id"][index]

    def dataset(self, attrs: Mapping[str, Any]) -> xr.Dataset:
        """Return the Dataset of all arrays."""
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
