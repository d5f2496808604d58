"""The protocol of work that fills shards, and the loop that runs it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.arguments import whole_number
from patchsweep.errors import ConfigError
from patchsweep.models.heartbeat import beating
from patchsweep.models.moves import Arriving
from patchsweep.store.journal import Journal
from patchsweep.store.layout import Layout, Unit
from patchsweep.store.store import Store
from patchsweep.sweeps.bar import Bar
from patchsweep.sweeps.layout import Memory

WAIT_S = 1.0  # between two checks of shards that other processes hold
Values = NDArray[np.float32]


@runtime_checkable
class Work(Protocol):
    """Fills the shards (`Unit`) of some variables."""

    def __contains__(self, variable: str) -> bool: ...

    def cost(self, unit: Unit) -> int:
        """Return the token-layers of the shard."""

    def n_live(self, unit: Unit) -> int:
        """Return the number of live patches in the shard."""

    def together(self, unit: Unit) -> Hashable:
        """Return the key of the shard's work item; it depends on the layout alone."""

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """Compute the values of all shards of one work item, in the shapes of the store."""

    def references(self, unit: Unit) -> tuple[Values, Values] | None:
        """Return base and source metric `[metric, pair]` of the shard's pairs, or None.

        One `Work` of a run gives them, so that their last bits do not depend on the order of work.
        """


@runtime_checkable
class Starts(Protocol):
    """What a `Work` may have besides."""

    def start(self, units: Sequence[Unit]) -> Arriving[list[Values]]:
        """Launch what `values` computes; a GPU may still run it when this returns.

        `units` have the same pairs.
        """


@runtime_checkable
class Progress(Protocol):
    """Receives the progress of a run; token-layers are the unit of cost.

    An exception from `begin`, `item_done` or `waiting` ends the run and loses nothing; one from
    `advance` loses the values of the work item's unwritten shards. On a GPU a work item is reported
    after the next one was begun.
    """

    def begin(self, n_units: int, total: int, done: int) -> None:
        """Start: `n_units` shards pending, `done` of this process's `total` token-layers done."""

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        """Report a written shard; `seconds` is its part of its work item's time."""

    def item_done(self) -> None:
        """Report that all shards of a work item were written and reported."""

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None:
        """Report, repeatedly, that other processes work on the last `n_units` shards.

        `holders`: process name -> number of those shards that it holds."""


@runtime_checkable
class Watching(Protocol):
    """What a `Progress` may have besides."""

    def stage(self, name: str) -> None:
        """Report the name of what begins next, such as a stage of an analysis."""

    def within(self, token_layers: int) -> None:
        """Report, once per block of a forward pass, what the running work item has done so far."""

    def end(self) -> None:
        """Report that no work item is left, or that the run ended by an error."""


class Quiet:
    """A `Progress` that reports nothing."""

    def begin(self, n_units: int, total: int, done: int) -> None: ...

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None: ...

    def item_done(self) -> None: ...

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None: ...


def check_progress(progress: Progress | bool | None) -> Progress:
    """Return `progress`; None or True: a bar on a terminal or in a notebook; False: silence.

    Raises:
        ConfigError: it lacks methods of `Progress`.
    """
    if progress is None or progress is True:
        return Bar()
    if progress is False:
        return Quiet()
    if not isinstance(progress, Progress):
        raise ConfigError(
            f"progress={progress!r} must be True, False, or have the methods of "
            "patchsweep.sweeps.executor.Progress"
        )
    return progress


def name_stage(progress: Progress, name: str) -> None:
    """Tell `progress` what begins next, if it listens."""
    if isinstance(progress, Watching):
        progress.stage(name)


@dataclass(frozen=True)
class Slice:
    """The slice of a run's work items that one process runs: every n-th.

    Raises:
        ConfigError: `index` is not in 0..n-1.
    """

    index: int = 0  # first work item
    n: int = 1  # number of slices

    def __post_init__(self) -> None:
        whole_number("slice", self.index, error=ConfigError)
        whole_number("n_slices", self.n, least=1, error=ConfigError)
        if not 0 <= self.index < self.n:
            raise ConfigError(
                f"slice={self.index} of n_slices={self.n} does not exist; use 0..{self.n - 1}"
            )


@dataclass(frozen=True)
class WorkItem:
    """Shards that are computed together, even if only some of them are missing.

    The last bits of a value depend on the patches that share its matrix products. Fixed work items
    give interrupted or divided runs the same bytes as undisturbed ones.
    """

    work: Work
    units: tuple[Unit, ...]


