"""`acdc`: prunes a model's edges one by one until only those that matter are left.

The plain loop tries one edge after the other, and each trial depends on the ones before. Here a
batch holds a chain of trials as they would follow from guessed decisions; the first decision that
was guessed wrongly ends what counts of the chain, and the rest is run again. So every decision is
that of the loop, on the same circuit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.ablate import run_circuits
from patchsweep.analyses.circuits.edge_batch import (
    EdgeBatch,
    ExactBatches,
    Question,
    ablation_settings,
    ask,
)
from patchsweep.analyses.circuits.exact import RUNS, dead_edges
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.results import node_coords
from patchsweep.analyses.circuits.selection import connected, reaching
from patchsweep.analyses.circuits.subgraph import Kept, Masks, SparseRuns, runs_of
from patchsweep.analyses.stages import Computed, Stages
from patchsweep.arguments import number, true_or_false
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError
from patchsweep.forward.grad import frozen
from patchsweep.models.running import runs_model
from patchsweep.spec.interventions import Intervention, ValueFn
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import MetricLike, SweepSpec
from patchsweep.sweeps.layout import strings

THRESHOLDS = (0.01, 0.03, 0.1)
_NUMBERS = {
    "distance": "mean over pairs of |metric(circuit) - metric(model)|",
    "n_candidates": "edges that were tried",
    "n_dead": "edges removed without a run: no metric depends on them",
    "n_runs": "circuits that were run",
}
# most that the metric of the model taken apart may differ from the model's
_APART = 1e-3
FIRST_ROWS = 32  # trials of the first chain of a reader; doubled while guesses are right


@runs_model
def acdc(
    model: TransformerBridge,
    pairs: PromptPairs,
    metric: MetricLike = "kl_base",
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    ablation: str | Intervention | float | torch.Tensor | ValueFn = "resample",
    positions: bool = False,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Prune the edges of a model greedily; return the circuits that are left, by threshold.

    ACDC (arXiv 2304.14997) with exact runs: the model reads the clean prompt, and a removed edge
    carries its sender's ablated write. From the logits down, edges into each reader are tried from
    the latest sender to the earliest. An edge is removed if that adds less than the threshold to
    the distance from the model, the mean over pairs of |metric(circuit) - metric(model)|.

    `kept` [threshold, sender, reader(, pos)] says which edges are left, `change` what their removal
    would add or added (NaN: dead, removed without a run), in the metric's unit. By threshold
    `n_edges`, `n_connected` (on a way from embed to the logits), `distance`, `n_candidates`,
    `n_dead`, `n_runs` (runs of circuits) and `circuit_metric` [threshold, pair]; `base_metric`,
    `source_metric` [pair].

    Args:
        metric: one metric; `kl_base` is the divergence from the model's own prediction.
        thresholds: each one is a run of its own, in the metric's unit.
        ablation: resample, mean or zero, or an intervention.
        positions: prune edges at single positions; for pairs of one length.
        means_from: as in `patchsweep.sweep`.
        config: config of the command line, kept in the provenance.
        stages: where and how the stage "acdc" runs, one shard for each threshold.

    Raises:
        PlanError: a threshold is not above 0 or given twice, or positions are asked for pairs of
            several lengths.
        MethodError: the model's blocks cannot be split at the residual stream, or positions are
            asked of a model with a norm after attention.
        PatchsweepError: another argument breaks a rule.
    """
    question = ask(model, pairs, metric, "noising", ablation, read, means_from)
    levels = _levels(thresholds)
    true_or_false("positions", positions)
    if len(question.metrics) != 1:
        raise PlanError("acdc prunes by one metric; give one")
    if positions and len({len(pair) for pair in pairs}) > 1:
        raise PlanError(
            "positions=True needs pairs of one length, where a position means the same in all; "
            "give such pairs, or leave positions out"
        )
    stages = Stages.of(stages)
    settings = {
        **ablation_settings(question),
        "thresholds": list(levels),
        "positions": positions,
    }
    return stages.analysis(
        "acdc", model, pairs, settings, lambda: _acdc(question, levels, positions, stages), config
    )


