"""A screen as `Work`: estimates, then exact values of the top k, then a bound on the rest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.results.rounding import NOISE
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.finite import check_cells
from patchsweep.spec.plan import Ints, SitePlan
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit
from patchsweep.sweeps.estimates import Estimator
from patchsweep.sweeps.exact import Block, Captured, Captures, SiteWork, measured_floor
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.methods import BOUND
from patchsweep.sweeps.screen_bound import Subsets
from patchsweep.sweeps.screen_settings import Screen, live_of


class ScreenWork(SiteWork):
    """Fills all variables of a screen.

    Computes the estimates of all pairs on first use, ranks the places of each site by mean
    |estimate| over pairs, and runs the top k, each patch once. A resumed run computes the estimates
    again and continues with the missing patches.
    """

    def __init__(self, request: Request, choice: RunnerChoice, screen: Screen) -> None:
        self.runner, self.screen = choice.runner, screen
        self._estimate = f"_{screen.method.name}"
        self.suffixes = (NOISE, BOUND, self._estimate)
        super().__init__(request, Captures(request, self.runner))
        self.estimator = Estimator(request, (screen.method,), tells_references=False)
        self._chosen: dict[str, NDArray[np.bool_]] = {}
        self._ran: dict[str, Values] = {}  # site -> [metric, patch], NaN until the patch runs

    def cost(self, unit: Unit) -> int:
        """See `Work`; of an exact shard: the mean cost of a patch times the least number run."""
        plan, suffix = self._of(unit)
        if suffix == self._estimate:
            return self.estimator.cost(unit)
        if suffix == BOUND:
            return self.screen.bound_cost(plan, unit.pairs)
        return round(super().cost(unit) * self.screen.share_of(plan))

    def n_live(self, unit: Unit) -> int:
        """See `Work`; of an exact shard: the expected number before the ranking is known."""
        return round(super().n_live(unit) * self.screen.share_of(self._of(unit)[0]))

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: each shard is its own work item."""
        return unit

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        return [self._values(unit) for unit in units]

    def _of(self, unit: Unit) -> tuple[SitePlan, str]:
        """Return the plan of a shard's site, and the suffix of its variable."""
        site = self.site_of[unit.variable]
        return self.plans[site], unit.variable.removeprefix(site)

    def _values(self, unit: Unit) -> Values:
        plan, suffix = self._of(unit)
        if suffix == self._estimate:
            cells = self._estimates[plan.site.name][:, unit.pairs.start : unit.pairs.stop]
            return self.estimator.as_stored(plan, cells)
        if suffix == BOUND:
            live = plan.live_patches()
            subsets = Subsets(
                self.estimator.request, self.estimator.attribution.gradients, plan, self.screen
            )
            return subsets.bounds(live[~self._selected(plan)[live]], unit.pairs)
        if suffix == NOISE:
            metrics = self.request.metrics
            return measured_floor(self.runner, self.captures, plan, unit.pairs, metrics)
        return self._exact(plan, unit)

    def _exact(self, plan: SitePlan, unit: Unit) -> Values:
        """Return the shard's values: exact for selected and dead patches, NaN elsewhere."""
        selected = self._selected(plan)
        block = Block(plan, unit, len(self.request.metrics))
        for captured in self.captures.of(unit.pairs):
            live = block.fill_dead(captured)
            patches = live[selected[live]]
            if len(patches):
                block.put(patches, self._run(captured, plan, patches))
        return block.values()

    @cached_property
    def _estimates(self) -> Mapping[str, Values]:
        """Site -> estimates `[metric, pair, layer, pos, unit]` of all pairs."""
        blocks = [
            self.estimator.attribution.run(self.screen.method, pairs)
            for pairs in self.estimator.blocks()
        ]
        return {
            name: np.concatenate([block.cells[name] for block in blocks], axis=1)
            for name in self.plans
        }

    def _selected(self, plan: SitePlan) -> NDArray[np.bool_]:
        """Return `[patch]`: whether each patch runs exactly."""
        name = plan.site.name
        if name not in self._chosen:
            self._chosen[name] = self._choose(plan)
        return self._chosen[name]

    def _choose(self, plan: SitePlan) -> NDArray[np.bool_]:
        screen, live = self.screen, live_of(plan)
        estimates = self._estimates[plan.site.name][0].reshape(live.shape)
        sizes = np.where(live, np.abs(estimates), np.nan)
        has_live = live.any(axis=0)
        score = np.where(has_live, np.nansum(sizes, axis=0) / np.maximum(1, live.sum(axis=0)), -1.0)
        order = np.argsort(-score, kind="stable")[: int(has_live.sum())]
        patches = plan.patches()
        place = plan.cell[patches] % live.shape[1]
        n = screen.k
        while screen.margin is not None and n < len(order):
            effects = np.sort(self._mean_effect(plan, order[:n]))[::-1]
            largest_left = score[order[n:]].max(initial=0.0)
            if effects[screen.k - 1] >= (1 + screen.margin) * largest_left:
                break
            n += screen.k
        selected: NDArray[np.bool_] = plan.live[patches] & np.isin(place, order[:n])
        return selected

    def _mean_effect(self, plan: SitePlan, places: Ints) -> NDArray[np.float64]:
        """Run `places` and return |value - base| of the first metric, averaged over pairs."""
        n_places = int(np.prod(plan.shape[1:]))
        total, count = np.zeros((2, n_places))
        for pair in range(len(self.request.pairs)):
            for captured in self.captures.of(range(pair, pair + 1)):
                patches = plan.live_patches([pair])
                patches = patches[np.isin(plan.cell[patches] % n_places, places)]
                if len(patches):
                    values = self._run(captured, plan, patches)
                    effect = values[0].astype(np.float64) - captured.base_of(plan, patches)[0]
                    total[plan.cell[patches] % n_places] += np.abs(effect)
                    count[plan.cell[patches] % n_places] += 1
        mean: NDArray[np.float64] = total[places] / np.maximum(1, count[places])
        return mean

    def _run(self, captured: Captured, plan: SitePlan, patches: Ints) -> Values:
        """Return raw metrics `[metric, patch]`; runs only patches that have not run before."""
        metrics = self.request.metrics
        ran = self._ran.setdefault(
            plan.site.name, np.full((len(metrics), plan.n_patches), np.nan, np.float32)
        )
        new = patches[np.isnan(ran[0, patches])]
        if len(new):
            values = self.runner.run(captured.loaded, plan, new, metrics).numpy()
            ran[:, new] = check_cells(values, plan, new, metrics)
        return ran[:, patches]
