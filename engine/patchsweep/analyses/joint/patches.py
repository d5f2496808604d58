"""`run_patches`: metrics of sets of patches that act in one run, as an xarray Dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.stages import Computed, Stages
from patchsweep.analyses.thresholds import choose_thresholds, tolerance_words
from patchsweep.arguments import check_runner
from patchsweep.attribution.run import MAX_TOKENS
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import token_table
from patchsweep.errors import PlanError
from patchsweep.models.compute import ComputeDtype
from patchsweep.models.running import runs_model
from patchsweep.results.tolerance import LINEAR, TOKEN_LAYERS
from patchsweep.runners.select import RunnerName
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.finite import names_of
from patchsweep.spec.interventions import Direction
from patchsweep.spec.joint import JointPlan
from patchsweep.spec.plan import Ints
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import MetricLike, SweepSpec
from patchsweep.store.difference import ADAPTIVE
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.identity import intervention_words, metric_words
from patchsweep.sweeps.joint import JointPatches, JointRequest, joint_request
from patchsweep.sweeps.joint_adaptive import EXACT_ROW, AdaptivePatches, check_joint_tolerance
from patchsweep.sweeps.layout import metric_and_pair_coords, strings
from patchsweep.sweeps.patches import Patch

# sets of patches in one shard: a killed run loses at most the shard in progress
SETS = 8192
# sets whose patches are listed in the attributes; a larger number is told by its digest alone
LISTED = 256
EXACT_COST = "_exact_token_layers"
# variables of a stage with a tolerance, beside "patched": what `AdaptivePatches.columns` holds
BESIDE = tuple("patched" + ending for ending in (LINEAR, TOKEN_LAYERS, EXACT_COST))

PatchSets = Sequence[Patch | Sequence[Patch]] | Mapping[str, Patch | Sequence[Patch]]


@runs_model
def run_patches(
    model: TransformerBridge,
    pairs: PromptPairs,
    patches: PatchSets,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    tolerance: float | str | None = SweepSpec.tolerance,
    compute_dtype: ComputeDtype = SweepSpec.compute_dtype,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    cache_budget: int | None = None,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Run each set of patches jointly: `patched` [metric, pair, patch], the raw metric.

    An entry of `patches` is a `Patch`, or a list of patches that act in one run:

        run_patches(model, pairs, [
            Patch("z", layer=9, head=6),
            [Patch("z", layer=9, head=6), Patch("mlp_out", layer=10, pos="end")],
        ])

    `base_metric` and `source_metric` [metric, pair] are those of the unpatched runs, and
    `patched - base_metric` is a set's effect.

    **Order.** All values are made from the unpatched base and source run, before any patch runs. A
    patch downstream of another overwrites what the other one caused at its place, and nothing else:
    between the two, the change travels on through everything that no patch holds. Patches of one
    set have no order of their own; the model's has. To freeze a part, patch it with
    `intervention="base"`, the base run's own value: then no change passes through it. At
    `resid_pre`, `resid_mid`, `resid_post` and `embed` a patch replaces the residual stream, and
    with it all that was written there before.

    Args:
        patches: sets by number, or a mapping of names to sets; the names become the coordinate.
        direction: as in `sweep`. Default: that of the interventions, which must then agree.
        means_from: as in `sweep`, for all interventions that take means.
        tolerance: the largest error of a value, in units of the metric or such as "1%", as in
            `sweep`, from a sample of all sets: what a set hardly changes is taken from a
            gradient. That takes sets that patch one layer, or two of which the lower patches are
            those of many sets; others run exactly. Adds `patched_linear` and
            `patched_token_layers`. Default: every set runs exactly.
        stages: where the shards of the stages "patches" go, see `patchsweep.analyses.stages`.
            Default: in memory.

    Others are those of `sweep`. A set is run from its lowest layer and its first position on, over
    the base run's keys and values. Patches that are proven to change nothing do not run, and a set
    of such patches has the base metric. Sets with equal patches in their lowest layer share the
    run up to their next one.

    Raises:
        PlanError: a set is empty, gives one vector two values, or names a place that the model or
            a pair does not have.
        PatchsweepError: another argument breaks a rule; nothing has run then.
    """
    check_runner(runner, max_tokens, cache_budget)
    names, sets = _named(patches)
    request = joint_request(model, pairs, sets, metrics, direction, read, means_from, compute_dtype)
    request.check_overlaps()
    check_joint_tolerance(request, tolerance, runner)
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        joint = joint_patches(request, runner, max_tokens, cache_budget, tolerance)
        return patched_dataset(joint, stages, {"patch": strings(names)})

    settings = {
        "patches": _described(sets),
        **settings_of(request),
        **tolerance_words(tolerance),
    }
    return stages.analysis("patches", model, pairs, settings, compute, config)


def joint_patches(
    request: JointRequest,
    runner: RunnerName,
    max_tokens: int | None,
    cache_budget: int | None,
    tolerance: float | str | None,
    n_exact: int = 0,
) -> JointPatches:
    """Return what runs the sets of `request`; the first `n_exact` run exactly in any case."""
    if tolerance is None:
        return JointPatches(request, runner, max_tokens, cache_budget)

    def site_of(plan: JointPlan, numbers: Ints | None) -> Ints:
        assert numbers is not None
        return np.where(numbers < n_exact, EXACT_ROW, 0)

    return AdaptivePatches(
        request, runner, max_tokens, cache_budget, tolerance, ["patched"], site_of
    )


