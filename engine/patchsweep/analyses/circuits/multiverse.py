"""`multiverse`: one circuit's faithfulness under every combination of how it can be measured.

What a circuit scores depends on choices that papers make in passing (Miller et al., arXiv
2407.08734): what the rest is replaced by and from which prompts, where, node by node or edge by
edge, by removing the rest or by restoring the circuit, and the metric. All combinations run in
packed batches, one for each kind of ablation; metrics share their runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.ablate import run_circuits
from patchsweep.analyses.circuits.edge_batch import (
    EdgeBatch,
    ExactBatches,
    Question,
    ask,
    nodes_of,
    run_batches,
)
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.results import LOW_PRECISION_ROUNDING, ROUNDING
from patchsweep.analyses.circuits.scores import (
    circuit_scores,
    described_scores,
    method_settings,
    score_values,
)
from patchsweep.analyses.circuits.selection import connected, rank_top
from patchsweep.analyses.stages import Computed, Stages
from patchsweep.arguments import one_of, whole_number
from patchsweep.attribution import Method
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from patchsweep.forward.grad import frozen
from patchsweep.models.running import runs_model
from patchsweep.models.weights import tensor_digest
from patchsweep.spec.finite import names_of
from patchsweep.spec.interventions import Direction
from patchsweep.spec.spec import MetricLike, SweepSpec
from patchsweep.sweeps.identity import question_settings
from patchsweep.sweeps.layout import strings

Kind = Literal["resample", "zero", "mean", "mean_all"]
MeanSet = Literal["clean", "corrupted", "both"]
Where = Literal["all", "changed", "read"]
Level = Literal["edges", "nodes"]
# argument -> the options of a choice
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "ablations": get_args(Kind),
    "mean_sets": get_args(MeanSet),
    "directions": get_args(Direction),
    "positions": get_args(Where),
    "levels": get_args(Level),
}
CHOICES = ("ablation", "mean_set", "direction", "positions", "level", "metric")
METRICS = ("logit_diff", "logit", "log_prob", "prob")


@dataclass(frozen=True)
class Setting:
    """What one stage runs: a kind of ablation, the prompts of its means, a direction."""

    ablation: Kind
    mean_set: str  # "" for ablations without means
    direction: Direction

    def __str__(self) -> str:
        return "-".join(filter(None, (self.ablation, self.mean_set, self.direction)))


@runs_model
def multiverse(
    model: TransformerBridge,
    pairs: PromptPairs,
    scores: xr.DataArray | str | Method,
    count: int,
    metrics: Sequence[MetricLike] = METRICS,
    *,
    ablations: Sequence[Kind] = get_args(Kind),
    mean_sets: Sequence[MeanSet] = get_args(MeanSet),
    directions: Sequence[Direction] = get_args(Direction),
    positions: Sequence[Where] = get_args(Where),
    levels: Sequence[Level] = get_args(Level),
    read: int = SweepSpec.read,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Return `faithfulness` [variant, metric] of the circuit of the `count` strongest edges.

    A variant is a combination of the coordinates `ablation`, `mean_set`, `direction`, `positions`
    and `level`. Faithfulness is (m(circuit) - m(nothing)) / (m(everything) - m(nothing)), m a mean
    over the pairs; NaN where ablation moves the metric by no more than rounding. `moves` [choice]
    is how far it moves on average when that choice alone changes (the largest minus the least, all
    else equal), `moves_most` [choice] the largest such move; the attribute `most` names the choice
    with the largest average. `undefined` in the attributes counts the NaN.

    Args:
        scores: of edges, as from `circuit_scores`, or the method of `circuit_scores` that gives
            them, by resampling and the first metric; the circuit holds the largest by size.
        ablations: resample, zero, mean (position by position) and mean_all (over positions).
        mean_sets: the prompts of means: clean, corrupted, or both together.
        directions: `noising` reads the clean prompt and ablates everything outside the circuit;
            `denoising` reads the corrupted one and restores the circuit's values of the clean one,
            which exists for resample alone.
        positions: where ablated values act: `all`, those from the first token that differs between
            the prompts (`changed`), or those that the metric reads (`read`).
        levels: `edges`, or `nodes`: all edges of the nodes that the circuit's edges leave or enter.
        config: config of the command line, kept in the provenance.
        stages: where and how the scores and a stage for each kind of ablation run, see
            `patchsweep.analyses.stages`. Default: in memory.

    Raises:
        PlanError: an option is unknown or named twice, or there are fewer than `count` edges.
        PatchsweepError: another argument breaks a rule, see `circuit`.
    """
    chosen: dict[str, Sequence[str]] = {
        "ablations": ablations,
        "mean_sets": mean_sets,
        "directions": directions,
        "positions": positions,
        "levels": levels,
    }
    for name, given in chosen.items():
        _check(name, given, OPTIONS[name])
    nodes = nodes_of(model)
    whole_number("count", count, least=1, most=nodes.n_edges)
    if isinstance(scores, xr.DataArray):
        score_values(scores, nodes.if_all_parallel, "edges")  # only a run tells the blocks
        ranked_by: dict[str, Any] = {"method": "scores", "scores": described_scores(scores)}
    else:
        ranked_by = {"method": method_settings("edges", scores), "scores": None}
    settings = _settings(ablations, mean_sets, directions)
    sets = {"": None, **_sets(pairs)}
    questions = {
        one: ask(model, pairs, metrics, one.direction, one.ablation, read, sets[one.mean_set])
        for one in settings
    }
    stages = Stages.of(stages)
    first = questions[settings[0]]

    def compute() -> xr.Dataset:
        ranking = scores
        if not isinstance(ranking, xr.DataArray):
            ranking = circuit_scores(
                model, pairs, first.metrics[0], method=ranking, read=read, stages=stages
            )
        return _multiverse(questions, ranking, count, positions, levels, stages)

    identity = {
        **{key: question_settings(first)[key] for key in ("metrics", "read")},
        **{name: list(given) for name, given in chosen.items()},
        **ranked_by,
        "count": count,
    }
    return stages.analysis("multiverse", model, pairs, identity, compute, config)


