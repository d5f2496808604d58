"""Greedy pruning of a circuit's edges (ACDC, arXiv 2304.14997), many candidates in one batch.

Pure: `run` tells how far circuits are from the model. The plain loop tries one edge after the
other, and each trial depends on the ones before. Here a batch holds a chain of trials as they would
follow from guessed decisions; the first decision that was guessed wrongly ends what counts of the
chain, and the rest is run again. So every decision is that of the loop, on the same circuit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.subgraph import Kept, Masks, reaching

FIRST_ROWS = 32  # trials of the first chain of a reader; doubled while guesses are right


@dataclass
class Pruning:
    """A circuit after pruning."""

    kept: Kept
    changes: NDArray[np.float32]  # [sender, reader, pos] distance that a removal adds; NaN: not run
    distance: float  # of the circuit from the model
    n_candidates: int  # edges that were tried, dead ones too
    n_dead: int  # removed without a run: nothing that is read depends on them
    n_runs: int  # circuits that were run


def prune(
    nodes: Nodes,
    threshold: float,
    live: Kept,
    run: Callable[[Kept, int, Masks], NDArray[np.float64]],
    commit: Callable[[Kept, int], None],
    most_rows: Callable[[Kept, int], int],
) -> Pruning:
    """Remove edges whose removal adds less than `threshold` to the distance, from the logits down.

    Readers go from the last to the first, of each the senders likewise, and then positions. `live`:
    edges [sender, reader, pos] that may change anything. `run` returns the distance of each row of
    masks of one reader; `commit` learns the edges that a reader is left with.
    """
    kept = np.broadcast_to(nodes.possible[:, :, None], live.shape).copy()
    result = Pruning(kept, np.full(kept.shape, np.nan, np.float32), 0.0, 0, 0, 0)
    for reader in reversed(range(len(nodes.readers))):
        before = kept[:, reader].copy()
        result.n_candidates += int(before.sum())
        tried = live[:, reader] & before & reaching(nodes, kept)[reader]
        result.n_dead += int((before & ~tried).sum())
        kept[:, reader] &= tried
        candidates = np.argwhere(tried)[::-1]
        if not len(candidates):
            continue
        chain = _Chain(result, reader, candidates, threshold, run, most_rows)
        kept[:, reader] = chain.decide(tried.copy())
        if (kept[:, reader] != tried).any():
            commit(kept, reader)
    return result


class _Chain:
    """Decides the edges into one reader."""

    def __init__(
        self,
        result: Pruning,
        reader: int,
        candidates: NDArray[np.intp],
        threshold: float,
        run: Callable[[Kept, int, Masks], NDArray[np.float64]],
        most_rows: Callable[[Kept, int], int],
    ) -> None:
        self.result, self.reader, self.candidates = result, reader, candidates
        self.threshold, self.run = threshold, run
        self.most = most_rows(result.kept, reader)
        self.goes = np.ones(len(candidates), dtype=bool)  # guesses: which are removed

    def decide(self, state: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return `state` [sender, pos] without what the threshold lets go."""
        first, size = 0, FIRST_ROWS
        while first < len(self.candidates):
            part = range(first, min(first + min(size, self.most), len(self.candidates)))
            distances = self._run(state, part)
            done = self._accept(state, part, distances)
            size = 2 * size if done == part.stop else FIRST_ROWS
            first = done
        return state

    def _run(self, state: NDArray[np.bool_], part: range) -> NDArray[np.float64]:
        """Return the distances of the chain of trials `part`, as they follow from the guesses."""
        masks, now = [], state.copy()
        for i in part:
            trial = now.copy()
            trial[tuple(self.candidates[i])] = False
            masks.append(trial)
            now = trial if self.goes[i] else now
        self.result.n_runs += len(masks)
        return self.run(self.result.kept, self.reader, np.stack(masks))

    def _accept(self, state: NDArray[np.bool_], part: range, distances: NDArray[np.float64]) -> int:
        """Decide up to the first wrong guess; return the first candidate that is not decided."""
        here = self.result.distance
        wrong: int | None = None
        for i, distance in zip(part, distances.tolist(), strict=True):
            goes = distance - here < self.threshold
            if wrong is None:
                place = tuple(self.candidates[i])
                self.result.changes[place[0], self.reader, place[1]] = distance - here
                if goes:
                    state[place] = False
                    self.result.distance = distance
                if goes != self.goes[i]:
                    wrong = i
            # behind it, what the trials said of a slightly other circuit is the next guess
            here = distance if self.goes[i] else here
            self.goes[i] = goes
        return part.stop if wrong is None else wrong + 1
