"""Runs edges exactly: a sender's change reaches the input of one reader, and the run continues.

A row is one edge of one pair. The output of its reader's block (see `ReaderRows`) enters the
later blocks, where rows run in packed batches: a block's weights are read once for all rows, and
positions before the first change are shared with the base run, as its keys and values. Tokens that
nothing read depends on do not run: those after the last position read, and in the last block all
that are not read, but for their keys and values.

Edges that change no metric are proved dead, and do not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Edge, Reader
from patchsweep.forward.trace import Part, attend_rows
from patchsweep.forward.unembed import Unembed
from patchsweep.spec.finite import check_finite, names_of
from patchsweep.spec.plan import Ints

RUNS, UNCHANGED, UNREAD, BEYOND = range(4)
# why an edge is not run; a table of results holds the codes
REASONS = {
    RUNS: "it runs",
    UNCHANGED: "its sender writes what it writes in the base run",
    UNREAD: "its sender's write changes only where no logits that are read depend on its reader",
    BEYOND: "the prompt has no such position",
}


def dead_edges(
    edge_batch: EdgeBatch,
    edges: Sequence[Edge],
    writes: Float[Tensor, "pair sender pos d_model"],
) -> NDArray[np.int8]:
    """Return [pair, edge] codes of `REASONS`; all but `RUNS` have the base metric, or none.

    A position counts if the reader's input changes there and a metric depends on it: up to the
    last position read, and for queries and the MLP of the last block and for the logits the
    positions read alone.
    """
    nodes, length, reads = edge_batch.nodes, edge_batch.base.length, list(edge_batch.batch.reads)
    changes = np.zeros((*writes.shape[:2], length), dtype=bool)
    changes[:, :, edge_batch.start :] = (writes != 0).any(dim=-1).cpu().numpy()
    up_to, only = np.arange(length) <= reads[-1], np.isin(np.arange(length), reads)

    def is_late(reader: Reader) -> bool:
        last = reader.layer == nodes.n_layers - 1 and reader.kind in ("q", "mlp")
        return last or reader.kind == "logits"

    sender = np.array([nodes.sender_index(edge.sender) for edge in edges])
    late = np.array([is_late(edge.reader) for edge in edges])
    pos = np.array([-1 if edge.pos is None else edge.pos for edge in edges])
    codes = np.full((len(changes), len(edges)), BEYOND, dtype=np.int8)
    by_reader = [np.asarray((changes & seen).any(axis=2)) for seen in (up_to, only)]
    somewhere, whole = np.asarray(changes.any(axis=2)), pos < 0
    seen = np.where(late, by_reader[1][:, sender], by_reader[0][:, sender])
    codes[:, whole] = _codes(somewhere[:, sender], seen)[:, whole]
    there = np.flatnonzero((pos >= 0) & (pos < length))
    changed = changes[:, sender[there], pos[there]]
    visible = np.where(late[there], only[pos[there]], up_to[pos[there]])
    codes[:, there] = _codes(changed, changed & visible)
    return codes


def _codes(changed: NDArray[np.bool_], seen: NDArray[np.bool_]) -> NDArray[np.int8]:
    return np.where(seen, RUNS, np.where(changed, UNREAD, UNCHANGED)).astype(np.int8)


def dead_counts(codes: NDArray[np.int8]) -> dict[str, int]:
    """Return how many edges of `codes` [pair, ...] are dead in all pairs, by the first's reason."""
    reason = np.where((codes > RUNS).all(axis=0), codes[0], RUNS)
    return {text: int((reason == code).sum()) for code, text in REASONS.items() if code != RUNS}


# most tokens of a packed batch
MAX_TOKENS = 4096