def work_items_of(works: Sequence[Work], units: Sequence[Unit]) -> list[WorkItem]:
    """Group `units` into work items, in the order of their pairs."""
    groups: dict[tuple[int, Hashable], list[Unit]] = {}
    for unit in sorted(units, key=lambda unit: (unit.first_pair, unit.variable)):
        i = next(i for i, work in enumerate(works) if unit.variable in work)
        groups.setdefault((i, works[i].together(unit)), []).append(unit)
    return [WorkItem(works[i], tuple(members)) for (i, _), members in groups.items()]


def run_work(
    works: Sequence[Work], sink: Memory | Store, progress: Progress, work_slice: Slice
) -> None:
    """Compute the missing and damaged shards of the slice's work items and write them to `sink`.

    Waits for shards that another process holds, and takes them over if that process writes no
    heartbeat for as long as a lease lasts.
    """
    within = _Within(progress)

    def on_beat(token_layers: int) -> None:
        if isinstance(sink, Store):
            sink.beat()
        within.add(token_layers)

    try:
        with beating(on_beat):
            _run_work(works, sink, progress, work_slice, within)
    finally:
        if isinstance(progress, Watching):
            progress.end()


class _Within:
    """Counts the token-layers of the running work item, and tells a `Watching` of them."""

    def __init__(self, progress: Progress) -> None:
        self._watching = progress if isinstance(progress, Watching) else None
        self._done = self._cost = 0

    def begin(self, cost: int) -> None:
        """Start a work item of so many token-layers."""
        self._done, self._cost = 0, cost

    def add(self, token_layers: int) -> None:
        """Count what a block of a forward pass did; unpatched runs count too, so it is capped."""
        if self._watching is not None:
            self._done += token_layers
            self._watching.within(min(self._done, self._cost))


def _run_work(
    works: Sequence[Work],
    sink: Memory | Store,
    progress: Progress,
    work_slice: Slice,
    within: _Within,
) -> None:
    all_units = sink.pending() if isinstance(sink, Memory) else sink.units()
    items = work_items_of(works, all_units)[work_slice.index :: work_slice.n]
    costs = {unit: item.work.cost(unit) for item in items for unit in item.units}
    missing = set(sink.pending() if isinstance(sink, Memory) else sink.pending(costs))
    # pairs whose unpatched metrics are pending
    pairs = set(sink.pending_pairs())
    total = sum(costs.values())
    progress.begin(len(missing), total, total - sum(costs[unit] for unit in missing))
    running = _Running(sink, progress, costs, pairs)
    try:
        for item, claimed in _claimed(sink, items, missing, progress, running.finish_all):
            within.begin(sum(costs[unit] for unit in claimed))
            running.start(item, claimed)
        running.finish_all()
    except BaseException:
        with suppress(Exception):  # what is computed is not lost; the first error is told
            running.finish_all()
        raise
    for item in items:  # unpatched metrics may be lost although the shards are done
        for unit in item.units if pairs else ():
            _write_references(sink, item.work, unit, pairs)


@dataclass
class _Started:
    """A work item whose values may be on their way from a GPU."""

    item: WorkItem
    claimed: Sequence[Unit]
    began: float  # time.perf_counter
    values: Arriving[list[Values]]
    # of the shards' pairs; None: to be asked for when the first shard is written
    references: tuple[Values, Values] | None


class _Running:
    """Starts work items, and writes the shards of each one after the next has been started.

    So a GPU computes while the host writes. Shards are written in the order of the work items.
    """

    def __init__(
        self,
        sink: Memory | Store,
        progress: Progress,
        costs: Mapping[Unit, int],
        pairs: set[int],
    ) -> None:
        self._sink, self._progress = sink, progress
        self._costs, self._pairs = costs, pairs
        self._started: deque[_Started] = deque()
        self._finished = -math.inf  # when the last work item's values were there

    def start(self, item: WorkItem, claimed: Sequence[Unit]) -> None:
        """Start `item`, and finish those before it; itself too if its values are there."""
        began = time.perf_counter()
        if isinstance(item.work, Starts):
            values = item.work.start(item.units)
        else:
            computed = item.work.values(item.units)
            values = Arriving(lambda: computed, ready=True)
        references = None
        if not values.ready and not self._pairs.isdisjoint(claimed[0].pairs):
            # later the work would have to run these pairs again
            references = item.work.references(claimed[0])
        self._started.append(_Started(item, claimed, began, values, references))
        while len(self._started) > 1 or (self._started and self._started[0].values.ready):
            self._finish_first()

    def finish_all(self) -> None:
        """Finish all work items that were started."""
        while self._started:
            self._finish_first()

    def _finish_first(self) -> None:
        first = self._started[0]
        values = dict(zip(first.item.units, first.values.read(), strict=True))
        self._started.popleft()
        # two work items run at once: each has the time from the end of the one before it
        now = time.perf_counter()
        seconds, self._finished = now - max(first.began, self._finished), now
        shares = _shares([self._costs[unit] for unit in first.claimed])
        for unit, part in zip(first.claimed, shares, strict=True):
            _write_references(self._sink, first.item.work, unit, self._pairs, first.references)
            self._sink.write(unit, values[unit])
            n_live = first.item.work.n_live(unit)
            self._progress.advance(unit, self._costs[unit], n_live, seconds * part)
        self._progress.item_done()


