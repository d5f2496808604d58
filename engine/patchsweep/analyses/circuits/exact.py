"""Runs edges exactly: a sender's change reaches the input of one reader, and the run continues.

A row is one edge of one pair. At its reader's block only what the edge changes is computed: the
reader's q, k or v from the stream plus the sender's change (once for all readers of that stream),
the attention of the heads that read it, and the MLP. The block's output enters the later blocks,
where rows run in packed batches: a block's weights are read once for all rows, and positions
before the first change are shared with the base run, as its keys and values. Tokens that nothing
read depends on do not run: those after the last position read, and in the last block all that are
not read, but for their keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchsweep.analyses.circuits.dead_edges import RUNS, dead_edges
from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Edge
from patchsweep.forward.row_attention import attend_rows
from patchsweep.forward.trace import Part
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
        size = max(1, max_tokens // (_end(edge_batch) - start))
        n_batches = -(-len(rows) // size)
        for part in np.array_split(rows, n_batches):
            pair, edge = (torch.from_numpy(x).to(values.device) for x in part.T)
            members = [edges[i] for i in part[:, 1]]
            final = _Rows(edge_batch, members, pair, writes, start).run()
            values[:, pair, edge] = edge_batch.metrics_of(unembed, final, pair)
    check_finite(
        values.cpu().numpy(),
        names_of(edge_batch.metrics),
        lambda pair, edge: (
            f"the patch of edge {edges[edge]} in pair {edge_batch.batch.pairs[pair]}"
        ),
    )
    absent = [i for i, edge in enumerate(edges) if (edge.pos or 0) >= edge_batch.base.length]
    values[:, :, absent] = float("nan")
    return values


def _end(edge_batch: EdgeBatch) -> int:
    """Return the number of positions up to the last one that is read."""
    return edge_batch.batch.reads[-1] + 1


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
        self.writes, self.start, self.end = writes, start, _end(edge_batch)
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
        # rows with the same stream at their reader
        at = [(int(p), edge_batch.nodes.sender_index(e.sender), e.pos)
              for p, e in zip(pair.tolist(), edges, strict=True)]  # fmt: skip
        place = {key: i for i, key in enumerate(dict.fromkeys(at))}
        stream = torch.tensor([place[key] for key in at], device=pair.device)
        pairs = torch.tensor([p for p, _, _ in place], device=pair.device)
        entering = base.resid[layer][pairs, self.start : self.end]
        seen = entering + self._gained([*place]).to(entering)
        late = slice(first - self.start, None)
        if layer == blocks.n_layers:
            return seen[stream][:, late]
        x = base.resid[layer][pair, first : self.end]
        out = torch.empty_like(x)
        is_mlp = np.array([edge.reader.kind == "mlp" for edge in edges])
        for kind in (False, True):
            rows = torch.from_numpy(np.flatnonzero(is_mlp == kind)).to(pair.device)
            if not len(rows):
                continue
            members = [edges[i] for i in rows.tolist()]
            given: dict[Part, Tensor] = {}
            if members[0].reader.kind == "mlp":
                used, local = stream[rows].unique(return_inverse=True)
                mlp = blocks.mlp_of(
                    layer, seen[used][:, late], base, pairs[used], first,
                    held={"attn": base.part(layer, "attn")[pairs[used], first : self.end]},
                )  # fmt: skip
                given["mlp"] = mlp[local]
                given["attn"] = base.part(layer, "attn")[pair[rows], first : self.end]
            else:
                z = self._z(layer, members, stream[rows], seen, pairs, pair[rows])
                given["attn"] = blocks.attention_of(layer, z[:, late])
                if edge_batch.nodes.parallel[layer]:  # the MLP reads nothing that changes
                    given["mlp"] = base.part(layer, "mlp")[pair[rows], first : self.end]
            out[rows] = blocks.finish(layer, x[rows], given, base, pair[rows], first)
        return out

    def _gained(
        self, at: Sequence[tuple[int, int, int | None]]
    ) -> Float[Tensor, "stream pos d_model"]:
        """Return what each (pair, sender, position or None) adds to the stream, from `start` on."""
        pair, sender = ([key[i] for key in at] for i in (0, 1))
        before = self.edge_batch.start
        # a negative padding width removes positions
        gained = nn.functional.pad(
            self.writes[pair, sender],
            (0, 0, before - self.start, self.end - self.edge_batch.base.length),
        )
        for row, (_, _, pos) in zip(gained, at, strict=True):
            if pos is not None:
                row[: pos - self.start] = 0.0
                row[pos - self.start + 1 :] = 0.0
        return gained

    def _z(
        self,
        layer: int,
        edges: Sequence[Edge],
        stream: Tensor,
        seen: Float[Tensor, "stream pos d_model"],
        pairs: Tensor,
        pair: Tensor,
    ) -> Float[Tensor, "row pos width"]:
        """Return z of rows whose readers are q, k or v; row i reads stream `stream[i]`."""
        edge_batch, positions = self.edge_batch, slice(self.start, self.end)
        base, nodes = edge_batch.base, edge_batch.nodes
        used, local = stream.unique(return_inverse=True)
        new = edge_batch.blocks.qkv_of(layer, seen[used], base, pairs[used], self.start)
        old = base.q[layer], base.k[layer], base.v[layer]
        kind = np.array(["qkv".index(edge.reader.kind) for edge in edges])
        own = np.array([edge.reader.head for edge in edges])
        share = nodes.n_heads // nodes.n_kv_heads
        z = base.z[layer][pair, positions].unflatten(-1, (nodes.n_heads, -1))
        for head in range(nodes.n_heads):
            reads = np.where(kind == 0, own == head, own == head // share)
            if not reads.any():
                continue
            rows = torch.from_numpy(np.flatnonzero(reads)).to(pair.device)
            parts: list[Tensor] = []
            for i, (mine, known) in enumerate(zip(new, old, strict=True)):
                h = head if i == 0 else head // share
                value = known[pair[rows], h, positions]
                changed = torch.from_numpy(np.flatnonzero(kind[reads] == i)).to(pair.device)
                value[changed] = mine[local[rows[changed]], h]
                parts.append(value.unsqueeze(1))
            q, k, v = parts
            found = attend_rows(base, layer, q, k, v, pair[rows], self.start, head)
            z[rows, :, head] = found.squeeze(2)
        return z.flatten(2)