def _levels(thresholds: Sequence[float]) -> tuple[float, ...]:
    if isinstance(thresholds, str) or not isinstance(thresholds, Sequence) or not thresholds:
        raise PlanError(f"thresholds={thresholds!r} must be a list, such as [0.01, 0.1]")
    for level in thresholds:
        number("threshold", level)
        if not level > 0:
            raise PlanError(
                f"threshold {level} must be above 0: at 0 rounding decides; use 0.01, say"
            )
    if len(set(thresholds)) < len(thresholds):
        raise PlanError(f"thresholds={list(thresholds)} name one twice; name each once")
    return tuple(float(level) for level in thresholds)


def _acdc(
    question: Question, levels: Sequence[float], positions: bool, stages: Stages
) -> xr.Dataset:
    batches = ExactBatches(question)
    with frozen(question.bridge):  # the first run determines which blocks are parallel
        nodes = batches.nodes
    n_pairs = len(question.pairs)
    width = max(len(pair) for pair in question.pairs) if positions else 1
    # all pairs together make one decision, so that they are one block
    one = {"pair": 1, "layer": len(levels)}
    edges = {"sender": len(nodes.senders), "reader": len(nodes.readers), "pos": width}
    shapes = {
        "kept": {**one, **edges},
        "change": {**one, **edges},
        "numbers": {**one, "number": len(_NUMBERS)},
        "metrics": {**one, "run": 3, "each": n_pairs},
    }

    def compute(_: range, level: int) -> Computed:
        with frozen(question.bridge):
            all_batches = list(batches.of(range(n_pairs)))
            found, metrics = _pruned(all_batches, nodes, levels[level], positions, width)
        values = {
            "kept": found.kept,
            "change": found.changes,
            "numbers": np.array([getattr(found, name) for name in _NUMBERS]),
            "metrics": metrics,
        }
        return {name: x[None, None].astype(np.float32) for name, x in values.items()}, None

    found = stages.run_by_layer(
        "acdc",
        shapes,
        1,
        compute,
        lambda _: nodes.n_edges * nodes.n_layers * n_pairs,
        metrics=[metric.name for metric in question.metrics],
    )
    stages.wait()
    return _dataset(question, nodes, levels, positions, found)


def _pruned(
    batches: Sequence[EdgeBatch], nodes: Nodes, threshold: float, positions: bool, width: int
) -> tuple[Pruning, NDArray[np.float32]]:
    """Return the circuit and metrics [circuit, base or source run, pair]."""
    runs = [runs_of(edge_batch) for edge_batch in batches]
    if positions and not all(isinstance(x, SparseRuns) for x in runs):
        raise MethodError(
            "positions=True needs heads that write into the stream one by one, and a norm follows "
            "this model's attention; leave positions out"
        )
    live = np.zeros((len(nodes.senders), len(nodes.readers), width), dtype=bool)
    at = np.argwhere(nodes.possible)
    edges = nodes.edges_at(at.T)
    ends = np.empty((2, sum(edge_batch.base.n_pairs for edge_batch in batches)), np.float32)
    for edge_batch in batches:
        writes = edge_batch.writes()
        for pos in range(width):
            chosen = [replace(edge, pos=pos) for edge in edges] if positions else edges
            codes = dead_edges(edge_batch, chosen, writes)
            live[(*at.T, pos)] |= (codes == RUNS).any(axis=0)
        ends[:, list(edge_batch.batch.pairs)] = [
            x[0].cpu().numpy() for x in edge_batch.references()
        ]

    def metrics(kept: Kept, reader: int, masks: Masks) -> NDArray[np.float32]:
        values = np.empty((ends.shape[1], len(masks)), np.float32)
        for edge_batch, run in zip(batches, runs, strict=True):
            values[list(edge_batch.batch.pairs)] = run.run(kept, reader, masks)[0].cpu().numpy()
        return values

    def distance(kept: Kept, reader: int, masks: Masks) -> NDArray[np.float64]:
        away = np.abs(metrics(kept, reader, masks).astype(np.float64) - ends[0][:, None])
        return np.asarray(away.mean(axis=0))

    def commit(kept: Kept, reader: int) -> None:
        for run in runs:
            run.commit(kept, reader)

    def most_rows(kept: Kept, reader: int) -> int:
        return min(run.most_rows(kept, reader) for run in runs)

    found = prune(nodes, threshold, live, distance, commit, most_rows)
    last = metrics(found.kept, 0, found.kept[None, :, 0])[:, 0]
    if not positions:
        _check(batches, found.kept[..., 0], last, ends[0])
    return found, np.stack([last, *ends])