def _write_references(
    sink: Memory | Store,
    work: Work,
    unit: Unit,
    pairs: set[int],
    known: tuple[Values, Values] | None = None,
) -> None:
    """Write the unpatched metrics of the shard's pairs if some are in `pairs` and `work` gives
    them; removes these pairs from `pairs`. `known`: what `work` gave before."""
    if pairs.isdisjoint(unit.pairs):
        return
    references = known or work.references(unit)
    if references is not None:
        sink.write_references(unit.first_pair, *references)
        pairs.difference_update(unit.pairs)


def _claimed(
    sink: Memory | Store,
    bundles: Sequence[WorkItem],
    missing: set[Unit],
    progress: Progress,
    finish: Callable[[], None],
) -> Iterator[tuple[WorkItem, Sequence[Unit]]]:
    """Yield each claimed work item with its claimed shards, until this and other processes have
    done all of `missing`. Calls `finish`, which writes all that was yielded, before it looks again
    what is missing."""
    if isinstance(sink, Memory):
        yield from ((item, item.units) for item in bundles)
        return
    while missing:
        for item in bundles:
            candidates = [unit for unit in item.units if unit in missing]
            # claim the first shard alone, so that no two processes compute one work item at once
            claimed = sink.claim(candidates[:1])
            if claimed:
                yield item, claimed + sink.claim(candidates[1:])
        finish()
        missing = set(sink.pending(missing))
        if missing:
            progress.waiting(len(missing), sink.holders(missing))
            time.sleep(WAIT_S)


def _shares(costs: Sequence[int]) -> list[float]:
    """Return the fraction of a work item's time that is reported for each of its shards."""
    total = sum(costs)
    return [cost / total if total else 1 / len(costs) for cost in costs]


class Journalled:
    """Wraps a `Progress` and records it in the store's journal too."""

    def __init__(
        self,
        inner: Progress,
        journal: Journal,
        work_slice: Slice,
        config: Mapping[str, Any],
        **details: Any,
    ) -> None:
        self._inner, self._journal, self._slice = inner, journal, work_slice
        self._config, self._details = dict(config), details

    def begin(self, n_units: int, total: int, done: int) -> None:
        self._journal.started(
            self._config,
            n_units=n_units,
            token_layers=total - done,
            slice=self._slice.index,
            n_slices=self._slice.n,
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

    def stage(self, name: str) -> None:
        name_stage(self._inner, name)

    def within(self, token_layers: int) -> None:
        if isinstance(self._inner, Watching):
            self._inner.within(token_layers)

    def end(self) -> None:
        if isinstance(self._inner, Watching):
            self._inner.end()


def run_into(
    store: str | Path | None,
    layout: Layout,
    works: Callable[[Mapping[str, Any]], Sequence[Work]],
    progress: Progress,
    work_slice: Slice,
    *,
    storage_options: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    **details: Any,
) -> xr.Dataset:
    """Run works into memory, or into a store whose journal notes them; return all results.

    `works(attributes)` makes the works; the attributes are those of the process that created the
    store. `config` and `details` are for the journal.
    """
    if store is None:
        memory = Memory(layout)
        run_work(works(layout.attrs), memory, progress, work_slice)
        return memory.dataset()
    place: dict[str, Any] = {"storage_options": storage_options}
    with Store.create_or_resume(store, layout, **place) as sink, Journal(store, **place) as journal:
        noted = Journalled(progress, journal, work_slice, config or {}, **details)
        run_work(works(sink.attrs), sink, noted, work_slice)
        return sink.dataset()
