"""Runs every edge of a model exactly: one table of all senders and readers.

A shard holds the edges into the readers of one layer, so that a run with a store goes on where it
was interrupted, and slices divide the layers of one pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.analyses.circuits.adaptive_edges import SITE, AdaptiveEdges, calibrated, run_at
from patchsweep.analyses.circuits.edge_batch import EdgeBatch, ExactBatches, Question, nodes_of
from patchsweep.analyses.circuits.exact import REASONS, RUNS, dead_counts, dead_edges, exact
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.results import edge_dataset, length_of, node_coords
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.analyses.thresholds import choose_thresholds
from patchsweep.forward.grad import frozen
from patchsweep.results.tolerance import LINEAR, TOKEN_LAYERS
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.finite import names_of
from patchsweep.store.difference import ADAPTIVE
from patchsweep.sweeps.calibration import EXACTLY, Level, SampleSummary


def every_edge(
    question: Question,
    positions: bool,
    stages: Stages,
    adaptive: tuple[float | str, NDArray[np.float32]] | None = None,
) -> xr.Dataset:
    """Return `edge` [metric, pair, sender, reader(, pos)], the raw metric with each edge patched.

    NaN where there is no edge or no position. `edge_dead` [pair, sender, reader(, pos)] holds the
    code of `REASONS` of edges that were proved dead: their value is the base metric. -1: no edge.
    `adaptive`: a tolerance, and the first-order effects [metric, pair, sender, reader(, pos)] that
    choose its sample. `edge_linear`, with the dims of `edge`, holds the part of each effect that
    comes from the gradient then, and `edge_token_layers`, with those of `edge_dead`, what ran.
    """
    nodes = nodes_of(question.bridge)
    batches = _Batches(question, adaptive is not None)
    summary: SampleSummary | None = None
    attrs: dict[str, Any] = {"positions": positions}
    if adaptive is not None:
        tolerance, estimates = adaptive
        summary = choose_thresholds(
            [SITE],
            len(question.metrics),
            stages,
            lambda: calibrated(question, batches.adaptive_at, estimates, tolerance),
        )[SITE]
        attrs["thresholds"] = list(summary.level)
    of_layer = nodes.of_layer(0)
    dims = {
        "layer": nodes.n_layers + 1,
        "sender": len(nodes.senders),
        "unit": of_layer.stop - of_layer.start,
    }
    if positions:
        dims["pos"] = length_of(question)
    n_metrics, n_pairs = len(question.metrics), len(question.pairs)
    by_metric, by_pair = {"metric": n_metrics, "pair": n_pairs, **dims}, {"pair": n_pairs, **dims}
    shapes = {"exact": by_metric, "dead": by_pair}
    if adaptive is not None:
        shapes |= {"linear": by_metric, "token_layers": by_pair}

    at_level = None if summary is None or adaptive is None else (adaptive[0], summary.level)

    def block(pairs: range, layer: int) -> Computed:
        sizes = {name: {**shape, "layer": 1} for name, shape in shapes.items()}
        cells = empty(sizes, pairs)
        references = np.full((2, n_metrics, len(pairs)), np.nan, np.float32)
        with frozen(question.bridge):
            for ready in batches.at(pairs):
                edge_batch = ready.edge_batch
                rows = [pair - pairs.start for pair in edge_batch.batch.pairs]
                references[:, :, rows] = [x.cpu().numpy() for x in edge_batch.references()]
                _fill(cells, ready, layer, rows, positions, at_level)
        return cells, references

    widths = _widths(question, positions)

    def cost(layer: int) -> int:
        n_edges = int(nodes.possible[:, nodes.of_layer(layer)].sum())
        return n_edges * max(1, nodes.n_layers - layer) * max(widths)

    found = stages.run_by_layer(
        "every",
        shapes,
        batches.block,
        block,
        cost,
        metrics=[metric.name for metric in question.metrics],
        attrs=attrs,
    )
    stages.wait()
    table = {
        name: _by_reader(found[name].values, nodes, [*shape].index("layer"))
        for name, shape in shapes.items()
    }
    dead = np.nan_to_num(table["dead"], nan=-1).astype(np.int8)
    more = {"method": "exact", "positions": positions, "dead": dead_counts(dead)}
    if summary is not None and adaptive is not None:
        of_widest = sum(cost(layer) for layer in range(nodes.n_layers + 1))
        site = {
            **summary.attributes(names_of(question.metrics)),
            "n_live": int((dead == RUNS).sum()),
            "token_layers": float(np.nansum(table["token_layers"], dtype=np.float64)),
            "exact_token_layers": of_widest // max(widths) * sum(widths),
        }
        more[ADAPTIVE] = {"tolerance": adaptive[0], "sites": {SITE: site}}
    of_pair = ("pair", "sender", "reader", *(("pos",) if positions else ()))
    why = "; ".join(f"{code}: {text}" for code, text in REASONS.items())
    text = f"why an edge was not run: {why}; -1: there is no such edge"
    variables: dict[str, Any] = {
        "edge": (("metric", *of_pair), table["exact"], "metric with one edge patched"),
        "edge_dead": (of_pair, dead, text),
    }
    if adaptive is not None:
        linear = "part of an edge's effect that is linear, from the base run's gradient"
        ran = "tokens times blocks that ran for an edge"
        variables["edge" + LINEAR] = (("metric", *of_pair), table["linear"], linear)
        variables["edge" + TOKEN_LAYERS] = (of_pair, table["token_layers"], ran)
    return edge_dataset(question, variables, found, node_coords(nodes), more)


@dataclass(frozen=True)
class _Ready:
    """A batch with the changes that its senders write, and its adaptive runs."""

    edge_batch: EdgeBatch
    writes: Tensor
    adaptive: AdaptiveEdges | None


class _Batches(ExactBatches):
    """Batches that are kept for the next layer of the same pairs."""

    def __init__(self, question: Question, adaptive: bool) -> None:
        super().__init__(question)
        self._adaptive = adaptive
        self._kept: tuple[range, list[_Ready]] = (range(0), [])

    def at(self, pairs: range) -> list[_Ready]:
        """Return the batches of `pairs`."""
        if self._kept[0] != pairs:
            self._kept = (range(0), [])  # frees the last ones first
            self._kept = (pairs, [self._ready(edge_batch) for edge_batch in self.of(pairs)])
        return self._kept[1]

    def adaptive_at(self, pairs: range) -> list[AdaptiveEdges]:
        """Return the adaptive runs of `pairs`."""
        return [ready.adaptive for ready in self.at(pairs) if ready.adaptive is not None]

    def _ready(self, edge_batch: EdgeBatch) -> _Ready:
        adaptive = AdaptiveEdges(edge_batch, self.question) if self._adaptive else None
        return _Ready(
            edge_batch, edge_batch.writes() if adaptive is None else adaptive.writes, adaptive
        )


def _fill(
    cells: Mapping[str, NDArray[np.float32]],
    ready: _Ready,
    layer: int,
    rows: list[int],
    positions: bool,
    at_level: tuple[float | str, Level] | None,
) -> None:
    """Run the edges into the readers of a layer, and write them into `rows` of the cells."""
    edge_batch, nodes = ready.edge_batch, ready.edge_batch.nodes
    readers = nodes.of_layer(layer)
    sender, unit = at = np.nonzero(nodes.possible[:, readers])
    edges = nodes.edges_at((sender, unit + readers.start))
    last: tuple[int, ...] = ()
    if positions:
        length = edge_batch.base.length
        edges = [replace(edge, pos=pos) for edge in edges for pos in range(length)]
        last = (length,)
    found: dict[str, NDArray[Any]] = {
        "dead": dead_edges(edge_batch, edges, ready.writes),
    }
    if ready.adaptive is None or at_level is None or at_level[1] == EXACTLY:
        values = exact(edge_batch, edges, writes=ready.writes).cpu().numpy()
        found["exact"], found["linear"] = values, np.zeros_like(values)
        if ready.adaptive is not None:
            cost = [ready.adaptive.exact_cost(edge) // values.shape[1] for edge in edges]
            found["token_layers"] = np.tile(cost, (values.shape[1], 1))
    else:
        found["exact"], found["linear"], found["token_layers"] = run_at(
            ready.adaptive, edges, *at_level
        )
    for name, table in cells.items():
        values = found[name]
        own = (slice(None),) * (values.ndim - 2)  # metric
        for i, row in enumerate(rows):
            index: tuple[Any, ...] = (*own, row, 0, *at, *(slice(n) for n in last))
            table[index] = values[..., i, :].reshape(*values.shape[:-2], len(at[0]), *last)


def _widths(question: Question, positions: bool) -> list[int]:
    """Return how many tokens a block runs for one reader and sender, by pair.

    A run begins at the first token that differs, or at each position from there on.
    """
    widths = []
    for pair in question.pairs:
        base, source = base_and_source(pair, question.direction)
        differs = (i for i, (a, b) in enumerate(zip(base, source, strict=True)) if a != b)
        width = len(base) - (next(differs, 0) if question.intervention.from_source else 0)
        widths.append(width * (width + 1) // 2 if positions else width)
    return widths


def _by_reader(values: NDArray[np.float32], nodes: Nodes, axis: int) -> NDArray[np.float32]:
    """Return [..., sender, reader, ...] of [..., layer, sender, unit, ...]; `axis`: the layer's."""
    together = np.moveaxis(values, axis, axis + 1)
    shape = (*together.shape[: axis + 1], -1, *together.shape[axis + 3 :])
    flat = together.reshape(shape)
    return flat.take(range(len(nodes.readers)), axis=axis + 1)
