"""Directions from data, and dose curves: how a metric follows the length of a direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.joint.patches import patched_dataset, settings_of
from patchsweep.analyses.stages import Stages
from patchsweep.arguments import check_runner, index_sets, number, position_axis, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from patchsweep.models.compute import ComputeDtype
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.select import RunnerName
from patchsweep.spec.batch import make_batches
from patchsweep.spec.directions import Add, PerLayer
from patchsweep.spec.interventions import Direction
from patchsweep.spec.sites import get_sites
from patchsweep.spec.spec import MetricLike, SweepSpec, check_pairs, model_shape
from patchsweep.sweeps.identity import described
from patchsweep.sweeps.joint import JointPatches, joint_request
from patchsweep.sweeps.layout import strings
from patchsweep.sweeps.patches import Patch


@runs_model
@torch.no_grad()
def difference_of_means(
    model: TransformerBridge, pairs: PromptPairs, site: str, *, pos: int | str = -1
) -> dict[int, Tensor]:
    """Return layer -> mean activation of the clean prompts minus that of the corrupted ones.

    Each `[width]`, fp32; of `z` all heads side by side. The mean is over the pairs, at position
    `pos` (a negative one counts from the end) or over the tokens of the label `pos`. Not
    normalised: as `Add`'s direction with coefficient 1 it moves the mean of the corrupted prompts
    to that of the clean ones. Layers at which the two are equal are left out.

    Raises:
        PlanError: the site is an attention pattern, or a pair lacks `pos`.
        PatchsweepError: the model has no such site.
    """
    (chosen,) = get_sites([site])
    if chosen.is_pattern:
        raise PlanError(f"site {site} holds attention patterns, not vectors; use resid_pre, say")
    check_pairs(model, pairs)
    runner = HookedRunner(model, [chosen])
    sums: dict[int, Tensor] = {}
    for batch in make_batches(pairs, range(len(pairs)), "noising", -1, device_of(model)):
        runs = [runner.activations(tokens)[site] for tokens in (batch.base, batch.source)]
        for row, pair in enumerate(batch.pairs):
            span = _span(pairs, pair, pos)
            for layer, (clean, corrupted) in enumerate(zip(*runs, strict=True)):
                change = (clean[row, span] - corrupted[row, span]).double().mean(dim=0)
                sums[layer] = sums.get(layer, torch.zeros_like(change)) + change
    return {layer: (total / len(pairs)).float() for layer, total in sums.items() if total.any()}


def _span(pairs: PromptPairs, number: int, pos: int | str) -> slice:
    pair = pairs[number]
    if isinstance(pos, str):
        if pos not in pair.labels:
            known = ", ".join(pair.labels) or "no labels"
            raise PlanError(f"pos={pos!r} is no label of pair {number}, which has {known}")
        return slice(*pair.labels[pos])
    whole_number("pos", pos, least=-len(pair), most=len(pair) - 1)
    first = pos % len(pair)
    return slice(first, first + 1)


@runs_model
def dose(
    model: TransformerBridge,
    pairs: PromptPairs,
    site: str,
    vector: PerLayer,
    coefficients: Sequence[float],
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    layers: int | Sequence[int] | None = None,
    positions: int | str | Sequence[int | str] = "all",
    controls: int = 0,
    seed: int = 0,
    direction: Direction | None = SweepSpec.direction,
    read: int = SweepSpec.read,
    compute_dtype: ComputeDtype = SweepSpec.compute_dtype,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Add each of `coefficients` times `vector` at every layer and position, one run each.

    `patched` [metric, pair, vector, coefficient, layer, pos] is the raw metric; along `vector`, the
    one given and, as controls, random ones of the same norm in each layer (`control_seed` keeps the
    seeds). An effect that random vectors of that length have as well says nothing about the one
    given.

    Args:
        vector: the direction, as that of `Add`: one for all layers, or by layer.
        layers: layers to add it at, one after the other. Default: all, or those of `vector`.
        positions: positions or labels, one after the other; or "all" for all of them at once.
        controls: number of random vectors.
        seed: the seed of the first of them; the others follow.
        direction: the base run: the clean prompt (`noising`, the default) or the corrupted one.
        stages: as in `run_patches`; others are those of `sweep`.

    Raises:
        PatchsweepError: an argument breaks a rule; nothing has run then.
    """
    check_runner(runner, max_tokens)
    whole_number("controls", controls, least=0)
    whole_number("seed", seed, least=0)
    if isinstance(coefficients, str) or not isinstance(coefficients, Sequence) or not coefficients:
        raise PlanError(f"coefficients={coefficients!r} must be a list of numbers, such as [-1, 1]")
    for coefficient in coefficients:
        number("coefficients", coefficient)
    given = Add(vector)
    vectors = [given, *(given.random_like(seed + i) for i in range(controls))]
    n_layers = model_shape(model).n_layers
    if layers is None:
        at = [*given.direction] if isinstance(given.direction, Mapping) else [*range(n_layers)]
    else:
        at = [layer for (layer,) in index_sets("layers", layers)]
    places = ["all"] if positions == "all" else [*position_axis(positions)]
    interventions = [
        Add(x.direction, float(c), f"{x.name}_{c:g}", x.seed) for x in vectors for c in coefficients
    ]
    sets = [
        Patch(site, layer, pos, intervention=x)
        for x in interventions
        for layer in at
        for pos in places
    ]
    request = joint_request(model, pairs, sets, metrics, direction, read, None, compute_dtype)
    stages = Stages.of(stages)
    seeds = [x.seed for x in vectors[1:]]
    coords = {
        "vector": strings(["given", *(f"random {seed}" for seed in seeds)]),
        "coefficient": np.array(coefficients, np.float64),
        "layer": np.array(at),
        "place": strings([*map(str, places)]),
    }
    shape = [len(values) for values in coords.values()]

    def compute() -> xr.Dataset:
        joint = JointPatches(request, runner, max_tokens)
        ds = patched_dataset(
            joint, stages, coords, lambda found: found.reshape(*found.shape[:2], *shape)
        )
        return ds.assign_coords(control_seed=("vector", [-1, *seeds])).assign_attrs(site=site)

    settings = {
        "site": site,
        "vector": described(given.direction),
        "coefficients": list(map(float, coefficients)),
        "layers": at,
        "positions": places,
        "control_seeds": seeds,
        **settings_of(request),
    }
    return stages.analysis("dose", model, pairs, settings, compute, config)