def run_variables(
    joint: JointPatches, stages: Stages, attrs: Mapping[str, Any] | None = None
) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, Any]]:
    """Return the variables `[metric, pair, set]` of all sets, `[2, metric, pair]` of base and
    source runs, and attributes that say what came of a tolerance.

    Computed in stages of `SETS` sets; `attrs`: as in `Stages.run`.
    """
    request = joint.request
    n_sets = len(request.sets)
    variables, most = ["patched"], SETS
    if isinstance(joint, AdaptivePatches):
        variables += BESIDE
        longest = request.pairs.longest
        most = max(1, MAX_TOKENS // longest)  # pairs whose gradients one pass takes
        n_metrics = len(request.metrics)
        joint.summaries = choose_thresholds(joint.sites, n_metrics, stages, joint.calibrate)
    found = []
    for first in range(0, n_sets, SETS):
        members = range(first, min(first + SETS, n_sets))
        dims = {"metric": len(request.metrics), "pair": len(request.pairs), "patch": len(members)}

        def block(pairs: range, members: range = members) -> Computed:
            values, references = joint.run(pairs, members)
            return dict(zip(variables, np.split(values, len(variables)), strict=True)), references

        found.append(
            stages.run(
                "patches",
                dict.fromkeys(variables, dims),
                min(most, max(1, SETS // len(members))),
                block,
                metrics=names_of(request.metrics),
                attrs={**(attrs or {}), "first": first},
            )
        )
    stages.wait()
    values = {name: np.concatenate([ds[name].values for ds in found], axis=2) for name in variables}
    references = np.stack([found[0][f"{x}_metric"].values for x in ("base", "source")])
    if not isinstance(joint, AdaptivePatches):
        return values, references, {}
    exact = values.pop("patched" + EXACT_COST)
    ran = values["patched" + TOKEN_LAYERS]
    n_live = int((ran[0] > 0).sum())
    told = adaptive_attributes(joint, {"patched": n_live}, {"patched": ran}, {"patched": exact})
    return values, references, {ADAPTIVE: told}


def adaptive_attributes(
    patches: AdaptivePatches,
    n_live: Mapping[str, int],
    ran: Mapping[str, Values],
    exact: Mapping[str, Values],
) -> dict[str, Any]:
    """Return what results say of their tolerance, as stores of sweeps do.

    `ran`, `exact`: token-layers `[metric, ...]` of each site's patches, and those of exact runs.
    """
    names = names_of(patches.request.metrics)
    return {
        "tolerance": patches.tolerance,
        "sites": {
            name: {
                **patches.summaries[name].attributes(names),
                "n_live": n_live[name],
                "token_layers": float(np.nansum(ran[name][0], dtype=np.float64)),
                "exact_token_layers": float(np.nansum(exact[name][0], dtype=np.float64)),
            }
            for name in patches.sites
        },
    }


def patched_dataset(
    joint: JointPatches,
    stages: Stages,
    coords: Mapping[str, Any],
    arranged: Callable[[np.ndarray], np.ndarray] = np.asarray,
) -> xr.Dataset:
    """Run all sets; return their variables `[metric, pair, *coords]`, see `run_variables`.

    `arranged` gives values `[metric, pair, set]` that form.
    """
    values, references, told = run_variables(joint, stages)
    request = joint.request
    dims = ("metric", "pair", *coords)
    runs = [base_and_source(pair, request.direction)[0] for pair in request.pairs]
    return xr.Dataset(
        {
            **{name: (dims, arranged(x)) for name, x in values.items()},
            "base_metric": (dims[:2], references[0]),
            "source_metric": (dims[:2], references[1]),
        },
        coords={
            **metric_and_pair_coords(request.metrics, request.pairs),
            "base_token": (("pair", "pos"), token_table(request.bridge, runs)),
            **coords,
        },
        attrs={
            **told,
            "direction": request.direction,
            "read": request.read,
            "runner": joint.choice.runner.name,
        },
    )


def _named(patches: Any) -> tuple[list[Any], Any]:
    """Return the coordinate of the sets, and the sets."""
    if isinstance(patches, Mapping):
        if not all(isinstance(name, str) for name in patches):
            raise PlanError(f"patches has the names {[*patches]!r}; name each set by a text")
        return [*patches], [*patches.values()]
    if isinstance(patches, Sequence) and not isinstance(patches, str):
        return [*range(len(patches))], patches
    return [], patches


def _described(sets: Sequence[Any]) -> Any:
    """Return the content of the sets, or of many their digest."""
    told = [[p.identity() for p in ([s] if isinstance(s, Patch) else s)] for s in sets]
    if len(told) <= LISTED:
        return told
    text = json.dumps(told, separators=(",", ":")).encode()
    return {"n": len(told), "sha256": hashlib.sha256(text).hexdigest()}


def settings_of(request: JointRequest) -> dict[str, Any]:
    """Return what decides the numbers besides the model, the pairs and the sets."""
    return {
        "interventions": [intervention_words(x) for x in request.interventions],
        "direction": request.direction,
        "metrics": [metric_words(metric) for metric in request.metrics],
        "read": request.read,
        "compute_dtype": str(request.compute_dtype).removeprefix("torch."),
    }