def _check(
    batches: Sequence[EdgeBatch],
    kept: NDArray[np.bool_],
    circuit: NDArray[np.float32],
    base: NDArray[np.float32],
) -> None:
    """Raise unless the whole model and the circuit, with every node run, give these metrics.

    Raises:
        MethodError: they differ by more than rounding.
    """
    for edge_batch in batches:
        chosen = list(edge_batch.batch.pairs)
        both = np.stack([edge_batch.nodes.possible, kept])
        found = run_circuits(edge_batch, "edges", both)[0].cpu().numpy()
        known = np.stack([base[chosen], circuit[chosen]], axis=1)
        wide = edge_batch.base.resid[0].dtype in (torch.float32, torch.float64)
        allowed = (_APART if wide else 0.1) * max(1.0, float(np.abs(known).max()))
        worst = float(np.abs(found - known).max())
        if not worst <= allowed:
            raise MethodError(
                f"the model taken apart differs from the model by {worst:.2g}: something else than "
                "heads, MLPs and the logits reads or writes its residual stream; sweep its sites "
                "instead"
            )


def _dataset(
    question: Question,
    nodes: Nodes,
    levels: Sequence[float],
    positions: bool,
    found: xr.Dataset,
) -> xr.Dataset:
    kept = found["kept"].values[0] > 0.5
    change = found["change"].values[0]
    on_a_way = connected(nodes, kept.any(axis=-1)).sum(axis=(1, 2))
    dims: tuple[str, ...] = ("threshold", "sender", "reader", "pos")
    if not positions:
        kept, change, dims = kept[..., 0], change[..., 0], dims[:3]
    circuit, base, source = found["metrics"].values[0].transpose(1, 0, 2)
    by = ("threshold",)
    counts = {
        name: (by, values if name == "distance" else values.astype(np.int64), {"long_name": text})
        for (name, text), values in zip(_NUMBERS.items(), found["numbers"].values[0].T, strict=True)
    }
    (metric,) = question.metrics
    return xr.Dataset(
        {
            "kept": (dims, kept, {"long_name": "whether the edge is left"}),
            "change": (dims, change, {"long_name": "distance that its removal adds"}),
            "n_edges": (by, kept.sum(axis=tuple(range(1, kept.ndim)))),
            "n_connected": (by, on_a_way, {"long_name": "edges on a way from embed to the logits"}),
            **counts,
            "circuit_metric": (("threshold", "pair"), circuit),
            "base_metric": (("pair",), base[0]),
            "source_metric": (("pair",), source[0]),
        },
        coords={
            "threshold": np.array(levels),
            "pair": np.arange(len(question.pairs)),
            "answer": ("pair", strings([pair.answer_text for pair in question.pairs])),
            **node_coords(nodes),
        },
        attrs={
            "metric": metric.name,
            "metric_unit": metric.unit,
            "positions": positions,
            "ablation": question.intervention.name,
            **question.means_attrs(),
            "read": question.read,
            "n_heads": nodes.n_heads,
            "n_kv_heads": nodes.n_kv_heads,
        },
    )


