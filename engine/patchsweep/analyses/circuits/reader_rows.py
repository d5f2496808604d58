"""`ReaderRows`: what the readers of one block take in and put out when one edge into them changes.

A row is one edge of one pair. Only what the edge changes is computed: q, k or v from the stream
plus the sender's change (once for all readers of that stream), the attention of the heads that
read it, and the MLP.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Edge
from patchsweep.forward.trace import attend_rows


class ReaderRows:
    """Rows `edges`, whose readers are in block `layer`, of pairs `pair`; from `start` to `end`."""

    def __init__(
        self,
        edge_batch: EdgeBatch,
        layer: int,
        edges: Sequence[Edge],
        pair: Tensor,
        writes: Float[Tensor, "pair sender pos d_model"],
        start: int,
        end: int,
    ) -> None:
        self.edge_batch, self.layer, self.edges, self.pair = edge_batch, layer, edges, pair
        self.start, self.end = start, end
        at = [(int(p), edge_batch.nodes.sender_index(e.sender), e.pos)
              for p, e in zip(pair.tolist(), edges, strict=True)]  # fmt: skip
        place = {key: i for i, key in enumerate(dict.fromkeys(at))}
        # rows with the same stream at their reader
        self.stream = torch.tensor([place[key] for key in at], device=pair.device)
        self.pairs = torch.tensor([p for p, _, _ in place], device=pair.device)
        entering = edge_batch.base.resid[layer][self.pairs, start:end]
        self.seen = entering + self._gained([*place], writes).to(entering)
        self.is_mlp = np.array([edge.reader.kind == "mlp" for edge in edges])

    def _gained(
        self, at: Sequence[tuple[int, int, int | None]], writes: Tensor
    ) -> Float[Tensor, "stream pos d_model"]:
        """Return what each (pair, sender, position or None) adds to the stream, from `start` on."""
        pair, sender = ([key[i] for key in at] for i in (0, 1))
        # a negative padding width removes positions
        gained = nn.functional.pad(
            writes[pair, sender],
            (0, 0, self.edge_batch.start - self.start, self.end - self.edge_batch.base.length),
        )
        for row, (_, _, pos) in zip(gained, at, strict=True):
            if pos is not None:
                row[: pos - self.start] = 0.0
                row[pos - self.start + 1 :] = 0.0
        return gained

    def rows(self, is_mlp: bool) -> Tensor:
        """Return the rows whose reader is the MLP, or those whose readers are attention's."""
        return torch.from_numpy(np.flatnonzero(self.is_mlp == is_mlp)).to(self.pair.device)

    def mlp(self, rows: Tensor, first: int, stop: int) -> Float[Tensor, "row late d_model"]:
        """Return the MLP's output of `rows` at positions `first` to `stop`."""
        blocks, base = self.edge_batch.blocks, self.edge_batch.base
        used, local = self.stream[rows].unique(return_inverse=True)
        pairs = self.pairs[used]
        seen = self.seen[used][:, first - self.start : stop - self.start]
        held = base.part(self.layer, "attn")[pairs, first:stop]
        return blocks.mlp_of(self.layer, seen, base, pairs, first, held={"attn": held})[local]

    def z(self, rows: Tensor) -> Float[Tensor, "row pos width"]:
        """Return z of `rows`, whose readers are q, k or v."""
        edge_batch, layer, pair = self.edge_batch, self.layer, self.pair[rows]
        positions = slice(self.start, self.end)
        base, nodes = edge_batch.base, edge_batch.nodes
        used, local = self.stream[rows].unique(return_inverse=True)
        new = edge_batch.blocks.qkv_of(layer, self.seen[used], base, self.pairs[used], self.start)
        old = base.q[layer], base.k[layer], base.v[layer]
        readers = [self.edges[i].reader for i in rows.tolist()]
        kind = np.array(["qkv".index(reader.kind) for reader in readers])
        own = np.array([reader.head for reader in readers])
        share = nodes.n_heads // nodes.n_kv_heads
        z = base.z[layer][pair, positions].unflatten(-1, (nodes.n_heads, -1))
        for head in range(nodes.n_heads):
            reads = np.where(kind == 0, own == head, own == head // share)
            if not reads.any():
                continue
            mine = torch.from_numpy(np.flatnonzero(reads)).to(pair.device)
            parts: list[Tensor] = []
            for i, (fresh, known) in enumerate(zip(new, old, strict=True)):
                h = head if i == 0 else head // share
                value = known[pair[mine], h, positions]
                changed = torch.from_numpy(np.flatnonzero(kind[reads] == i)).to(pair.device)
                value[changed] = fresh[local[mine[changed]], h]
                parts.append(value.unsqueeze(1))
            q, k, v = parts
            found = attend_rows(base, layer, q, k, v, pair[mine], self.start, head)
            z[mine, :, head] = found.squeeze(2)
        return z.flatten(2)