@torch.no_grad()
def exact(
    edge_batch: EdgeBatch,
    edges: Sequence[Edge],
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
    unembed = Unembed(edge_batch.blocks.unwrapped)
    latest = edge_batch.batch.reads[0]
    for start, rows in rows_by_start(edge_batch, edges, writes, latest).items():
        size = max(1, MAX_TOKENS // (edge_batch.end - start))
        n_batches = -(-len(rows) // size)
        for part in np.array_split(rows, n_batches):
            pair, edge = (torch.from_numpy(x).to(values.device) for x in part.T)
            members = [edges[i] for i in part[:, 1]]
            final = _Rows(edge_batch, members, pair, writes, start).run()
            values[:, pair, edge] = edge_batch.metrics_of(unembed, final, pair)
    check_edges(edge_batch, edges, values.cpu().numpy())
    values[:, :, absent(edge_batch, edges)] = float("nan")
    return values


def absent(edge_batch: EdgeBatch, edges: Sequence[Edge]) -> list[int]:
    """Return the indices of edges at positions that the prompts do not have."""
    return [i for i, edge in enumerate(edges) if (edge.pos or 0) >= edge_batch.base.length]


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


def rows_by_start(
    edge_batch: EdgeBatch, edges: Sequence[Edge], writes: Tensor, latest: int | None = None
) -> dict[int, Ints]:
    """Return the live rows [row, (pair, edge)] by the first position that they run.

    In the order of readers' layers, so that a packed batch skips the blocks below; then of senders
    and pairs, whose readers share a stream. `latest`: a position from which all run.
    """
    layer = np.array([edge.reader.layer for edge in edges])
    sender = np.array([edge_batch.nodes.sender_index(edge.sender) for edge in edges])
    first = np.array([edge_batch.start if edge.pos is None else edge.pos for edge in edges])
    pair, edge = np.nonzero(dead_edges(edge_batch, edges, writes) == RUNS)
    order = np.lexsort((edge, sender[edge], pair, layer[edge]))
    rows = np.stack([pair, edge], axis=1)[order]
    start = first[rows[:, 1]]
    if latest is not None:
        start = np.minimum(start, latest)
    return {int(at): rows[start == at] for at in np.unique(start)}


@dataclass(eq=False)
class _Rows:
    """The rows of one packed batch, in the order of their readers' layers."""

    edge_batch: EdgeBatch
    edges: Sequence[Edge]
    pair: Tensor
    writes: Tensor
    start: int

    @property
    def first_read(self) -> int:
        return self.edge_batch.batch.reads[0]

    def run(self) -> Float[Tensor, "row read d_model"]:
        """Return the final residual at the positions read."""
        blocks, base = self.edge_batch.blocks, self.edge_batch.base
        layers = np.array([edge.reader.layer for edge in self.edges])
        x: Tensor | None = None
        for layer in range(layers[0], blocks.n_layers + 1):
            # the first position of the stream that is needed behind the block
            first = self.first_read if layer >= blocks.n_layers - 1 else self.start
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
        readers = ReaderRows(edge_batch, layer, edges, pair, self.writes, self.start)
        late, positions = slice(first - self.start, None), slice(first, edge_batch.end)
        if layer == blocks.n_layers:
            return readers.seen[readers.stream][:, late]
        x = base.resid[layer][pair, positions]
        out = torch.empty_like(x)
        rows = readers.rows(is_mlp=True)
        if len(rows):
            out[rows] = readers.behind_mlp(rows, positions)
        rows = readers.rows(is_mlp=False)
        if len(rows):
            given: dict[Part, Tensor] = {
                "attn": blocks.attention_of(layer, readers.z(rows)[:, late])
            }
            if edge_batch.nodes.parallel[layer]:  # the MLP reads nothing that changes
                given["mlp"] = base.part(layer, "mlp")[pair[rows], positions]
            out[rows] = blocks.finish(layer, x[rows], given, base, pair[rows], first)
        return out


class ReaderRows:
    """What the readers of block `layer` take in and put out when one edge into them changes.

    Rows are `edges` of pairs `pair`, from position `start` to the last one read. Only what an edge
    changes is computed: q, k or v from the stream plus the sender's change (once for all readers of
    that stream), the attention of the heads that read it, and the MLP.
    """

    def __init__(
        self,
        edge_batch: EdgeBatch,
        layer: int,
        edges: Sequence[Edge],
        pair: Tensor,
        writes: Float[Tensor, "pair sender pos d_model"],
        start: int,
    ) -> None:
        self.edge_batch, self.layer, self.edges, self.pair = edge_batch, layer, edges, pair
        self.start, self.end = start, edge_batch.end
        at = [(int(p), edge_batch.nodes.sender_index(e.sender), e.pos)
              for p, e in zip(pair.tolist(), edges, strict=True)]  # fmt: skip
        place = {key: i for i, key in enumerate(dict.fromkeys(at))}
        # rows with the same stream at their reader
        self.stream = torch.tensor([place[key] for key in at], device=pair.device)
        self.pairs = torch.tensor([p for p, _, _ in place], device=pair.device)
        entering = edge_batch.base.resid[layer][self.pairs, start : self.end]
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

    def behind_mlp(self, rows: Tensor, positions: slice) -> Float[Tensor, "row late d_model"]:
        """Return the block's output at `positions` of `rows` whose reader is the MLP."""
        blocks, base, layer = self.edge_batch.blocks, self.edge_batch.base, self.layer
        used, local = self.stream[rows].unique(return_inverse=True)
        pairs, pair = self.pairs[used], self.pair[rows]
        first, attn = positions.start, base.part(layer, "attn")
        seen = self.seen[used][:, first - self.start : positions.stop - self.start]
        held: dict[Part, Tensor] = {"attn": attn[pairs, positions]}
        mlp = blocks.mlp_of(layer, seen, base, pairs, first, held=held)[local]
        given: dict[Part, Tensor] = {"mlp": mlp, "attn": attn[pair, positions]}
        return blocks.finish(layer, base.resid[layer][pair, positions], given, base, pair, first)

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
