"""`lens`: predictions from every layer, point and position of a run, and of a patched run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.logit_lens.patches import Patch, Patching, Sublayer, removal
from patchsweep.analyses.logit_lens.stream import (
    POINTS,
    Streams,
    check_readable,
    check_removed,
    place_index,
    read_streams,
    run_streams,
)
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.arguments import check_config, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import token_table
from patchsweep.errors import PlanError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.spec.batch import Batch, base_and_source, make_batches
from patchsweep.spec.finite import check_finite
from patchsweep.spec.interventions import Direction, get_intervention
from patchsweep.spec.spec import SweepSpec, check_direction, check_pairs, model_shape
from patchsweep.sweeps.layout import analysis_attrs, strings
from patchsweep.tasks.plain import pairs_of

Floats = NDArray[np.float32]
Which = Literal["clean", "corrupted", "base", "source"]
# most prompt tokens of one batch
MAX_TOKENS = 2048
TOP = ("top_prob", "top_id")
NUMBERS = tuple(f"{k}_{n}" for k in ("answer", "wrong") for n in ("prob", "log_prob", "rank"))


@runs_model
def lens(
    model: TransformerBridge,
    pairs: PromptPairs | str | Sequence[str],
    *,
    which: Which | None = None,
    direction: Direction | None = SweepSpec.direction,
    remove: Sublayer | None = None,
    patch: Patch | Sequence[Patch] = (),
    top: int = 5,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
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
        pairs: prompt pairs, or plain texts, see `patchsweep.text_pairs`: the answers are then the
            two tokens that the model finds most probable after each.
        which: the prompt to read, `clean` or `corrupted`, or `base` or `source` under
            `direction`. Default: the base run.
        direction: `denoising`: the base is the corrupted prompt; `noising`: the clean one.
            Default: as in `sweep` for the first patch's intervention; `noising` without a patch.
        remove: a sublayer whose output is set to zero, such as `("mlp", 19)`.
        patch: patches of the run, all applied in one run; resampled values come from the pair's
            other prompt.
        top: number of most probable tokens to keep.
        config: kept in the provenance.
        stages: where and how the stage "lens" runs, see `patchsweep.analyses.stages`. Default: in
            memory.

    Raises:
        PatchsweepError: an argument breaks a rule; raised before any forward pass.
        MethodError: final norm and unembedding do not give the model's own predictions.
    """
    check_config(config)
    pairs = pairs_of(model, pairs)
    spec = make_spec(model, pairs, which, direction, remove, patch, top)
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        # the lens calls the unembedding itself, so that it must stay cast
        with cast_while(model, compute_dtype_of(model), hold=[model.unembed]):
            results = _read(model, pairs, spec, stages)
        return _dataset(model, pairs, spec, results)

    return stages.results(model, lambda: _attrs(model, pairs, spec, config), compute)