@dataclass
class Pruning:
    """A circuit after pruning."""

    kept: Kept
    changes: NDArray[np.float32]  # [sender, reader, pos] distance that a removal adds; NaN: not run
    distance: float  # of the circuit from the model
    n_candidates: int  # edges that were tried, dead ones too
    n_dead: int  # removed without a run: nothing that is read depends on them
    n_runs: int  # circuits that were run


def prune(
    nodes: Nodes,
    threshold: float,
    live: Kept,
    run: Callable[[Kept, int, Masks], NDArray[np.float64]],
    commit: Callable[[Kept, int], None],
    most_rows: Callable[[Kept, int], int],
) -> Pruning:
    """Remove edges whose removal adds less than `threshold` to the distance, from the logits down.

    Pure: `run` tells how far circuits are from the model.
    Readers go from the last to the first, of each the senders likewise, and then positions. `live`:
    edges [sender, reader, pos] that may change anything. `run` returns the distance of each row of
    masks of one reader; `commit` learns the edges that a reader is left with.
    """
    kept = np.broadcast_to(nodes.possible[:, :, None], live.shape).copy()
    result = Pruning(kept, np.full(kept.shape, np.nan, np.float32), 0.0, 0, 0, 0)
    for reader in reversed(range(len(nodes.readers))):
        before = kept[:, reader].copy()
        result.n_candidates += int(before.sum())
        tried = live[:, reader] & before & reaching(nodes, np.asarray(kept.any(axis=-1)))[reader]
        result.n_dead += int((before & ~tried).sum())
        kept[:, reader] &= tried
        candidates = np.argwhere(tried)[::-1]
        if not len(candidates):
            continue
        chain = _Chain(result, reader, candidates, threshold, run, most_rows(kept, reader))
        kept[:, reader] = chain.decide(tried.copy())
        if (kept[:, reader] != tried).any():
            commit(kept, reader)
    return result


@dataclass(eq=False)
class _Chain:
    """Decides the edges into one reader."""

    result: Pruning
    reader: int
    candidates: NDArray[np.intp]
    threshold: float
    run: Callable[[Kept, int, Masks], NDArray[np.float64]]
    most: int  # rows that fit one run

    def __post_init__(self) -> None:
        self.goes = np.ones(len(self.candidates), dtype=bool)  # guesses: which are removed

    def decide(self, state: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return `state` [sender, pos] without what the threshold lets go."""
        first, size = 0, FIRST_ROWS
        while first < len(self.candidates):
            part = range(first, min(first + min(size, self.most), len(self.candidates)))
            distances = self._run(state, part)
            done = self._accept(state, part, distances)
            size = 2 * size if done == part.stop else FIRST_ROWS
            first = done
        return state

    def _run(self, state: NDArray[np.bool_], part: range) -> NDArray[np.float64]:
        """Return the distances of the chain of trials `part`, as they follow from the guesses."""
        masks, now = [], state.copy()
        for i in part:
            trial = now.copy()
            trial[tuple(self.candidates[i])] = False
            masks.append(trial)
            now = trial if self.goes[i] else now
        self.result.n_runs += len(masks)
        return self.run(self.result.kept, self.reader, np.stack(masks))

    def _accept(self, state: NDArray[np.bool_], part: range, distances: NDArray[np.float64]) -> int:
        """Decide up to the first wrong guess; return the first candidate that is not decided."""
        here = self.result.distance
        wrong: int | None = None
        for i, distance in zip(part, distances.tolist(), strict=True):
            goes = distance - here < self.threshold
            if wrong is None:
                place = tuple(self.candidates[i])
                self.result.changes[place[0], self.reader, place[1]] = distance - here
                if goes:
                    state[place] = False
                    self.result.distance = distance
                if goes != self.goes[i]:
                    wrong = i
            # behind it, what the trials said of a slightly other circuit is the next guess
            here = distance if self.goes[i] else here
            self.goes[i] = goes
        return part.stop if wrong is None else wrong + 1
