"""Selection of circuits: ranks of nodes or edges by score, sizes, and connected edges.

Pure: scores in, ranks and masks out. A circuit of n edges holds the n edges of the lowest ranks,
so that circuits of all sizes are nested.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.arguments import number, one_of
from patchsweep.errors import PlanError

# shares of all nodes or edges at which the MIB benchmark measures a circuit (arXiv 2504.13151)
MIB_SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

# metrics with smaller values for a better model
SMALLER_IS_BETTER = ("rank", "top1_change", "kl_base", "tv_base")

RankBy = Literal["size", "signed"]
Growth = Literal["top", "greedy"]
Level = Literal["nodes", "edges"]
Floats = NDArray[np.floating]
Ints = NDArray[np.int32]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the circuits to run, ascending."""

    shares: tuple[float, ...]  # shares of all nodes or edges
    counts: tuple[int, ...]  # numbers of nodes or edges; shares are rounded down, as in MIB


def sizes_of(given: Sequence[float] | None, n: int, what: str) -> Sizes:
    """Return the sizes `given` of circuits among `n` nodes or edges; None: those of MIB.

    A number up to 1 is a share of all, a whole number above 1 a count.

    Raises:
        PlanError: `given` is empty, or a size is neither or repeated.
    """
    if given is not None and not isinstance(given, Sequence | np.ndarray):
        raise PlanError(f"sizes={given!r} must be a list, such as [0.01, 0.1, 1]")
    sizes = MIB_SHARES if given is None else tuple(given)
    if not sizes:
        raise PlanError("sizes is empty; leave it out for those of the MIB benchmark")
    for size in sizes:
        number("size", size)
        if not (0 < size <= 1 or (size == int(size) and 1 < size <= n)):
            raise PlanError(
                f"size {size} is neither a share of all {what} (above 0, up to 1) nor a number of "
                f"{what} (2..{n})"
            )
    shares = sorted(size if size <= 1 else size / n for size in sizes)
    if len(set(shares)) < len(shares):
        raise PlanError(f"sizes={list(sizes)} name a size twice; name each once")
    # 1e-6 keeps a share such as 0.29 of 100 from falling to 28 by its binary fraction
    return Sizes(tuple(shares), tuple(int(share * n + 1e-6) for share in shares))


def check_rank_by(rank_by: str, metric: str) -> None:
    """Check the order of ranks.

    Raises:
        PlanError: `rank_by` is not known, or is `signed` for a metric with smaller values for a
            better model.
    """
    one_of("rank_by", rank_by, get_args(RankBy), error=PlanError)
    if rank_by == "signed" and metric in SMALLER_IS_BETTER:
        raise PlanError(
            f"rank_by=signed puts what raises the metric first, and {metric} is smaller where the "
            "model does better; use rank_by=size, or another metric"
        )


def strength_of(scores: Floats, rank_by: RankBy) -> Floats:
    """Return the strength of each score, by which it ranks, largest first; NaN without an edge.

    A score is the effect of ablation: negative where ablating the node or edge lowers the metric.
    """
    return np.abs(scores) if rank_by == "size" else -scores


def rank_top(strength: Floats) -> Ints:
    """Return the rank of every strength, 0 for the largest; -1 for NaN. Ties go to the earlier."""
    order = np.argsort(np.where(np.isnan(strength), np.inf, -strength).ravel(), kind="stable")
    ranks = np.empty(order.size, dtype=np.int32)
    ranks[order] = np.arange(order.size)
    return np.where(np.isnan(strength), -1, ranks.reshape(strength.shape)).astype(np.int32)


