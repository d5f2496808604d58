"""`study`: ablates every head in several ways, classes heads and compares the ablations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.heads.ablations import (
    ABLATIONS,
    MEANING,
    OPTIMAL,
    Ask,
    ablate,
    check_ablations,
    interventions,
    prepare,
)
from patchsweep.analyses.heads.classes import (
    LABELS,
    ON_TASK,
    PLACES,
    Behaviour,
    Thresholds,
    detected_classes,
    has_labels,
    member_table,
    own_classes,
    own_masks,
    task_classes,
)
from patchsweep.analyses.heads.findings import disagreement
from patchsweep.analyses.heads.optimal import Head, OptimalSettings
from patchsweep.analyses.heads.scores import detect_heads
from patchsweep.analyses.stages import Stages
from patchsweep.arguments import check_config, check_runner, position_axis
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, MethodError
from patchsweep.models.running import runs_model
from patchsweep.runners.select import RunnerName
from patchsweep.spec.metrics import get_metrics
from patchsweep.spec.reference import MeansFrom, load_reference
from patchsweep.spec.spec import MetricLike, Positions, SweepSpec, model_shape
from patchsweep.sweeps.identity import intervention_words, metric_words
from patchsweep.sweeps.layout import analysis_attrs

log = logging.getLogger("patchsweep")

KIND = "heads"
TRAINED = OptimalSettings()
USUAL = Thresholds()


@runs_model
def study(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    ablations: Sequence[str] = ABLATIONS,
    positions: Positions = "all",
    optimal: OptimalSettings | None = TRAINED,
    thresholds: Thresholds = USUAL,
    classes: Mapping[str, Sequence[Any]] | None = None,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
    stage: Callable[[str], None] | None = None,
) -> xr.Dataset:
    """Return the metrics of every ablated head, the heads' classes, and how ablations disagree.

    `ablated` [ablation, metric, pair, layer, head] is the raw metric of the clean run with one
    head's z replaced; `base_metric` and `source_metric` [metric, pair] are those of the clean and
    the corrupted run. `member` [head_class, layer, head] holds the classes. They follow from
    `detected` [pattern, layer, head] and, on tasks with the labels IO, S2 and end, from
    `attention`, `direct`, `direct_without_movers` and `through_queries` (see
    `analyses.heads.classes`). `disagreement`, `rank_correlation`, `mean_effect` [metric, ablation,
    table_class] and `n_heads` compare each ablation with resample (see `analyses.heads.findings`).

    Args:
        ablations: some of `resample` (required, as the reference), `mean` (one vector per head,
            over every position of every clean prompt), `mean_label`, `zero`, `optimal`.
        positions: `"all"` replaces z at every position at once; indices or labels patch each
            position separately and add a `pos` dim. Not with optimal.
        optimal: settings of training; None leaves optimal ablation out. Optimal ablation adds the
            metric `kl_base`, which it minimises, for all ablations.
        thresholds: minimal scores for membership in a class.
        classes: classes of your own beside those, name to heads: `{"mine": [(9, 9), "a10.h0"]}`.
        read, means_from, runner, max_tokens: as in `patchsweep.sweep`. Optimal constants
            always start from the mean over `pairs`.
        config: config of the command line, kept in the provenance.
        stages: where and how the ablations and the training run, see
            `patchsweep.analyses.stages`. Default: in memory.
        stage: called with a description of each step as it begins.

    Raises:
        PatchsweepError: an argument breaks a rule; raised before any forward pass.
    """
    if not isinstance(optimal, OptimalSettings | None):
        raise ConfigError(f"optimal={optimal!r} must be OptimalSettings(...), or None")
    if not isinstance(thresholds, Thresholds):
        raise ConfigError(f"thresholds={thresholds!r} must be Thresholds(...)")
    own = own_classes(classes, model_shape(model))
    check_config(config)
    check_runner(runner, max_tokens)
    if positions is not None and not isinstance(positions, str):
        positions = position_axis(positions)
    names = check_ablations(ablations, positions, optimal)
    ask = Ask(
        model=model,
        pairs=pairs,
        metrics=get_metrics(metrics),
        ablations=names,
        positions=positions,
        read=read,
        runner=runner,
        max_tokens=max_tokens,
        optimal=optimal if OPTIMAL in names else None,
        reference=load_reference(means_from, model),
    )
    trainer = prepare(ask)
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        tell = stage or (lambda words: None)
        tell("attention on repeated words")
        scores = detect_heads(model)  # before the sweeps, since it may refuse the model
        ds = ablate(ask, trainer, stages, tell)
        masks = detected_classes(scores, thresholds)
        measured, reason = xr.Dataset(), ""
        if has_labels(pairs):
            try:
                behaviour = Behaviour(model, pairs, read)
            except MethodError as error:
                reason = str(error)
            else:
                tell("paths to the logits and to the name movers' queries")
                task_masks, measured = task_classes(behaviour, thresholds)
                masks |= task_masks
                measured = measured.assign_coords(place=np.array(PLACES, dtype=object))
        else:
            reason = f"not every pair has the labels {', '.join(LABELS)}"
            log.warning("no %s heads are told: %s", ", ".join(ON_TASK), reason)
        masks |= own_masks(own, scores)
        ds = ds.assign(detected=scores, member=member_table(masks))
        ds = ds.assign({str(name): values for name, values in measured.data_vars.items()})
        ds = ds.merge(disagreement(ds))
        return ds.assign_attrs(task_classes=reason or "measured", **measured.attrs)

    return stages.results(model, lambda: _attrs(ask, thresholds, own, config), compute)


def _attrs(
    ask: Ask,
    thresholds: Thresholds,
    own: Mapping[str, Sequence[Head]],
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the attributes that are known before any run: identity, provenance and settings."""
    positions = ask.positions
    if not isinstance(positions, str):
        positions = [] if positions is None else [*position_axis(positions)]
    more = {
        "positions": positions,
        "ablations": {name: MEANING[name] for name in ask.ablations},
        "optimal": asdict(ask.optimal) if ask.optimal else None,
        "thresholds": asdict(thresholds),
    }
    if own:  # a study without any has the identity that it always had
        more["classes"] = {name: [list(head) for head in heads] for name, heads in own.items()}
    settings = {
        "metrics": [metric_words(metric) for metric in ask.metrics],
        "read": ask.read,
        **more,
        "interventions": {
            name: intervention_words(one) for name, one in interventions(ask).items()
        },
        "runner": ask.runner,
        "max_tokens": ask.max_tokens,
    }
    return {
        **analysis_attrs(KIND, ask.model, ask.pairs, settings, config),
        "method": "exact",
        "direction": "noising",
        **more,
    }
