"""Runs every edge of a model exactly: one table of all senders and readers.

A shard holds the edges into the readers of one layer, so that a run with a store goes on where it
was interrupted, and slices divide the layers of one pair.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.analyses.circuits.dead_edges import REASONS, dead_counts, dead_edges
from patchsweep.analyses.circuits.edge_batch import EdgeBatch, ExactBatches, Question, nodes_of
from patchsweep.analyses.circuits.edge_dataset import edge_dataset, length_of, node_coords
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, Nodes
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.forward.grad import frozen

_DIMS = ("sender", "reader")


def every_edge(
    question: Question, positions: bool, attrs: Mapping[str, Any], stages: Stages
) -> xr.Dataset:
    """Return `edge` [metric, pair, sender, reader(, pos)], the raw metric with each edge patched.

    NaN where there is no edge or no position. `edge_dead` [pair, sender, reader(, pos)] holds the
    code of `REASONS` of edges that were proved dead: their value is the base metric. -1: no edge.
    """
    nodes = nodes_of(question.bridge)
    batches = _Batches(question)
    of_layer = nodes.of_layer(0)
    dims = {
        "layer": nodes.n_layers + 1,
        "sender": len(nodes.senders),
        "unit": of_layer.stop - of_layer.start,
    }
    if positions:
        dims["pos"] = length_of(question)
    n_metrics, n_pairs = len(question.metrics), len(question.pairs)
    shapes = {
        "exact": {"metric": n_metrics, "pair": n_pairs, **dims},
        "dead": {"pair": n_pairs, **dims},
    }

    def block(pairs: range, layer: int) -> Computed:
        sizes = {name: {**shape, "layer": 1} for name, shape in shapes.items()}
        cells = empty(sizes, pairs)
        references = np.full((2, n_metrics, len(pairs)), np.nan, np.float32)
        with frozen(question.bridge):
            for edge_batch in batches.at(pairs):
                rows = [pair - pairs.start for pair in edge_batch.batch.pairs]
                references[:, :, rows] = [x.cpu().numpy() for x in edge_batch.references()]
                _fill(cells, edge_batch, layer, rows, positions)
        return cells, references

    def cost(layer: int) -> int:
        n_edges = int(nodes.possible[:, nodes.of_layer(layer)].sum())
        return n_edges * max(1, nodes.n_layers - layer) * batches.longest

    found = stages.run_by_layer(
        "every",
        shapes,
        batches.block,
        block,
        cost,
        metrics=[metric.name for metric in question.metrics],
        attrs={**attrs, "positions": positions},
    )
    stages.wait()
    table = {
        name: _by_reader(found[name].values, nodes, [*shape].index("layer"))
        for name, shape in shapes.items()
    }
    last = ("pos",) if positions else ()
    dead = np.nan_to_num(table["dead"], nan=-1).astype(np.int8)
    values = xr.Dataset(
        {
            "every": (("metric", "pair", *_DIMS, *last), table["exact"]),
            "base_metric": found["base_metric"],
            "source_metric": found["source_metric"],
        }
    )
    words = {"long_name": "metric with one edge patched"}
    more = {"method": "exact", "positions": positions, "dead": dead_counts(dead)}
    result = edge_dataset(question, "edge", values, "every", node_coords(nodes), words, more)
    why = "; ".join(f"{code}: {text}" for code, text in REASONS.items())
    text = f"why an edge was not run: {why}; -1: there is no such edge"
    result["edge_dead"] = (("pair", *_DIMS, *last), dead, {"long_name": text})
    return result


class _Batches(ExactBatches):
    """Batches that are kept for the next layer of the same pairs."""

    def __init__(self, question: Question) -> None:
        super().__init__(question)
        self._kept: tuple[range, list[EdgeBatch]] = (range(0), [])

    def at(self, pairs: range) -> list[EdgeBatch]:
        """Return the batches of `pairs`."""
        if self._kept[0] != pairs:
            self._kept = (range(0), [])  # frees the last ones first
            self._kept = (pairs, list(self.of(pairs)))
        return self._kept[1]


def _fill(
    cells: Mapping[str, NDArray[np.float32]],
    edge_batch: EdgeBatch,
    layer: int,
    rows: list[int],
    positions: bool,
) -> None:
    """Run the edges into the readers of a layer, and write them into `rows` of the cells."""
    nodes = edge_batch.nodes
    readers = nodes.readers[nodes.of_layer(layer)]
    at = np.nonzero(nodes.possible[:, nodes.of_layer(layer)])
    edges = [Edge(nodes.senders[u], readers[v]) for u, v in zip(*at, strict=True)]
    last: tuple[int, ...] = ()
    if positions:
        length = edge_batch.base.length
        edges = [replace(edge, pos=pos) for edge in edges for pos in range(length)]
        last = (length,)
    writes = edge_batch.writes()
    found = {
        "exact": exact(edge_batch, edges, writes=writes).cpu().numpy(),
        "dead": dead_edges(edge_batch, edges, writes)[None],
    }
    for name, values in found.items():
        table = cells[name] if name == "exact" else cells[name][None]
        for i, row in enumerate(rows):
            index: tuple[Any, ...] = (slice(None), row, 0, *at, *(slice(n) for n in last))
            table[index] = values[:, i].reshape(len(values), len(at[0]), *last)


def _by_reader(values: NDArray[np.float32], nodes: Nodes, axis: int) -> NDArray[np.float32]:
    """Return [..., sender, reader, ...] of [..., layer, sender, unit, ...]; `axis`: the layer's."""
    together = np.moveaxis(values, axis, axis + 1)
    shape = (*together.shape[: axis + 1], -1, *together.shape[axis + 3 :])
    flat = together.reshape(shape)
    return flat.take(range(len(nodes.readers)), axis=axis + 1)
