"""Ablates each head's z in several ways, with one sweep per ablation.

The base is the clean run. A constant ablation replaces a head's z by one vector, the same at
every position of every prompt: zero, the mean, or the constant that changes predictions least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.heads.optimal import Head, OptimalSettings, Trainer
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.models.offload import device_of
from patchsweep.runners.select import RunnerName
from patchsweep.spec.finite import check_cells, names_of
from patchsweep.spec.interventions import Custom, Intervention, Mean, Resample, Zero
from patchsweep.spec.metrics import METRICS, Metric
from patchsweep.spec.reference import with_reference
from patchsweep.spec.sites import Site
from patchsweep.spec.spec import Positions, SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.api import prepare_runner
from patchsweep.sweeps.exact import Captures
from patchsweep.sweeps.executor import Values

REFERENCE = "resample"  # the ablation with which the others are compared
OPTIMAL = "optimal"
ABLATIONS = (REFERENCE, "mean", "zero", OPTIMAL)
# ablation -> the value that replaces z
MEANING = {
    "resample": "z of the corrupted prompt at the same position",
    "mean": "the head's mean z over every position of every clean prompt",
    "mean_label": "the mean z over the positions that carry the same label",
    "zero": "zeros",
    "optimal": "the constant that minimises KL(original || ablated) on clean prompts",
}
_WAYS: dict[str, Callable[[], Intervention]] = {
    "resample": Resample,
    "mean": partial(Mean, per="all"),
    "mean_label": partial(Mean, per="label"),
    "zero": Zero,
}
LOSS = "kl_base"  # the metric that optimal ablation minimises
PAIRS_AT_ONCE = 16  # pairs captured together when constants run


@dataclass(frozen=True)
class Ask:
    """The checked arguments of a study: model, pairs, ablations, metrics and runner."""

    model: TransformerBridge
    pairs: PromptPairs
    metrics: tuple[Metric, ...]
    ablations: tuple[str, ...]
    positions: Positions
    read: int
    runner: RunnerName
    max_tokens: int | None
    optimal: OptimalSettings | None  # None: no optimal ablation
    reference: PromptPairs | None  # pairs over whose clean prompts means are taken; None: `pairs`

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics, with the loss if constants are trained on it."""
        if self.optimal is None or any(m.name == LOSS for m in self.metrics):
            return self.metrics
        return (*self.metrics, METRICS[LOSS])

    def spec(self, intervention: Intervention) -> SweepSpec:
        """Return the sweep of every head's z."""
        return SweepSpec(
            "z",
            self.measured,
            direction="noising",
            intervention=intervention,
            positions=self.positions,
            read=self.read,
        )