def rank_greedy(nodes: Nodes, strength: Floats) -> Ints:
    """Return the order `[sender, reader]` in which edges join a circuit grown from the logits.

    The next edge is the strongest one whose reader is the logits or belongs to a node in the
    circuit; its sender's node joins with it. So circuits of every size are connected to the
    logits (the greedy selection of EAP-IG, arXiv 2403.17806). Ties go to the earlier edge.
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

    open_reader(len(nodes.readers) - 1)
    turn = 0
    while open_edges:
        _, sender, reader = heapq.heappop(open_edges)
        ranks[sender, reader] = turn
        turn += 1
        if sender not in joined:
            joined.add(sender)
            for own_reader in nodes.readers_of[sender]:
                open_reader(own_reader)
    return ranks


def connected(nodes: Nodes, keep: Bools) -> Bools:
    """Return the edges of `keep` `[row, sender, reader]` on a path from embed to the logits.

    A path may enter a node at any of its readers.
    """
    reached = np.zeros(keep.shape[:2], dtype=bool)
    reached[:, 0] = True
    for sender, readers in enumerate(nodes.readers_of):
        for reader in readers:
            reached[:, sender] |= (keep[:, :, reader] & reached).any(axis=1)
    return keep & reached[:, :, None] & reaching(nodes, keep)[:, None, :]


def reaching(nodes: Nodes, keep: Bools) -> Bools:
    """Return [..., reader] whether a reader reaches the logits over edges [..., sender, reader]."""
    useful = np.zeros((*keep.shape[:-2], keep.shape[-1]), dtype=bool)
    useful[..., -1] = True
    for sender in reversed(range(len(nodes.senders))):
        leads_on = (keep[..., sender, :] & useful).any(axis=-1)
        for reader in nodes.readers_of[sender]:
            useful[..., reader] |= leads_on
    return useful


def areas(shares: Sequence[float], faithfulness: Sequence[float]) -> tuple[float, float]:
    """Return (CPR, CMD) of a faithfulness curve, as MIB defines them (arXiv 2504.13151).

    CPR, the integrated circuit performance ratio, is the area under the curve over the share of
    nodes or edges. CMD, the integrated circuit-model distance, is the area between the curve and
    1. Both use trapezoids from the smallest to the largest share. With MIB's sizes a perfect
    circuit has a CPR of 0.999 and a CMD of 0.
    """
    curve = list(zip(shares, faithfulness, strict=True))
    cpr = sum((b - a) * (f + g) / 2 for (a, f), (b, g) in pairwise(curve))
    cmd = sum((b - a) * (abs(1 - f) + abs(1 - g)) / 2 for (a, f), (b, g) in pairwise(curve))
    return cpr, cmd


@dataclass(frozen=True)
class Plan:
    """The circuits to run."""

    nodes: Nodes
    level: Level
    growth: Growth
    rank_by: RankBy
    sizes: Sizes
    scores: NDArray[np.float32]  # [node] or [sender, reader]; NaN: no such edge
    ranks: NDArray[np.int32]  # likewise; -1: no such edge

    @property
    def circuits(self) -> NDArray[np.bool_]:
        """Members [size, ...] of the circuit of each size."""
        counts = np.array(self.sizes.counts).reshape(-1, *[1] * self.ranks.ndim)
        return (self.ranks >= 0) & (self.ranks < counts)

    @cached_property
    def rows(self) -> NDArray[np.bool_]:
        """Kept nodes or edges [row, ...] of each run: circuits, complements, nothing, everything.

        Edges that are on no path from embed to the logits are removed, as in MIB: the input of a
        node without a kept edge is not computed by the circuit.
        """
        circuits = self.circuits
        everything = np.broadcast_to(self.ranks >= 0, circuits.shape)
        parts = [circuits, everything & ~circuits, np.zeros_like(circuits[:1]), everything[:1]]
        rows = np.concatenate(parts)
        return connected(self.nodes, rows) if self.level == "edges" else rows

    @cached_property
    def runs(self) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        """The distinct `rows`, and the index among them of each row.

        Small circuits are often equal, since none of their edges is on a path to the logits.
        """
        different, inverse = np.unique(self.rows, axis=0, return_inverse=True)
        return different, inverse.ravel()


def make_plan(
    nodes: Nodes,
    level: Level,
    growth: Growth,
    rank_by: RankBy,
    sizes: Sequence[float] | None,
    scores: NDArray[np.float32],
) -> Plan:
    strength = strength_of(scores, rank_by)
    ranks = rank_greedy(nodes, strength) if growth == "greedy" else rank_top(strength)
    plan_sizes = sizes_of(sizes, int((ranks >= 0).sum()), level)
    return Plan(nodes, level, growth, rank_by, plan_sizes, scores, ranks)