def _multiverse(
    questions: Mapping[Setting, Question],
    scores: xr.DataArray,
    count: int,
    positions: Sequence[Where],
    levels: Sequence[Level],
    stages: Stages,
) -> xr.Dataset:
    variants: list[tuple[str, ...]] = []
    found = []
    for setting, question in questions.items():
        batches = ExactBatches(question)
        with frozen(question.bridge):  # the first run determines which blocks are parallel
            nodes = batches.nodes
        ranks = rank_top(np.abs(score_values(scores, nodes, "edges")))
        circuit = connected(nodes, ((ranks >= 0) & (ranks < count))[None])[0]
        stage_attrs = {"circuit": tensor_digest(torch.from_numpy(circuit))}
        masks = [_masks(nodes, circuit, level, setting.direction) for level in levels]
        run = _runner(question, dict(zip(levels, masks, strict=True)), positions)
        dims = {"runs": {"run": 3 * len(positions) * len(levels)}}
        runs = run_batches(stages, f"variants-{setting}", batches, dims, run, stage_attrs)
        found.append((runs, question))
        variants += [
            (setting.ablation, setting.mean_set, setting.direction, where, level)
            for where, level in product(positions, levels)
        ]
    stages.wait()
    values = [
        _faithfulness(runs["runs"].values[:, :, 3 * i : 3 * i + 3], question)
        for runs, question in found
        for i in range(len(positions) * len(levels))
    ]
    (question, *_) = questions.values()
    return _dataset(variants, np.array(values), names_of(question.metrics)).assign_attrs(
        method=str(scores.attrs.get("method", "given")),
        count=count,
        n_pairs=len(question.pairs),
        read=question.read,
    )


def _check(name: str, given: Sequence[str], known: tuple[str, ...]) -> None:
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise PlanError(f"{name}={given!r} must be a list of some of {', '.join(known)}")
    for option in given:
        one_of(name, option, known, error=PlanError)
    if len(set(given)) < len(given):
        raise PlanError(f"{name}={list(given)} names an option twice; name each once")


def _settings(
    ablations: Sequence[Kind], mean_sets: Sequence[MeanSet], directions: Sequence[Direction]
) -> list[Setting]:
    found = []
    for direction, ablation in product(directions, ablations):
        if ablation == "resample":
            found.append(Setting(ablation, "", direction))
        elif direction == "noising":
            sets = mean_sets if ablation.startswith("mean") else ("",)
            found += [Setting(ablation, mean_set, direction) for mean_set in sets]
    if not found:
        raise PlanError("directions=['denoising'] runs with the ablation resample alone; add it")
    return found


def _sets(pairs: PromptPairs) -> dict[str, PromptPairs]:
    """Return the prompts of means, as the clean ones of pairs."""
    turned = [
        replace(
            pair,
            clean=pair.corrupted,
            corrupted=pair.clean,
            clean_tokens=pair.corrupted_tokens,
            corrupted_tokens=pair.clean_tokens,
            answer=pair.wrong_answer,
            wrong_answer=pair.answer,
            answer_text=pair.wrong_answer_text,
            wrong_answer_text=pair.answer_text,
        )
        for pair in pairs
    ]
    return {
        "clean": pairs,
        "corrupted": PromptPairs(tuple(turned)),
        "both": PromptPairs((*pairs, *turned)),
    }