def _read(
    model: TransformerBridge, pairs: PromptPairs, spec: LensSpec, stages: Stages
) -> xr.Dataset:
    """Run the prompts and read their streams; `top_id` holds -1 where there is no token."""
    n_layers, longest = int(model.cfg.n_layers), max(len(pair) for pair in pairs)
    length = max(len(base_and_source(pair, spec.direction)[0]) for pair in pairs)
    dims = {"run": spec.n_runs, "pair": len(pairs), "layer": n_layers}
    dims |= {"point": len(POINTS), "pos": length}
    shapes = {**dict.fromkeys(NUMBERS, dims), **{key: {**dims, "top": spec.top} for key in TOP}}
    patching = spec.patching
    prepare = cache(patching.prepare) if patching is not None else None

    def read(block: range) -> Computed:
        cells = empty(shapes, block)
        cells["top_id"][:] = -1
        for batch in make_batches(pairs, block, spec.direction, -1, device_of(model)):
            rows = [pair - block.start for pair in batch.pairs]
            _put(cells, 0, rows, model, batch, run_streams(model, batch.base))
            if patching is None or prepare is None:
                continue
            prepare()
            streams = run_streams(model, batch.base, patching.hooks(batch))
            if spec.remove is not None and len(spec.patches) == 1:
                check_removed(streams, spec.remove, n_layers)
            _put(cells, 1, rows, model, batch, streams)
        return cells, None

    cost = longest * n_layers * spec.n_runs
    results = stages.run("lens", shapes, max(1, MAX_TOKENS // longest), read, cost=cost)
    stages.wait()
    return results


def _put(
    cells: Mapping[str, Floats],
    run: int,
    rows: Sequence[int],
    model: TransformerBridge,
    batch: Batch,
    streams: Streams,
) -> None:
    """Store the predictions from the batch's streams as those of `run`, in `rows` of `cells`."""
    n_layers, top, n_pos = int(model.cfg.n_layers), cells["top_id"].shape[-1], batch.length
    predictions = read_streams(model, streams, batch, top)
    places = [*streams]
    for name in ("answer_log_prob", "wrong_log_prob"):
        check_finite(
            predictions[name][None],
            [name],
            lambda place, row, pos: (
                f"{places[place][1]} of layer {places[place][0]}, pair {batch.pairs[row]}, "
                f"pos {pos}"
            ),
        )
    for (layer, point), index in place_index(streams, n_layers).items():
        for name, values in cells.items():
            values[run, rows, layer, point, :n_pos] = predictions[name][index]


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
    spec = make_spec(model, pairs, which, direction, remove, patch, top)
    return _attrs(model, pairs, spec, config)


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
class LensSpec:
    """The checked arguments of a lens."""

    prompt: str  # clean or corrupted
    direction: Direction  # the direction whose base is that prompt
    patches: tuple[Patch, ...]  # a removal is the last of them
    patching: Patching | None  # None: no patch
    remove: Sublayer | None
    top: int

    @property
    def n_runs(self) -> int:
        return 1 if self.patching is None else 2


def make_spec(
    model: TransformerBridge,
    pairs: PromptPairs,
    which: Any,
    direction: Any,
    remove: Any,
    patch: Any,
    top: Any,
) -> LensSpec:
    shape = model_shape(model)
    check_pairs(model, pairs, aligned=True)
    whole_number("top", top, least=1, most=shape.d_vocab)
    user_patches = (patch,) if isinstance(patch, Patch) else tuple(patch)
    patches = user_patches if remove is None else (*user_patches, removal(model, remove))
    default: Direction = "noising"
    if user_patches and isinstance(user_patches[0], Patch):
        default = get_intervention(user_patches[0].intervention).default_direction
    direction, prompt = base_direction(which, direction, default)
    patching = Patching(model, pairs, patches, direction) if patches else None
    check_readable(model)
    return LensSpec(prompt, direction, patches, patching, remove, top)


def _attrs(
    model: TransformerBridge,
    pairs: PromptPairs,
    spec: LensSpec,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    settings = {
        "prompt": f"{spec.prompt}, the base of {spec.direction}",
        "patches": [patch.identity() for patch in spec.patches],
        "top": spec.top,
    }
    return {
        **analysis_attrs("lens", model, pairs, settings, config),
        "prompt": spec.prompt,
        "removed": "" if spec.remove is None else " ".join(map(str, spec.remove)),
        "patches": [{**patch.as_json(), **patch.means(pairs)} for patch in spec.patches],
        "top": spec.top,
    }


def _dataset(
    model: TransformerBridge, pairs: PromptPairs, spec: LensSpec, results: xr.Dataset
) -> xr.Dataset:
    """Return the results from the values of the stage."""
    tokenizer: Any = model.tokenizer
    ids = results["top_id"].values.astype(np.int64)
    names = {i: tokenizer.decode([i]) for i in np.unique(ids).tolist() if i >= 0} | {-1: ""}
    n_runs, n_pairs, n_layers, _, length = ids.shape[:-1]
    token = token_table(model, [base_and_source(pair, spec.direction)[0] for pair in pairs])
    return xr.Dataset(
        {
            "top_token": (results["top_id"].dims, np.vectorize(names.get, otypes=[object])(ids)),
            **{name: (results[name].dims, results[name].values) for name in (*NUMBERS, "top_prob")},
        },
        coords={
            "run": strings(["unpatched", "patched"][:n_runs]),
            "pair": np.arange(n_pairs),
            "layer": np.arange(n_layers),
            "point": strings(POINTS),
            "pos": np.arange(length),
            "token": (("pair", "pos"), token),
            "answer": ("pair", strings([p.answer_text for p in pairs])),
            "wrong_answer": ("pair", strings([p.wrong_answer_text for p in pairs])),
            "answer_pos": ("pair", np.array([len(p) - 1 + p.differ for p in pairs])),
        },
    )
