"""Each head's z ablated in every way asked, side by side: one sweep for each ablation.

The base is the clean run. A constant ablation puts one vector in place of a head's z, the same at
every position of every prompt: zero, the mean, or the one that changes predictions least.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.heads.optimal import Constants, Head, OptimalSettings, Trainer
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.runners.select import RunnerName
from patchsweep.spec.finite import check_cells
from patchsweep.spec.interventions import Custom, Intervention, Mean, Resample, Zero
from patchsweep.spec.metrics import METRICS, Metric
from patchsweep.spec.reference import with_reference
from patchsweep.spec.sites import Site
from patchsweep.spec.spec import Positions, Request, SweepSpec, make_request
from patchsweep.store.attributes import attributes, flat_attributes
from patchsweep.sweeps.api import prepare_runner, sweep
from patchsweep.sweeps.exact import Captures
from patchsweep.sweeps.executor import Progress, Values

REFERENCE = "resample"  # what the others are compared with
OPTIMAL = "optimal"
ABLATIONS = (REFERENCE, "mean", "zero", OPTIMAL)
# ablation -> what takes the place of z
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
PAIRS_AT_ONCE = 16  # captured together when chosen cells are run


@dataclass(frozen=True)
class Ask:
    """What is ablated, and how it is measured; checked."""

    model: TransformerBridge
    pairs: PromptPairs
    metrics: tuple[Metric, ...]
    ablations: tuple[str, ...]
    positions: Positions
    read: int
    runner: RunnerName
    max_tokens: int | None
    optimal: OptimalSettings | None
    reference: PromptPairs | None  # whose clean prompts means are taken over; None: `pairs`

    @property
    def measured(self) -> tuple[Metric, ...]:
        """The metrics, and the loss where constants are trained on it."""
        if OPTIMAL not in self.ablations or any(m.name == LOSS for m in self.metrics):
            return self.metrics
        return (*self.metrics, METRICS[LOSS])


def check_ablations(
    ablations: Sequence[str], positions: Positions, optimal: OptimalSettings | None
) -> tuple[str, ...]:
    """The ablations, without `optimal` where there are no settings for it.

    Raises:
        ConfigError: a name is unknown, named twice, or resample is not among them.
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
    """What trains constants, if they are asked for; all that can be checked is checked here.

    Raises:
        PatchsweepError: an argument breaks a rule, or the model takes no gradients.
    """
    _request(ask, Resample())
    if "mean_label" in ask.ablations and not any(pair.labels for pair in ask.pairs):
        raise ConfigError("ablation mean_label needs labelled pairs; use mean, or label them")
    for intervention in interventions(ask).values():
        _request(ask, intervention)
    if OPTIMAL not in ask.ablations:
        return None
    assert ask.optimal is not None
    return Trainer(ask.model, ask.pairs, ask.read, ask.optimal.prompts)


def ablate(
    ask: Ask,
    trainer: Trainer | None,
    progress: Progress | None,
    tell: Callable[[str], None],
) -> xr.Dataset:
    """`ablated` [ablation, metric, pair, layer(, pos), head]: the raw metric of every ablated run.

    `base_metric` and `source_metric` [metric, pair] are the clean and the corrupted run. With
    `optimal` there are `optimal_constant` [layer, head, d_head] and `optimal_loss`
    [training, layer, head], nats over the training prompts, `start` being the mean's; NaN for
    heads that were not chosen.
    """
    swept = {}
    for name, intervention in interventions(ask).items():
        tell(f"{name} ablation of every head")
        swept[name] = _sweep(ask, intervention, progress)
    first = swept[REFERENCE]
    found = {name: ds["z"].values for name, ds in swept.items()}
    extra: dict[str, Any] = {}
    if trainer is not None:
        assert ask.optimal is not None
        heads = foremost(first, ask.optimal.heads)
        tell(f"training the constants of {len(heads)} heads")
        trainer.run()
        constants = trainer.train(heads, ask.optimal)
        found[OPTIMAL] = _run_constants(ask, constants)
        extra = _constants(ask, constants)
    dims = first["z"].dims  # the same in every sweep
    values = np.stack([found[name] for name in ask.ablations])
    ds = first.drop_vars("z").assign(ablated=(("ablation", *dims), values), **extra)
    ds = ds.assign_coords(ablation=np.array(ask.ablations, dtype=object))
    if extra:
        ds = ds.assign_coords(training=np.array(["start", "end"], dtype=object))
    used = attributes(first)["provenance"]
    ds.attrs = flat_attributes(
        {
            "runner": used["runner"],
            "runner_reason": used["runner_reason"],
            "plan": {name: attributes(one)["plan"]["z"] for name, one in swept.items()},
            "means": {
                name: told["means"]
                for name, told in ((name, attributes(one)) for name, one in swept.items())
                if "means" in told
            },
        }
    )
    return ds