def check_ablations(
    ablations: Sequence[str], positions: Positions, optimal: OptimalSettings | None
) -> tuple[str, ...]:
    """Return the ablations, without `optimal` if it has no settings.

    Raises:
        ConfigError: a name is unknown or repeated, resample is missing, or `optimal` is combined
            with single positions.
    """
    names = tuple(ablations)
    if isinstance(ablations, str) or REFERENCE not in names:
        raise ConfigError(
            f"ablations={ablations!r} must be a list with {REFERENCE} in it, which the others are "
            "compared with"
        )
    for name in names:
        if name not in MEANING:
            raise ConfigError(f"ablation {name!r} is not known; use some of {', '.join(MEANING)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"ablations={list(names)} names one twice; name each once")
    if optimal is None:
        names = tuple(name for name in names if name != OPTIMAL)
    if OPTIMAL in names and positions != "all":
        raise ConfigError(
            "optimal ablation has one constant for all positions of a head; use positions='all', "
            "or leave optimal out of the ablations"
        )
    return names


def prepare(ask: Ask) -> Trainer | None:
    """Check all arguments before any run; return the trainer of constants, or None.

    Raises:
        PatchsweepError: an argument breaks a rule, or no gradient passes through the model.
    """
    make_request(ask.model, ask.pairs, ask.spec(Resample()))
    if "mean_label" in ask.ablations and not any(pair.labels for pair in ask.pairs):
        raise ConfigError("ablation mean_label needs labelled pairs; use mean, or label them")
    for intervention in interventions(ask).values():
        make_request(ask.model, ask.pairs, ask.spec(intervention))
    if ask.optimal is None:
        return None
    return Trainer(ask.model, ask.pairs, ask.read, ask.optimal.prompts)


def ablate(
    ask: Ask,
    trainer: Trainer | None,
    stages: Stages,
    tell: Callable[[str], None],
) -> xr.Dataset:
    """Return `ablated` [ablation, metric, pair, layer(, pos), head], the metric of ablated runs.

    `base_metric` and `source_metric` [metric, pair] are those of the clean and the corrupted run.
    With `optimal` there are `optimal_constant` [layer, head, d_head] and `optimal_loss`
    [training, layer, head], in nats over the training prompts; its `start` is the loss of the
    mean. Both are NaN for heads without a trained constant.
    """
    by_ablation = {}
    for name, intervention in interventions(ask).items():
        tell(f"{name} ablation of every head")
        by_ablation[name] = stages.sweep(
            name, ask.model, ask.pairs, ask.spec(intervention),
            runner=ask.runner, max_tokens=ask.max_tokens,
        )  # fmt: skip
    stages.wait()
    first = by_ablation[REFERENCE]
    values_of = {name: ds["z"].values for name, ds in by_ablation.items()}
    extra: dict[str, Any] = {}
    if trainer is not None and ask.optimal is not None:
        heads = top_heads(first, ask.optimal.heads)
        tell(f"training the constants of {len(heads)} heads")
        constants, loss = _train(ask, trainer, heads, ask.optimal, stages)
        values_of[OPTIMAL] = _run_constants(ask, constants, stages)
        extra = {
            "optimal_constant": (("layer", "head", "d_head"), constants),
            "optimal_loss": (("training", "layer", "head"), loss),
        }
    dims = first["z"].dims  # the same in every sweep
    values = np.stack([values_of[name] for name in ask.ablations])
    ds = first.drop_vars("z").assign(ablated=(("ablation", *dims), values), **extra)
    ds = ds.assign_coords(ablation=np.array(ask.ablations, dtype=object))
    if extra:
        ds = ds.assign_coords(training=np.array(["start", "end"], dtype=object))
    attrs_of = {name: attributes(one) for name, one in by_ablation.items()}
    used = attrs_of[REFERENCE]["provenance"]
    ds.attrs = {
        "runner": used["runner"],
        "runner_reason": used["runner_reason"],
        "plan": {name: of_sweep["plan"]["z"] for name, of_sweep in attrs_of.items()},
        "means": {name: x["means"] for name, x in attrs_of.items() if "means" in x},
    }
    return ds


def top_heads(ds: xr.Dataset, n: int) -> list[Head]:
    """Return the `n` heads with the largest mean |effect| in `ds` on the first metric, in order."""
    effect = (ds["z"] - ds["base_metric"]).isel(metric=0).transpose("pair", "layer", "head")
    strength = np.abs(effect.values).mean(axis=0)
    order = np.argsort(-strength, axis=None, kind="stable")[:n]  # ties go to the earlier head
    return sorted((int(i) // strength.shape[1], int(i) % strength.shape[1]) for i in order)


def interventions(ask: Ask) -> dict[str, Intervention]:
    """Return the intervention of each ablation other than `optimal`.

    Raises:
        ConfigError: there are prompts for means, but no ablation is a mean.
    """
    by_name = {name: _WAYS[name]() for name in ask.ablations if name != OPTIMAL}
    means = [name for name, one in by_name.items() if isinstance(one, Mean)]
    if ask.reference is not None and not means:
        raise ConfigError(
            f"means_from is for the ablations mean and mean_label, got ablations="
            f"{list(ask.ablations)}; leave means_from out"
        )
    for name in means:
        by_name[name] = with_reference(by_name[name], ask.reference, ask.model)
    return by_name


def _train(
    ask: Ask,
    trainer: Trainer,
    heads: Sequence[Head],
    settings: OptimalSettings,
    stages: Stages,
) -> tuple[Values, Values]:
    """Train the constants of `heads` as one shard: a stage of one "pair", which is all of them.

    Return the constants [layer, head, d_head] and their losses [training, layer, head], NaN for
    other heads.
    """
    row = {"pair": 1, "optimal_head": len(heads)}
    shapes = {"start": row, "loss": row, "constant": {**row, "d_head": int(ask.model.cfg.d_head)}}

    def train(_: range) -> Computed:
        trainer.run()
        trained = trainer.train(heads, settings)
        parts = {"start": trained.start, "loss": trained.loss, "constant": trained.values}
        return {name: part.cpu().numpy()[None] for name, part in parts.items()}, None

    chosen = [list(head) for head in heads]
    found = stages.run("training", shapes, 1, train, attrs={"trained": chosen})
    stages.wait()
    start, loss, constant = (found[name].values[0] for name in shapes)
    layer, head = (list(ends) for ends in zip(*heads, strict=True))
    shape = (int(ask.model.cfg.n_layers), int(ask.model.cfg.n_heads))
    constants = np.full((*shape, constant.shape[1]), np.nan, np.float32)
    losses = np.full((2, *shape), np.nan, np.float32)
    constants[layer, head], losses[:, layer, head] = constant, [start, loss]
    return constants, losses


def _run_constants(ask: Ask, constants: Values, stages: Stages) -> Values:
    """Return the metrics [metric, pair, layer, head] with each constant; NaN for other heads."""
    has_constant = np.asarray(np.isfinite(constants).all(axis=-1))
    n_layers, n_heads = has_constant.shape
    table = torch.from_numpy(np.nan_to_num(constants)).to(device_of(ask.model))

    def put_in(site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return table[layer].flatten().to(base).expand_as(base)

    request = make_request(ask.model, ask.pairs, ask.spec(Custom(put_in)))
    (plan,) = request.plans
    dims = {"metric": len(request.metrics), "pair": len(ask.pairs)}
    shapes = {"constants": {**dims, "layer": n_layers, "head": n_heads}}

    @cache
    def captures() -> Captures:
        return Captures(request, prepare_runner(request, ask.runner, ask.max_tokens).runner)

    def run(pairs: range) -> Computed:
        cells = empty(shapes, pairs)
        for captured in captures().of(pairs):
            patches = plan.patches(captured.batch.pairs)
            patches = patches[has_constant[plan.layer_set[patches], plan.unit_set[patches]]]
            runner = captures().runner
            metrics = runner.run(captured.loaded, plan, patches, request.metrics).numpy()
            metrics = check_cells(metrics, plan, patches, request.metrics)
            rows, layers = plan.pair[patches] - pairs.start, plan.layer_set[patches]
            cells["constants"][:, rows, layers, plan.unit_set[patches]] = metrics
        return cells, None

    attrs = {"trained": np.argwhere(has_constant).tolist()}
    names = names_of(request.metrics)
    found = stages.run("constants", shapes, PAIRS_AT_ONCE, run, metrics=names, attrs=attrs)
    stages.wait()
    return found["constants"].values
