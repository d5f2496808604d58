"""Work: what fills the units of a run, and the one loop that does it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from patchsweep.arguments import whole_number
from patchsweep.errors import ConfigError
from patchsweep.models.heartbeat import beating
from patchsweep.store.journal import Journal
from patchsweep.store.layout import Unit
from patchsweep.store.store import Store
from patchsweep.sweeps.layout import Memory

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

    def together(self, unit: Unit) -> Hashable:
        """Units for which this is equal are one work item; it follows from the layout alone."""

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """The blocks of all units of one work item, in the shapes that the store keeps."""

    def references(self, unit: Unit) -> tuple[Values, Values] | None:
        """Base and source metric `[metric, pair]` of the unit's pairs, where this work is the
        one that tells them: their last bits must not depend on which unit came first."""


@runtime_checkable
class Progress(Protocol):
    """Told how far a run is; token-layers are the unit of cost.

    An exception raised by `begin`, `item_done` or `waiting` ends the run, and nothing is lost
    then; one raised by `advance` loses what the work item's other units hold.
    """

    def begin(self, n_units: int, total: int, done: int) -> None:
        """`n_units` are to do; `total` token-layers are this process's, `done` of them before."""

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        """A unit was written; `seconds` are its share of its work item's."""

    def item_done(self) -> None:
        """All units of a work item were written and told of."""

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None:
        """Other processes are at work on the last `n_units`; called again and again.

        `holders`: how many of them each process holds, by its name."""


class Quiet:
    """No progress."""

    def begin(self, n_units: int, total: int, done: int) -> None: ...

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None: ...

    def item_done(self) -> None: ...

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None: ...


@dataclass(frozen=True)
class Share:
    """Which work items of a run one process does: every n-th."""

    index: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        whole_number("slice", self.index, error=ConfigError)
        whole_number("n_slices", self.n, least=1, error=ConfigError)
        if not 0 <= self.index < self.n:
            raise ConfigError(
                f"slice={self.index} of n_slices={self.n} does not exist; use 0..{self.n - 1}"
            )


@dataclass(frozen=True)
class WorkItem:
    """Units that are computed together, whichever of them are missing.

    The last bits of a value depend on the patches that shared its matrix products; so a run that
    was stopped, or shared out, ends in the bytes of one that was not.
    """

    work: Work
    units: tuple[Unit, ...]


def work_items_of(works: Sequence[Work], units: Sequence[Unit]) -> list[WorkItem]:
    """All of `units` in work items, in the order of their pairs."""
    found: dict[tuple[int, Hashable], list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.first_pair, unit.variable)):
        i = next(i for i, work in enumerate(works) if unit.variable in work)
        found.setdefault((i, works[i].together(unit)), []).append(unit)
    return [WorkItem(works[i], tuple(members)) for (i, _), members in found.items()]


def run_work(works: Sequence[Work], sink: Memory | Store, progress: Progress, share: Share) -> None:
    """Fill every unit of the share's work items that `sink` misses, or holds damaged.

    Units that another process holds are waited for, and taken over if it gives no sign for as
    long as a lease lasts.
    """
    if isinstance(sink, Memory):
        _run_work(works, sink, progress, share)
        return
    with beating(sink.beat):
        _run_work(works, sink, progress, share)


def _run_work(
    works: Sequence[Work], sink: Memory | Store, progress: Progress, share: Share
) -> None:
    every = sink.pending() if isinstance(sink, Memory) else sink.units()
    bundles = work_items_of(works, every)[share.index :: share.n]
    costs = {unit: bundle.work.cost(unit) for bundle in bundles for unit in bundle.units}
    missing = set(sink.pending() if isinstance(sink, Memory) else sink.pending(costs))
    # pairs whose unpatched metrics are to be written
    pairs = set(sink.pending_pairs())
    total = sum(costs.values())
    progress.begin(len(missing), total, total - sum(costs[unit] for unit in missing))
    for bundle, claimed in _claimed(sink, bundles, missing, progress):
        start = time.perf_counter()
        values = dict(zip(bundle.units, bundle.work.values(bundle.units), strict=True))
        seconds = time.perf_counter() - start
        shares = _shares([costs[unit] for unit in claimed])
        for unit, part in zip(claimed, shares, strict=True):
            _write_references(sink, bundle.work, unit, pairs)
            sink.write(unit, values[unit])
            progress.advance(unit, costs[unit], bundle.work.n_live(unit), seconds * part)
        progress.item_done()
    for bundle in bundles:  # whose units were done, and the unpatched metrics lost
        for unit in bundle.units if pairs else ():
            _write_references(sink, bundle.work, unit, pairs)


def _write_references(sink: Memory | Store, work: Work, unit: Unit, pairs: set[int]) -> None:
    """Write the unpatched metrics of those of the unit's pairs that are in `pairs`, which then
    are no longer, if `work` is the one that tells them."""
    if pairs.isdisjoint(unit.pairs):
        return
    found = work.references(unit)
    if found is not None:
        sink.write_references(unit.first_pair, *found)
        pairs.difference_update(unit.pairs)


def _claimed(
    sink: Memory | Store, bundles: Sequence[WorkItem], missing: set[Unit], progress: Progress
) -> Iterator[tuple[WorkItem, Sequence[Unit]]]:
    """Each work item when it is ours to do, with those of its units that are; ends when none of the
    `missing` is left, done by us or by others."""
    if isinstance(sink, Memory):
        yield from ((bundle, bundle.units) for bundle in bundles)
        return
    while missing:
        for bundle in bundles:
            wanted = [unit for unit in bundle.units if unit in missing]
            # who has the first goes on to the others, so that no two do one work item at once
            mine = sink.claim(wanted[:1])
            if mine:
                yield bundle, mine + sink.claim(wanted[1:])
        missing = set(sink.pending(missing))
        if missing:
            progress.waiting(len(missing), sink.holders(missing))
            time.sleep(WAIT_S)


def _shares(costs: Sequence[int]) -> list[float]:
    """What part of a work item's time is told of each of its units."""
    total = sum(costs)
    return [cost / total if total else 1 / len(costs) for cost in costs]


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

    def item_done(self) -> None:
        self._inner.item_done()

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None:
        self._inner.waiting(n_units, holders)
