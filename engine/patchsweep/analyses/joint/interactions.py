"""`interactions`: the effect of every pair of heads jointly, minus the effects of the two alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.joint.patches import joint_patches, patched_dataset, settings_of
from patchsweep.analyses.stages import Stages
from patchsweep.analyses.thresholds import tolerance_words
from patchsweep.arguments import check_runner, head_places, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from patchsweep.models.compute import ComputeDtype
from patchsweep.models.running import runs_model
from patchsweep.runners.select import RunnerName
from patchsweep.spec.interventions import Direction, Intervention, ValueFn
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import MetricLike, SweepSpec, model_shape
from patchsweep.sweeps.joint import joint_request
from patchsweep.sweeps.joint_adaptive import check_joint_tolerance
from patchsweep.sweeps.layout import strings
from patchsweep.sweeps.patches import Patch

Head = tuple[int, int]  # layer, head


@runs_model
def interactions(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    heads: Sequence[Head | str] | None = None,
    direction: Direction | None = SweepSpec.direction,
    intervention: str | Intervention | float | Tensor | ValueFn = SweepSpec.intervention,
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
    """Patch every two heads jointly, `z` at all positions.

    `interaction` [metric, pair, head, other] is the effect of both minus the sum of the effects of
    each alone, in the metric's unit; symmetric, and zero on the diagonal. Where each of two heads
    does the work of the other when that is missing (backups, self-repair), neither has an effect
    alone and both have one together: the interaction then has the sign of the joint effect. Where
    one acts through the other, the effect of both is less than the sum.

    `patched` [metric, pair, head, other] is the raw metric with both patched, on its diagonal with
    the one alone; `base_metric` and `source_metric` are those of the unpatched runs. Heads are
    named such as a3.h2, head 2 of layer 3.

    Args:
        heads: heads to combine: (layer, head), of which a negative layer counts from the end, or
            names such as `a23.h3`. Default: all heads of the model.
        tolerance: as in `run_patches`, the largest error of `patched` of two heads, and so of
            `interaction`: each head alone runs exactly. The upper head's patch is run, where it is
            noticeable, on the run with the lower head patched, and taken to first order with that
            run's gradient elsewhere. Default: all pairs run exactly.
        stages: as in `run_patches`; others are those of `sweep`.

    Raises:
        PlanError: `heads` has fewer than two, names one twice or one that there is not.
        PatchsweepError: another argument breaks a rule; nothing has run then.
    """
    check_runner(runner, max_tokens, cache_budget)
    chosen = _heads(model, heads)
    alone = [Patch("z", layer, head=head, intervention=intervention) for layer, head in chosen]
    first, second = np.triu_indices(len(chosen), k=1)
    both = [[alone[i], alone[j]] for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    request = joint_request(
        model, pairs, [*alone, *both], metrics, direction, read, means_from, compute_dtype
    )
    check_joint_tolerance(request, tolerance, runner)
    stages = Stages.of(stages)
    n = len(chosen)
    names = strings([f"a{layer}.h{head}" for layer, head in chosen])

    def square(found: np.ndarray) -> np.ndarray:
        values = np.empty((*found.shape[:2], n, n), np.float32)
        values[..., np.arange(n), np.arange(n)] = found[..., :n]
        values[..., first, second] = values[..., second, first] = found[..., n:]
        return values

    def compute() -> xr.Dataset:
        joint = joint_patches(request, runner, max_tokens, cache_budget, tolerance, n_exact=n)
        ds = patched_dataset(joint, stages, {"head": names, "other": names}, square)
        return ds.assign(interaction=interaction_of(ds))

    settings = {
        "heads": [list(head) for head in chosen],
        **settings_of(request),
        **tolerance_words(tolerance),
    }
    return stages.analysis("interactions", model, pairs, settings, compute, config)


def interaction_of(ds: xr.Dataset) -> xr.DataArray:
    """Return effect of both - sum of the effects of each alone; zero on the diagonal."""
    effect = (ds["patched"] - ds["base_metric"]).transpose(*ds["patched"].dims)
    alone = np.diagonal(effect.values, axis1=-2, axis2=-1)
    change = effect.values - alone[..., :, None] - alone[..., None, :]
    index = np.arange(change.shape[-1])
    change[..., index, index] = 0
    return effect.copy(data=change).rename("interaction")


@dataclass(frozen=True)
class Interaction:
    """Two heads and what they do together; effects in the metric's unit, means over pairs."""

    head: str
    other: str
    interaction: float  # both - alone - other_alone
    both: float
    alone: float
    other_alone: float


def largest_interactions(
    ds: xr.Dataset, metric: str | None = None, n: int = 10
) -> list[Interaction]:
    """Return the `n` pairs of heads with the largest |interaction|, means over prompt pairs.

    `metric` defaults to the first.
    """
    whole_number("n", n, least=1)
    name = str(ds["metric"].values[0]) if metric is None else metric
    one = ds.sel(metric=name)
    matrix = one["interaction"].mean("pair").values
    effect = (one["patched"] - one["base_metric"]).mean("pair").transpose("head", "other").values
    first, second = np.triu_indices(len(matrix), k=1)
    order = np.argsort(-np.abs(matrix[first, second]), kind="stable")[:n]
    names = ds["head"].values
    return [
        Interaction(
            head=str(names[i]),
            other=str(names[j]),
            interaction=float(matrix[i, j]),
            both=float(effect[i, j]),
            alone=float(effect[i, i]),
            other_alone=float(effect[j, j]),
        )
        for i, j in zip(first[order].tolist(), second[order].tolist(), strict=True)
    ]


def _heads(model: TransformerBridge, heads: Any) -> list[Head]:
    """Return the heads to combine, in order of layers."""
    shape = model_shape(model)
    if heads is None:
        return [*itertools.product(range(shape.n_layers), range(shape.n_heads))]
    if isinstance(heads, str) or not isinstance(heads, Sequence):
        raise PlanError(f"heads={heads!r} must be a list of heads, such as [(9, 6), 'a9.h9']")
    chosen = sorted(head_places(heads, shape.n_layers, shape.n_heads))
    if len(chosen) < 2:
        raise PlanError(f"heads={[*heads]!r} must name at least two heads")
    return chosen
