"""Dead edges: edges that change no metric, proved without running them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.analyses.circuits.edge_batch import EdgeBatch
from patchsweep.analyses.circuits.nodes import Edge, Reader

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
