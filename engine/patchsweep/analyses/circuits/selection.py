"""How circuits grow: which node or edge joins when, and what of a circuit is connected.

Pure: scores in, ranks and masks out. A circuit of n edges is the n edges of the lowest ranks, so
that circuits of all sizes lie inside each other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from patchsweep.analyses.circuits.nodes import Nodes, Reader
from patchsweep.arguments import number
from patchsweep.errors import PlanError

# shares of all nodes or edges at which the MIB benchmark measures a circuit (arXiv 2504.13151)
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# metrics whose value is smaller where the model does better
SMALLER_IS_BETTER = ("rank", "top1_change", "kl_base", "tv_base")

RankBy = Literal["size", "signed"]
Floats = NDArray[np.floating]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the circuits that are run, ascending."""

    shares: tuple[float, ...]  # of all nodes or edges, as asked for
    counts: tuple[int, ...]  # nodes or edges, the share rounded down as MIB does


def sizes_of(given: Sequence[float] | None, n: int, what: str) -> Sizes:
    """The sizes `given` of circuits among `n` nodes or edges; None: those of MIB.

    A number up to 1 is a share of all, a whole number above 1 a count.

    Raises:
        PlanError: there is none, one is neither, or one is named twice.
    """
    if given is not None and not isinstance(given, Sequence | np.ndarray):
        raise PlanError(f"sizes={given!r} must be a list, such as [0.01, 0.1, 1]")
    chosen = MIB_SHARES if given is None else tuple(given)
    if not chosen:
        raise PlanError("sizes is empty; leave it out for those of the MIB benchmark")
    for size in chosen:
        number("size", size)
        if not (0 < size <= 1 or (size == int(size) and 1 < size <= n)):
            raise PlanError(
                f"size {size} is neither a share of all {what} (above 0, up to 1) nor a number of "
                f"{what} (2..{n})"
            )
    shares = sorted(size if size <= 1 else size / n for size in chosen)
    if len(set(shares)) < len(shares):
        raise PlanError(f"sizes={list(chosen)} name a size twice; name each once")
    # a share such as 0.29 of 100 must not fall to 28 by its binary fraction
    return Sizes(tuple(shares), tuple(int(share * n + 1e-6) for share in shares))


def check_rank_by(rank_by: str, metric: str) -> None:
    """See that nodes or edges can be ranked so.

    Raises:
        PlanError: the order is not known, or a signed one is asked for of a metric that is smaller
            where the model does better.
    """
    if rank_by not in ("size", "signed"):
        raise PlanError(f"rank_by={rank_by!r} is not known; use size or signed")
    if rank_by == "signed" and metric in SMALLER_IS_BETTER:
        raise PlanError(
            f"rank_by=signed puts what raises the metric first, and {metric} is smaller where the "
            "model does better; use rank_by=size, or another metric"
        )


def strength_of(scores: Floats, rank_by: RankBy) -> Floats:
    """What is foremost has the largest strength; NaN where there is no edge.

    A score is the effect of ablating: below 0 where the metric falls without the node or edge.
    """
    return np.abs(scores) if rank_by == "size" else -scores


def rank_top(strength: Floats) -> Ints:
    """The rank of every strength, 0 the largest; -1 where it is NaN.

    Ties go to the earlier one.
    """
    order = np.argsort(np.where(np.isnan(strength), np.inf, -strength).ravel(), kind="stable")
    ranks = np.empty(order.size, dtype=np.int32)
    ranks[order] = np.arange(order.size)
    return np.where(np.isnan(strength), -1, ranks.reshape(strength.shape)).astype(np.int32)


def rank_greedy(nodes: Nodes, strength: Floats) -> Ints:
    """The turn at which each edge `[sender, reader]` joins a circuit that grows from the logits.

    The edge that joins is the one of the largest strength among those whose reader is the logits
    or belongs to a node that has joined; its sender joins with it. So every circuit on the way
    is connected to the logits. (As EAP-IG grows them, arXiv 2403.17806.) Ties
    go to the earlier edge.
    """
    ranks = np.full(strength.shape, -1, dtype=np.int32)
    open_edges: list[tuple[float, int, int]] = []
    seen = [nodes.n_seen(reader) for reader in nodes.readers]

    opened: set[int] = set()
    joined: set[int] = set()

    def open_reader(reader: int) -> None:
        if reader in opened:  # a key-value head is shared by several heads
            return
        opened.add(reader)
        for sender in range(seen[reader]):
            heapq.heappush(open_edges, (-float(strength[sender, reader]), sender, reader))

    readers_of = _readers_of(nodes)
    open_reader(len(nodes.readers) - 1)
    turn = 0
    while open_edges:
        _, sender, reader = heapq.heappop(open_edges)
        ranks[sender, reader] = turn
        turn += 1
        if sender not in joined:
            joined.add(sender)
            for own in readers_of[sender]:
                open_reader(own)
    return ranks


def connected(nodes: Nodes, keep: Bools) -> Bools:
    """The edges of `keep` `[row, sender, reader]` that lie on a way from embed to the logits.

    A node passes on whatever reaches any of its readers.
    """
    readers_of = _readers_of(nodes)
    n_rows, n_senders, n_readers = keep.shape
    reached = np.zeros((n_rows, n_senders), dtype=bool)
    reached[:, 0] = True
    for sender in range(1, n_senders):
        for reader in readers_of[sender]:
            reached[:, sender] |= (keep[:, :, reader] & reached).any(axis=1)
    useful = np.zeros((n_rows, n_readers), dtype=bool)
    useful[:, -1] = True
    for sender in reversed(range(1, n_senders)):
        leads_on = (keep[:, sender] & useful).any(axis=1)
        for reader in readers_of[sender]:
            useful[:, reader] |= leads_on
    return keep & reached[:, :, None] & useful[:, None, :]


def areas(shares: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """(CPR, CMD) of a faithfulness curve, as MIB defines them (arXiv 2504.13151).

    CPR, the integrated circuit performance ratio, is the area under the curve over the share of
    the nodes or edges, CMD, the integrated circuit-model distance, the area between the curve and
    1; by trapezoids from the smallest to the largest share. With MIB's sizes a perfect circuit
    has a CPR of 0.999 and a CMD of 0.
    """
    curve = list(zip(shares, faithfulness, strict=True))
    cpr = sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(curve))
    cmd = sum((b - a) * (abs(1 - f) + abs(1 - g)) / 2 for (a, f), (b, g) in pairwise(curve))
    return cpr, cmd


def _readers_of(nodes: Nodes) -> list[list[int]]:
    """Per sender the readers of its node: none of embed, q, k and v of a head."""
    place = {str(reader): i for i, reader in enumerate(nodes.readers)}
    group = nodes.n_heads // nodes.n_kv_heads
    found = []
    for sender in nodes.senders:
        own: list[Reader] = []
        if sender.kind == "mlp":
            own = [Reader("mlp", sender.layer)]
        elif sender.head is not None:
            shared = sender.head // group
            own = [Reader("q", sender.layer, sender.head)]
            own += [Reader("k", sender.layer, shared), Reader("v", sender.layer, shared)]
        found.append([place[str(reader)] for reader in own])
    return found
