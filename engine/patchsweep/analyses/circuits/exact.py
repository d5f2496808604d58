"""Runs edges exactly: a sender's change reaches the input of one reader, and the run continues.

A row is one edge of one pair. It enters at its reader's block with the base run's stream. There
the reader's q, k, v or MLP output is computed from the stream plus the sender's change and
replaces the base value. Rows run in packed batches, so that a block's weights are read once for
all rows; positions before the first change are shared with the base run, as its keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Edge
from patchsweep.forward.unembed import Unembed
from patchsweep.spec.finite import check_finite, names_of

# most tokens of a packed batch
MAX_TOKENS = 4096


@torch.no_grad()
def exact(
    edge_batch: EdgeBatch, edges: Sequence[Edge], max_tokens: int = MAX_TOKENS
) -> Float[Tensor, "metric pair edge"]:
    """Return the metrics of runs with one patched edge each.

    An edge with a position is patched there, others at all positions together. NaN where the
    prompts do not have the position.
    """
    writes = edge_batch.writes()
    n_pairs = edge_batch.base.n_pairs
    # an edge whose position is before the first change, or after the last read, has no effect
    base, _ = edge_batch.references()
    values = base.unsqueeze(-1).repeat(1, 1, len(edges))
    unembed = Unembed(edge_batch.blocks.unwrapped)
    n_reads = len(edge_batch.batch.reads)
    for start, members in _by_start(edge_batch, edges).items():
        rows = [(pair, i) for i in members for pair in range(n_pairs)]
        size = max(1, max_tokens // (edge_batch.base.length - start))
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            pair = torch.tensor([p for p, _ in part], device=values.device)
            edge = torch.tensor([i for _, i in part], device=values.device)
            final = _packed(edge_batch, [edges[i] for _, i in part], pair, writes, start)
            for chunk in unembed.chunks(len(part), n_reads):
                logits = unembed.logits(final[chunk].flatten(0, 1)).float()
                values[:, pair[chunk], edge[chunk]] = edge_batch.score(
                    logits.unflatten(0, (-1, n_reads)), pair[chunk]
                )
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


def _by_start(edge_batch: EdgeBatch, edges: Sequence[Edge]) -> dict[int, list[int]]:
    """Return edges that may have an effect, by the first position of their rows.

    Each list is in reader order, so that a packed batch skips the blocks below.
    """
    by_start: dict[int, list[int]] = {}
    first_read, last_read = edge_batch.batch.reads[0], edge_batch.batch.reads[-1]
    for i in sorted(range(len(edges)), key=lambda i: edges[i].reader.layer):
        first = edge_batch.start if (pos := edges[i].pos) is None else pos
        if edge_batch.start <= first <= last_read:
            by_start.setdefault(min(first, first_read), []).append(i)
    return by_start


def _packed(
    edge_batch: EdgeBatch, edges: Sequence[Edge], pair: Tensor, writes: Tensor, start: int
) -> Float[Tensor, "row read d_model"]:
    """Return the final residual at the positions read; rows of `edges` are in reader order."""
    blocks, base = edge_batch.blocks, edge_batch.base
    layers = [edge.reader.layer for edge in edges]
    x = base.resid[0].new_empty(0, *base.resid[0][0, start:].shape)
    for layer in range(layers[0], blocks.n_layers + 1):
        new = range(len(x), sum(at <= layer for at in layers))
        rows = slice(new.start, new.stop)
        entering = base.resid[layer].detach()[pair[rows], start:]
        reader_input = entering + _gained(edge_batch, edges[rows], pair[rows], writes, start).to(
            entering
        )
        if layer == blocks.n_layers:
            x = torch.cat([x, reader_input])
            break
        replaced = (
            _Replaced(edge_batch, edges, new, reader_input, pair[rows], start) if new else _nothing
        )
        x = torch.cat([x, entering])
        x = blocks.run(layer, x, base, pair[: len(x)], start, replaced)
    return x[:, [read - start for read in edge_batch.batch.reads]]


def _gained(
    edge_batch: EdgeBatch, edges: Sequence[Edge], pair: Tensor, writes: Tensor, start: int
) -> Float[Tensor, "row pos d_model"]:
    """Return the change of each row's reader input from the base run, from `start` on."""
    senders = [edge_batch.nodes.sender_index(edge.sender) for edge in edges]
    # a negative padding width removes positions before `start`
    gained = nn.functional.pad(writes[pair, senders], (0, 0, edge_batch.start - start, 0))
    for row, edge in zip(gained, edges, strict=True):
        if edge.pos is not None:
            row[: edge.pos - start] = 0.0
            row[edge.pos - start + 1 :] = 0.0
    return gained


def _nothing(kind: str, x: Tensor) -> None:
    """Replace nothing: no row enters at this block."""


class _Replaced:
    """Replaces the readers' q, k, v or MLP output in rows `new`, from each row's own stream."""

    def __init__(
        self,
        edge_batch: EdgeBatch,
        edges: Sequence[Edge],
        new: range,
        seen: Tensor,
        pair: Tensor,
        start: int,
    ) -> None:
        self._values: list[tuple[str, int, int | None, Tensor]] = []
        layer = edges[new[0]].reader.layer
        heads = [i for i, row in enumerate(new) if edges[row].reader.kind != "mlp"]
        mlps = [i for i, row in enumerate(new) if edges[row].reader.kind == "mlp"]
        if heads:
            qkv = edge_batch.blocks.qkv_of(layer, seen[heads], edge_batch.base, pair[heads], start)
            by_kind = dict(zip("qkv", qkv, strict=True))
            for place, i in enumerate(heads):
                reader = edges[new[i]].reader
                output = by_kind[reader.kind][place, reader.head]
                self._values.append((reader.kind, new[i], reader.head, output))
        if mlps:
            out = edge_batch.blocks.mlp_of(layer, seen[mlps], edge_batch.base, pair[mlps], start)
            self._values += [("mlp", new[i], None, out[place]) for place, i in enumerate(mlps)]

    def __call__(self, kind: str, x: Tensor) -> None:
        """Write the values into q, k, v `[row, head, pos, d]` or the MLP output `[row, pos, d]`."""
        for reader_kind, row, head, value in self._values:
            if reader_kind == kind:
                (x[row] if head is None else x[row, head]).copy_(value)