def _runner(
    question: Question, masks: Mapping[Level, NDArray[np.bool_]], places: Sequence[Where]
) -> Callable[[EdgeBatch], Computed]:
    """Return what gives `runs` [metric, pair, run]: circuit, nothing, everything of each variant.

    `masks`: what is kept in these three, by level.
    """
    n_runs = 3 * len(places) * len(masks)

    def run(edge_batch: EdgeBatch) -> Computed:
        values = np.empty((len(question.metrics), edge_batch.base.n_pairs, n_runs), np.float32)
        where = torch.stack([_where(edge_batch, place) for place in places])
        at = where.repeat_interleave(3, dim=0)
        for i, (level, kept) in enumerate(masks.items()):
            rows = np.concatenate([kept] * len(places))
            slots = np.arange(n_runs).reshape(len(places), len(masks), 3)[:, i].ravel()
            values[:, :, slots] = run_circuits(edge_batch, level, rows, at).cpu().numpy()
        return edge_batch.computed("runs", values)

    return run


def _masks(
    nodes: Nodes, circuit: NDArray[np.bool_], level: Level, direction: Direction
) -> NDArray[np.bool_]:
    """Return what is kept [run, ...] in the runs of the circuit, of nothing and of everything.

    In a denoising run what is not kept is restored.
    """
    own: NDArray[np.bool_] = circuit
    whole: NDArray[np.bool_] = nodes.possible
    if level == "nodes":
        inside = np.asarray(circuit.any(axis=1)) | nodes.entered(circuit)
        own, whole = inside[1:], np.ones(len(nodes.senders) - 1, dtype=bool)
    if direction == "denoising":
        return np.stack([whole & ~own, whole, np.zeros_like(whole)])
    return np.stack([own, np.zeros_like(whole), whole])


def _where(edge_batch: EdgeBatch, place: Where) -> Bool[Tensor, " pos"]:
    """Return the positions, from the batch's start on, where ablated values act."""
    batch = edge_batch.batch
    at = torch.ones(batch.length, dtype=torch.bool, device=batch.base.device)
    if place == "changed":
        at[: batch.first_difference()] = False
    elif place == "read":
        at[:] = False
        at[list(batch.reads)] = True
    return at[edge_batch.start :]


def _faithfulness(values: NDArray[np.float32], question: Question) -> NDArray[np.float64]:
    """Return [metric] of the runs [metric, pair, (circuit, nothing, everything)]."""
    circuit, nothing, everything = values.mean(axis=1, dtype=np.float64).T
    dtype = next(question.bridge.original_model.parameters()).dtype
    rounding = ROUNDING.get(dtype, LOW_PRECISION_ROUNDING) * np.abs(values).max(axis=(1, 2))
    span = everything - nothing
    defined = np.abs(span) > rounding
    result: NDArray[np.float64] = np.where(
        defined, (circuit - nothing) / np.where(defined, span, 1), np.nan
    )
    return result


def _dataset(
    variants: list[tuple[str, ...]], values: NDArray[np.float64], metrics: list[str]
) -> xr.Dataset:
    cells = {
        (*variant, metric): float(values[i, j])
        for i, variant in enumerate(variants)
        for j, metric in enumerate(metrics)
    }
    moves = np.array([_moves(cells, choice) for choice in range(len(CHOICES))])
    means = moves[:, 0]
    coords: dict[str, Any] = {
        name: ("variant", strings([v[i] for v in variants])) for i, name in enumerate(CHOICES[:-1])
    }
    return xr.Dataset(
        {
            "faithfulness": (("variant", "metric"), values),
            "moves": ("choice", means),
            "moves_most": ("choice", moves[:, 1]),
        },
        coords={**coords, "metric": strings(metrics), "choice": strings(CHOICES)},
        attrs={
            "n_variants": len(cells),
            "undefined": int((~np.isfinite(values)).sum()),
            "most": CHOICES[int(np.nanargmax(means))] if np.isfinite(means).any() else "",
        },
    )


def _moves(cells: Mapping[tuple[str, ...], float], choice: int) -> tuple[float, float]:
    """Return the mean and the largest range of values that differ in one choice alone, or NaN."""
    groups: dict[tuple[str, ...], list[float]] = {}
    # ablations differ in the prompts of their means too, which is a choice of its own
    behind = 2 if CHOICES[choice] == "ablation" else choice + 1
    for key, value in cells.items():
        if np.isfinite(value):
            groups.setdefault((*key[:choice], *key[behind:]), []).append(value)
    ranges = [max(group) - min(group) for group in groups.values() if len(group) > 1]
    return (float(np.mean(ranges)), max(ranges)) if ranges else (np.nan, np.nan)
