"""Work: what fills the units of a run, and the one loop that does it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import ConfigError
from patchsweep.results import Memory
from patchsweep.store import Store, Unit
from patchsweep.store.journal import Journal

WAIT_S = 1.0  # between two looks at units that other processes hold
Values = NDArray[np.float32]


@runtime_checkable
class Work(Protocol):
    """Knows how to fill the units of some variables."""

    def __contains__(self, variable: str) -> bool: ...

    def cost(self, unit: Unit) -> int:
        """Token-layers of the unit."""

    def n_live(self, unit: Unit) -> int:
        """Live patches in the unit."""

    def values(self, unit: Unit) -> Values:
        """The unit's block, in the shape that the store keeps."""

    def references(self, unit: Unit) -> tuple[Values, Values] | None:
        """Base and source metric `[metric, pair]` of the unit's pairs, where this work is the
        one that tells them: their last bits must not depend on which unit came first."""


@runtime_checkable
class Progress(Protocol):
    """Told how far a run is; token-layers are the unit of cost.

    An exception raised here ends the run between two units; nothing is lost then.
    """

    def begin(self, n_units: int, total: int, done: int) -> None:
        """`n_units` are to do; `total` token-layers are this process's, `done` of them before."""

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None: ...

    def waiting(self, n_units: int) -> None:
        """Other processes are at work on the last `n_units`; called again and again."""


class Quiet:
    """No progress."""

    def begin(self, n_units: int, total: int, done: int) -> None: ...

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None: ...

    def waiting(self, n_units: int) -> None: ...


@dataclass(frozen=True)
class Share:
    """Which units of a run one process does: every n-th."""

    index: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.n:
            raise ConfigError(
                f"slice={self.index} of n_slices={self.n} does not exist; "
                + (f"use 0..{self.n - 1}" if self.n > 0 else "n_slices is at least 1")
            )


def run_work(works: Sequence[Work], sink: Memory | Store, progress: Progress, share: Share) -> None:
    """Fill every unit of the `share` that `sink` still misses.

    Units that another process holds are waited for, and taken over if it dies.
    """
    every = sink.pending() if isinstance(sink, Memory) else sink.units()
    mine = sorted(every, key=lambda unit: (unit.first_pair, unit.variable))[share.index :: share.n]
    work_of = {v: next(w for w in works if v in w) for v in {unit.variable for unit in mine}}
    costs = {unit: work_of[unit.variable].cost(unit) for unit in mine}
    missing = set(sink.pending())
    pending = [unit for unit in mine if unit in missing]
    total = sum(costs.values())
    progress.begin(len(pending), total, total - sum(costs[unit] for unit in pending))
    told: set[int] = set()  # pairs whose unpatched metrics were written
    for unit in _claimed(sink, pending, progress):
        start = time.perf_counter()
        work = work_of[unit.variable]
        values = work.values(unit)
        found = None if told.issuperset(unit.pairs) else work.references(unit)
        if found is not None:
            for name, metrics in zip(("base_metric", "source_metric"), found, strict=True):
                for row, pair in enumerate(unit.pairs):
                    sink.write_fixed(name, pair, metrics[:, row : row + 1])
            told.update(unit.pairs)
        sink.write(unit, values)
        progress.advance(unit, costs[unit], work.n_live(unit), time.perf_counter() - start)


def _claimed(sink: Memory | Store, units: Sequence[Unit], progress: Progress) -> Iterator[Unit]:
    """Each of `units` when it is ours to do; ends when all are done, by us or by others."""
    if isinstance(sink, Memory):
        yield from units
        return
    left = list(units)
    while left:
        for unit in left:
            yield from sink.claim([unit])
        missing = set(sink.pending())
        left = [unit for unit in left if unit in missing]
        if left:
            progress.waiting(len(left))
            time.sleep(WAIT_S)


class Journalled:
    """A progress that is also written to the store's journal."""

    def __init__(
        self,
        inner: Progress,
        journal: Journal,
        share: Share,
        config: Mapping[str, Any],
        **details: Any,
    ) -> None:
        self._inner, self._journal, self._share = inner, journal, share
        self._config, self._details = dict(config), details

    def begin(self, n_units: int, total: int, done: int) -> None:
        self._journal.started(
            self._config,
            n_units=n_units,
            token_layers=total - done,
            slice=self._share.index,
            n_slices=self._share.n,
            **self._details,
        )
        self._inner.begin(n_units, total, done)

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        self._journal.unit_done(unit, seconds=seconds, token_layers=token_layers, n_live=n_live)
        self._inner.advance(unit, token_layers, n_live, seconds)

    def waiting(self, n_units: int) -> None:
        self._inner.waiting(n_units)
