"""Exact patches as `Work`: live patches are run; dead ones have the base metric."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from patchsweep.models.moves import Arriving
from patchsweep.results.rounding import NOISE
from patchsweep.runners.base import Loader, Runner
from patchsweep.spec.batch import Batch
from patchsweep.spec.finite import check_cells, check_references
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, PatchSet, SitePlan, Totals
from patchsweep.spec.shards import site_groups_of
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.layout import axes_of
from patchsweep.sweeps.noise import Floor, identity_patches

Load = Callable[[Batch, Intervention], Any]


class SiteWork:
    """What every `Work` that runs patches has: variables `<site>`, and more with `suffixes`."""

    suffixes: tuple[str, ...] = ()

    def __init__(self, request: Request, captures: Captures[Any], *, joins: bool = True) -> None:
        self.request, self.captures, self.joins = request, captures, joins
        self.plans = {plan.site.name: plan for plan in request.plans}
        self.site_groups = site_groups_of(request.plans)
        # variable -> site
        self.site_of = {n + suffix: n for suffix in ("", *self.suffixes) for n in self.plans}

    def __contains__(self, variable: str) -> bool:
        return variable in self.site_of

    def cost(self, unit: Unit) -> int:
        """See `Work`; counted with the variable of the site itself."""
        return self._totals(unit).token_layers

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        return self._totals(unit).n_live

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: a site's variables belong to one work item."""
        site = self.site_of[unit.variable]
        return self.site_groups[site] if self.joins else site, unit.pair_block, unit.layer_block

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`."""
        return references_of(self.captures, unit, len(self.request.metrics))

    def _totals(self, unit: Unit) -> Totals:
        plan = self.plans.get(unit.variable)
        return Totals(0, 0, 0) if plan is None else plan.totals(unit.pairs, unit.layers)


class ExactWork(SiteWork):
    """Fills `<site>` with the raw patched metric and, in runs with 16 bits or quantised weights,
    `<site>_noise` with the noise floor (see `noise`)."""

    suffixes = (NOISE,)

    def __init__(self, request: Request, runner: Runner, load: Load | None = None) -> None:
        super().__init__(request, Captures(request, runner, load), joins=runner.joins)
        self.runner = runner

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        return self.start(units).read()

    def start(self, units: Sequence[Unit]) -> Arriving[list[Values]]:
        """See `Starts`."""
        metrics, pairs = self.request.metrics, units[0].pairs
        blocks = {u: Block(self.plans[u.variable], u, len(metrics)) for u in units if self._is(u)}
        floors = {
            u: Floor(self.plans[self.site_of[u.variable]], pairs, len(metrics))
            for u in units
            if not self._is(u)
        }
        waiting: deque[_Running] = deque()

        def put_first() -> None:
            waiting[0].put(blocks.values(), floors.values(), metrics)
            waiting.popleft()  # after that: what could not be read is not passed over

        def read() -> list[Values]:
            while waiting:
                put_first()
            return [blocks[u].values() if u in blocks else floors[u].values for u in units]

        for captured in self.captures.of(pairs):
            live = [PatchSet(block.plan, block.fill_dead(captured)) for block in blocks.values()]
            null = [identity_patches(floor.plan, captured.batch.pairs) for floor in floors.values()]
            results = self.runner.start_together(captured.loaded, live, metrics, null)
            base = [
                captured.base_of(floor.plan, chosen.patches)
                for floor, chosen in zip(floors.values(), null, strict=True)
            ]
            waiting.append(_Running(results, live, null, base))
            while len(waiting) > 1 or (waiting and waiting[0].results.ready):
                put_first()
        return Arriving(read, ready=not waiting)

    def _is(self, unit: Unit) -> bool:
        """Whether the shard holds patched metrics, not noise."""
        return unit.variable in self.plans


@dataclass(frozen=True)
class _Running:
    """The patches of one captured batch, whose results may be on their way."""

    results: Arriving[list[Tensor]]  # of `live`, then of `null`
    live: list[PatchSet]
    null: list[PatchSet]
    base: list[Values]  # metrics [metric, patch] of the base runs of `null`

    def put(
        self, blocks: Iterable[Block], floors: Iterable[Floor], metrics: Sequence[Metric]
    ) -> None:
        """Put the results into the cells of `blocks` and `floors`; waits for them."""
        results = self.results.read()
        for block, ran, values in zip(blocks, self.live, results, strict=False):
            block.put(ran.patches, check_cells(values.numpy(), block.plan, ran.patches, metrics))
        null = zip(floors, self.null, self.base, results[len(self.live) :], strict=True)
        for floor, ran, base, values in null:
            floor.put(ran.patches, values.numpy() - base)


@dataclass(frozen=True)
class Captured:
    """A batch with its runner's captured state and its unpatched metrics."""

    batch: Batch
    loaded: Any  # what `Runner.load` returned
    base: Values  # [metric, pair of the batch]
    source: Values  # [metric, pair of the batch]

    def base_of(self, plan: SitePlan, patches: Ints) -> Values:
        """Return the base metric of each patch's pair, `[metric, patch]`."""
        local = self.batch.local
        return self.base[:, [local[p] for p in plan.pair[patches].tolist()]]


OneLoader = TypeVar("OneLoader", bound=Loader)


class Captures(Generic[OneLoader]):
    """Captured batches, kept only for the pairs of the last call: shards come in order of pairs.

    `load` captures a batch; default: the runner's.
    """

    def __init__(self, request: Request, runner: OneLoader, load: Load | None = None) -> None:
        self.request, self.runner = request, runner
        self._load = load or runner.load
        self._pairs, self._batches = range(0), list[Batch]()
        self._kept: dict[tuple[int, ...], Captured] = {}

    def of(self, pairs: range) -> Iterator[Captured]:
        """Yield the captured batches of `pairs`, one for each length."""
        request = self.request
        if pairs != self._pairs:
            self._pairs, self._batches = pairs, request.batches(pairs)
        present = {batch.pairs for batch in self._batches}
        self._kept = {key: kept for key, kept in self._kept.items() if key in present}
        for batch in self._batches:
            if batch.pairs not in self._kept:
                loaded = self._load(batch, request.intervention)
                references = self.runner.references(loaded, request.metrics)
                base, source = torch.stack(references).cpu().numpy()
                check_references(base, source, batch.pairs, request.metrics)
                self._kept[batch.pairs] = Captured(batch, loaded, base, source)
            yield self._kept[batch.pairs]


def measured_floor(
    runner: Runner, captures: Captures, plan: SitePlan, pairs: range, metrics: Sequence[Metric]
) -> Values:
    """Return the noise floor `[metric, pair]` of a site, from identity patches run alone."""
    floor = Floor(plan, pairs, len(metrics))
    for captured in captures.of(pairs):
        null = identity_patches(plan, captured.batch.pairs)
        (values,) = runner.run_together(captured.loaded, [], metrics, [null])
        floor.put(null.patches, values.numpy() - captured.base_of(plan, null.patches))
    return floor.values


def references_of(captures: Captures, unit: Unit, n_metrics: int) -> tuple[Values, Values]:
    """Return base and source metric `[metric, pair]` of the shard's pairs."""
    base, source = np.empty((2, n_metrics, len(unit.pairs)), np.float32)
    for captured in captures.of(unit.pairs):
        columns = [pair - unit.pairs.start for pair in captured.batch.pairs]
        base[:, columns], source[:, columns] = captured.base, captured.source
    return base, source


class Block:
    """The cells of one shard; NaN until put."""

    def __init__(self, plan: SitePlan, unit: Unit, n_metrics: int) -> None:
        self.plan, self.unit = plan, unit
        self.shape = (len(unit.pairs), len(unit.layers), *plan.shape[2:])
        self._cells = np.full((n_metrics, int(np.prod(self.shape))), np.nan, np.float32)

    def fill_dead(self, captured: Captured, value: float | None = None) -> Ints:
        """Set the batch's dead patches to `value` and return its live ones.

        Default: the base metric.
        """
        plan = self.plan
        patches = plan.patches(captured.batch.pairs, self.unit.layers)
        dead = patches[~plan.live[patches]]
        base = captured.base_of(plan, dead)
        self.put(dead, base if value is None else np.full_like(base, value))
        return patches[plan.live[patches]]

    def put(self, patches: Ints, values: Values) -> None:
        """Set the cells of `patches` to `values` `[metric, patch]`."""
        pair, layer, pos, units = np.unravel_index(self.plan.cell[patches], self.plan.shape)
        local = (pair - self.unit.pairs.start, layer - self.unit.layers.start, pos, units)
        self._cells[:, np.ravel_multi_index(local, self.shape)] = values

    def values(self) -> Values:
        """Return the cells in the store's shape, without axes that the site lacks."""
        axes = axes_of(self.plan, len(self._cells)) | {"pair": self.shape[0]}
        if "layer" in axes:
            axes["layer"] = self.shape[1]
        return self._cells.reshape(*axes.values())
