"""Runs edges exactly: a sender's change reaches the input of one reader, and the run continues.

A row is one edge of one pair. The output of its reader's block (see `reader_rows`) enters the
later blocks, where rows run in packed batches: a block's weights are read once for all rows, and
positions before the first change are shared with the base run, as its keys and values. Tokens that
nothing read depends on do not run: those after the last position read, and in the last block all
that are not read, but for their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.analyses.circuits.dead_edges import RUNS, dead_edges
from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Edge
from patchsweep.analyses.circuits.reader_rows import ReaderRows
from patchsweep.forward.trace import Part, attend_rows
from patchsweep.forward.unembed import Unembed
from patchsweep.spec.finite import check_finite, names_of

# most tokens of a packed batch
MAX_TOKENS = 4096


@torch.no_grad()
def exact(
    edge_batch: EdgeBatch,
    edges: Sequence[Edge],
    max_tokens: int = MAX_TOKENS,
    writes: Float[Tensor, "pair sender pos d_model"] | None = None,
) -> Float[Tensor, "metric pair edge"]:
    """Return the metrics of runs with one patched edge each.

    An edge with a position is patched there, others at all positions together. NaN where the
    prompts do not have the position; the base metric for edges that are dead, see `dead_edges`.
    `writes`: those of the batch, if they are known.
    """
    if writes is None:
        writes = edge_batch.writes()
    base, _ = edge_batch.references()
    values = base.unsqueeze(-1).repeat(1, 1, len(edges))
    live = dead_edges(edge_batch, edges, writes) == RUNS
    unembed = Unembed(edge_batch.blocks.unwrapped)
    for start, rows in _by_start(edge_batch, edges, live).items():
        size = max(1, max_tokens // (edge_batch.end - start))
        n_batches = -(-len(rows) // size)
        for part in np.array_split(rows, n_batches):
            pair, edge = (torch.from_numpy(x).to(values.device) for x in part.T)
            members = [edges[i] for i in part[:, 1]]
            final = _Rows(edge_batch, members, pair, writes, start).run()
            values[:, pair, edge] = edge_batch.metrics_of(unembed, final, pair)
    check_edges(edge_batch, edges, values.cpu().numpy())
    absent = [i for i, edge in enumerate(edges) if (edge.pos or 0) >= edge_batch.base.length]
    values[:, :, absent] = float("nan")
    return values


def check_edges(edge_batch: EdgeBatch, edges: Sequence[Edge], values: NDArray[np.float32]) -> None:
    """Raise unless the metrics `[metric, pair, edge]` are numbers.

    Raises:
        ModelError: one is NaN or infinite.
    """
    check_finite(
        values,
        names_of(edge_batch.metrics),
        lambda pair, edge: (
            f"the patch of edge {edges[edge]} in pair {edge_batch.batch.pairs[pair]}"
        ),
    )


def _by_start(
    edge_batch: EdgeBatch, edges: Sequence[Edge], live: np.ndarray
) -> dict[int, np.ndarray]:
    """Return the live rows [row, (pair, edge)] by the first position that they run.

    In the order of readers' layers, so that a packed batch skips the blocks below; then of senders
    and pairs, whose readers share a stream.
    """
    nodes, first_read = edge_batch.nodes, edge_batch.batch.reads[0]
    layer, sender = (
        np.array(column)
        for column in zip(
            *((edge.reader.layer, nodes.sender_index(edge.sender)) for edge in edges), strict=True
        )
    )
    first = np.array([edge_batch.start if edge.pos is None else edge.pos for edge in edges])
    pair, edge = np.nonzero(live)
    order = np.lexsort((edge, sender[edge], pair, layer[edge]))
    rows = np.stack([pair, edge], axis=1)[order]
    start = np.minimum(first, first_read)[rows[:, 1]]
    return {int(at): rows[start == at] for at in np.unique(start)}


class _Rows:
    """The rows of one packed batch, in the order of their readers' layers."""

    def __init__(
        self,
        edge_batch: EdgeBatch,
        edges: Sequence[Edge],
        pair: Tensor,
        writes: Tensor,
        start: int,
    ) -> None:
        self.edge_batch, self.edges, self.pair = edge_batch, edges, pair
        self.writes, self.start, self.end = writes, start, edge_batch.end
        self.first_read = edge_batch.batch.reads[0]

    def run(self) -> Float[Tensor, "row read d_model"]:
        """Return the final residual at the positions read."""
        blocks, base = self.edge_batch.blocks, self.edge_batch.base
        layers = np.array([edge.reader.layer for edge in self.edges])
        x: Tensor | None = None
        for layer in range(layers[0], blocks.n_layers + 1):
            first = self._first(layer)
            if x is not None and layer < blocks.n_layers:
                pair = self.pair[: len(x)]
                if layer < blocks.n_layers - 1:
                    x = blocks.run(layer, x, base, pair, self.start)
                else:
                    x = self._last_block(x, pair)
            new = np.flatnonzero(layers == layer)
            if len(new):
                entered = self._entered(layer, new, first)
                x = entered if x is None else torch.cat([x, entered])
        assert x is not None
        return x[:, [read - self.first_read for read in self.edge_batch.batch.reads]]

    def _first(self, layer: int) -> int:
        """Return the first position of the stream that is needed behind a block."""
        last = self.edge_batch.blocks.n_layers - 1
        return self.first_read if layer >= last else self.start

    def _last_block(
        self, x: Float[Tensor, "row pos d_model"], pair: Tensor
    ) -> Float[Tensor, "row late d_model"]:
        """Return the last block's output from the first position read on."""
        blocks, base = self.edge_batch.blocks, self.edge_batch.base
        layer, late = blocks.n_layers - 1, slice(self.first_read - self.start, None)
        q, k, v = blocks.qkv_of(layer, x, base, pair, self.start)
        z = attend_rows(base, layer, q, k, v, pair, self.start)[:, late].flatten(2)
        attn = blocks.attention_of(layer, z)
        return blocks.finish(layer, x[:, late], {"attn": attn}, base, pair, self.first_read)

    def _entered(
        self, layer: int, new: np.ndarray, first: int
    ) -> Float[Tensor, "row late d_model"]:
        """Return the output of the readers' block for rows `new`, from position `first` on."""
        edge_batch, pair = self.edge_batch, self.pair[new[0] : new[-1] + 1]
        blocks, base = edge_batch.blocks, edge_batch.base
        edges = [self.edges[i] for i in new]
        readers = ReaderRows(edge_batch, layer, edges, pair, self.writes, self.start, self.end)
        late = slice(first - self.start, None)
        if layer == blocks.n_layers:
            return readers.seen[readers.stream][:, late]
        x = base.resid[layer][pair, first : self.end]
        out = torch.empty_like(x)
        for is_mlp in (False, True):
            rows = readers.rows(is_mlp)
            if not len(rows):
                continue
            given: dict[Part, Tensor] = {}
            if is_mlp:
                given["mlp"] = readers.mlp(rows, first, self.end)
                given["attn"] = base.part(layer, "attn")[pair[rows], first : self.end]
            else:
                given["attn"] = blocks.attention_of(layer, readers.z(rows)[:, late])
                if edge_batch.nodes.parallel[layer]:  # the MLP reads nothing that changes
                    given["mlp"] = base.part(layer, "mlp")[pair[rows], first : self.end]
            out[rows] = blocks.finish(layer, x[rows], given, base, pair[rows], first)
        return out