def foremost(ds: xr.Dataset, n: int) -> list[Head]:
    """The `n` heads whose sweep in `ds` has the largest mean |effect| on the first metric."""
    effect = (ds["z"] - ds["base_metric"]).isel(metric=0).transpose("pair", "layer", "head")
    strength = np.abs(effect.values).mean(axis=0)
    order = np.argsort(-strength, axis=None, kind="stable")[:n]  # ties go to the earlier head
    return sorted((int(i) // strength.shape[1], int(i) % strength.shape[1]) for i in order)


def interventions(ask: Ask) -> dict[str, Intervention]:
    """What each ablation but `optimal` puts in place of z.

    Raises:
        ConfigError: there are prompts for means, and none of the ablations is a mean.
    """
    ways: dict[str, Callable[[], Intervention]] = {
        "resample": Resample,
        "mean": partial(Mean, per="all"),
        "mean_label": partial(Mean, per="label"),
        "zero": Zero,
    }
    found = {name: ways[name]() for name in ask.ablations if name != OPTIMAL}
    means = [name for name, one in found.items() if isinstance(one, Mean)]
    if ask.reference is not None and not means:
        raise ConfigError(
            f"means_from is for the ablations mean and mean_label, got ablations="
            f"{list(ask.ablations)}; leave means_from out"
        )
    for name in means:
        found[name] = with_reference(found[name], ask.reference, ask.model)
    return found


def _sweep(ask: Ask, intervention: Intervention, progress: Progress | None) -> xr.Dataset:
    return sweep(
        ask.model,
        ask.pairs,
        ["z"],
        ask.measured,
        direction="noising",
        intervention=intervention,
        positions=ask.positions,
        read=ask.read,
        runner=ask.runner,
        max_tokens=ask.max_tokens,
        progress=progress,
    )


def _request(ask: Ask, intervention: Intervention) -> Request:
    return make_request(
        ask.model,
        ask.pairs,
        SweepSpec(
            "z",
            ask.measured,
            direction="noising",
            intervention=intervention,
            positions=ask.positions,
            read=ask.read,
        ),
    )


def _run_constants(ask: Ask, constants: Constants) -> Values:
    """[metric, pair, layer, head] the metrics with each constant in place, NaN for other heads."""
    model = ask.model
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    d_head = constants.values.shape[1]
    table = torch.zeros(n_layers, n_heads, d_head, device=constants.values.device)
    chosen = np.zeros((n_layers, n_heads), bool)
    for (layer, head), value in zip(constants.heads, constants.values, strict=True):
        table[layer, head], chosen[layer, head] = value, True

    def put_in(site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return table[layer].flatten().to(base).expand_as(base)

    request = _request(ask, Custom(put_in))
    runner = prepare_runner(request, ask.runner, ask.max_tokens).runner
    captures = Captures(request, runner)
    (plan,) = request.plans
    values = np.full((len(request.metrics), len(ask.pairs), n_layers, n_heads), np.nan, np.float32)
    for start in range(0, len(ask.pairs), PAIRS_AT_ONCE):
        for captured in captures.of(range(start, min(start + PAIRS_AT_ONCE, len(ask.pairs)))):
            mine = plan.patches(captured.batch.pairs)
            mine = mine[chosen[plan.layer_set[mine], plan.unit_set[mine]]]
            run = runner.run(captured.loaded, plan, mine, request.metrics).numpy()
            run = check_cells(run, plan, mine, request.metrics)
            values[:, plan.pair[mine], plan.layer_set[mine], plan.unit_set[mine]] = run
    return values


def _constants(ask: Ask, constants: Constants) -> dict[str, Any]:
    """Variables that say what was trained."""
    shape = (int(ask.model.cfg.n_layers), int(ask.model.cfg.n_heads))
    values = np.full((*shape, constants.values.shape[1]), np.nan, np.float32)
    loss = np.full((2, *shape), np.nan, np.float32)
    layer, head = (list(ends) for ends in zip(*constants.heads, strict=True))
    values[layer, head] = constants.values.cpu().numpy()
    loss[:, layer, head] = torch.stack([constants.start, constants.loss]).cpu().numpy()
    return {
        "optimal_constant": (("layer", "head", "d_head"), values),
        "optimal_loss": (("training", "layer", "head"), loss),
    }
