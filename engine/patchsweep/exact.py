"""Exact patches as work: the live patches of units are run, the dead ones known."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchsweep.batch import Batch
from patchsweep.finite import check_cells, check_references
from patchsweep.planner import Ints, PatchSet, SitePlan
from patchsweep.request import Request, convoys_of
from patchsweep.results import shape_of
from patchsweep.runner import Runner
from patchsweep.store import Unit
from patchsweep.work import Values


class ExactWork:
    """The raw patched metric of every patch of a site, in the site's own variable."""

    def __init__(self, request: Request, runner: Runner) -> None:
        self.request, self.runner = request, runner
        self.plans = {plan.site.name: plan for plan in request.plans}
        self.convoys = convoys_of(request.plans)
        self.captures = Captures(request, runner)

    def __contains__(self, variable: str) -> bool:
        return variable in self.plans

    def cost(self, unit: Unit) -> int:
        """See `Work`."""
        plan = self.plans[unit.variable]
        return plan.totals(unit.pairs, unit.layers).token_layers

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        plan = self.plans[unit.variable]
        return plan.totals(unit.pairs, unit.layers).n_live

    def together(self, unit: Unit) -> Hashable:
        """See `Work`."""
        if not self.runner.joins:
            return unit
        return self.convoys[unit.variable], unit.pair_block, unit.layer_block

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        metrics = self.request.metrics
        blocks = [Block(self.plans[unit.variable], unit, len(metrics)) for unit in units]
        for captured in self.captures.of(units[0].pairs):
            sets = [PatchSet(block.plan, block.fill_dead(captured)) for block in blocks]
            found = self.runner.run_together(captured.loaded, sets, metrics)
            for block, ran, values in zip(blocks, sets, found, strict=True):
                numbers = check_cells(values.numpy(), block.plan, ran.patches, metrics)
                block.put(ran.patches, numbers)
        return [block.values() for block in blocks]

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`."""
        return references_of(self.captures, unit, len(self.request.metrics))


@dataclass(frozen=True)
class Captured:
    """A batch with what its runner loaded and its unpatched metrics."""

    batch: Batch
    loaded: Any  # the runner's own
    base: Values  # [metric, pair of the batch]
    source: Values  # [metric, pair of the batch]

    def base_of(self, plan: SitePlan, patches: Ints) -> Values:
        """The base metric of each patch's pair `[metric, patch]`."""
        local = self.batch.local
        return self.base[:, [local[p] for p in plan.pair[patches].tolist()]]


class Captures:
    """The captured batches of the present pairs: their units follow each other."""

    def __init__(self, request: Request, runner: Runner) -> None:
        self.request, self.runner = request, runner
        self._kept: dict[tuple[int, ...], Captured] = {}

    def of(self, pairs: range) -> Iterator[Captured]:
        """The batches of `pairs`, one for each length."""
        request = self.request
        batches = request.batches(pairs)
        present = {batch.pairs for batch in batches}
        self._kept = {key: kept for key, kept in self._kept.items() if key in present}
        for batch in batches:
            if batch.pairs not in self._kept:
                loaded = self.runner.load(batch, request.intervention)
                base, source = (
                    metrics.cpu().numpy()
                    for metrics in self.runner.references(loaded, request.metrics)
                )
                check_references(base, source, batch.pairs, request.metrics)
                self._kept[batch.pairs] = Captured(batch, loaded, base, source)
            yield self._kept[batch.pairs]


def references_of(captures: Captures, unit: Unit, n_metrics: int) -> tuple[Values, Values]:
    """Base and source metric `[metric, pair]` of the unit's pairs."""
    base, source = np.empty((2, n_metrics, len(unit.pairs)), np.float32)
    for captured in captures.of(unit.pairs):
        columns = [pair - unit.pairs.start for pair in captured.batch.pairs]
        base[:, columns], source[:, columns] = captured.base, captured.source
    return base, source


class Block:
    """The cells of one unit, as the store keeps them; NaN until put."""

    def __init__(self, plan: SitePlan, unit: Unit, n_metrics: int) -> None:
        self.plan, self.unit = plan, unit
        self.shape = (len(unit.pairs), len(unit.layers), *plan.shape[2:])
        self._cells = np.full((n_metrics, int(np.prod(self.shape))), np.nan, np.float32)

    def fill_dead(self, captured: Captured) -> Ints:
        """Put the base metric where a patch of the batch changes nothing; gives the others."""
        plan = self.plan
        patches = plan.patches(captured.batch.pairs, self.unit.layers)
        dead = patches[~plan.live[patches]]
        self.put(dead, captured.base_of(plan, dead))
        return patches[plan.live[patches]]

    def put(self, patches: Ints, values: Values) -> None:
        """Keep `values` `[metric, patch]`."""
        pair, layer, pos, units = np.unravel_index(self.plan.cell[patches], self.plan.shape)
        local = (pair - self.unit.pairs.start, layer - self.unit.layers.start, pos, units)
        self._cells[:, np.ravel_multi_index(local, self.shape)] = values

    def values(self) -> Values:
        """The block, without the axes that the site does not have."""
        n_metrics = len(self._cells)
        shape = list(shape_of(self.plan, n_metrics))
        shape[1] = self.shape[0]
        if self.plan.site.layered:
            shape[2] = self.shape[1]
        return self._cells.reshape(shape)
