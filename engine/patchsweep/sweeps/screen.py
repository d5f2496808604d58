"""A screen as `Work`: estimates, then exact values of the top k, then a bound on the rest."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import cached_property

import numpy as np

from patchsweep.results.rounding import NOISE
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit
from patchsweep.sweeps.estimates import Estimator, variable_name
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.methods import bound_name
from patchsweep.sweeps.screen_bound import Subsets
from patchsweep.sweeps.screen_settings import Screen
from patchsweep.sweeps.top_k import TopK


class ScreenWork:
    """Fills all variables of a screen.

    Computes the estimates of all pairs on first use; a resumed run computes them again and
    continues with the missing patches.
    """

    def __init__(self, request: Request, choice: RunnerChoice, screen: Screen) -> None:
        self.request, self.screen = request, screen
        self.estimator = Estimator(request, (screen.method,), tells_references=False)
        self.top_k = TopK(
            request, choice.runner, screen, lambda plan: self._estimates[plan.site.name]
        )
        self._plans = {plan.site.name: plan for plan in request.plans}
        self._estimated = {
            variable_name(name, screen.method.name): plan for name, plan in self._plans.items()
        }
        self._bounded = {bound_name(name): plan for name, plan in self._plans.items()}
        self._noise = {name + NOISE: plan for name, plan in self._plans.items()}
        self._others = (self._estimated, self._bounded, self._noise)

    def __contains__(self, variable: str) -> bool:
        return any(variable in known for known in (self._plans, *self._others))

    def cost(self, unit: Unit) -> int:
        """See `Work`; of an exact shard: the mean cost of a patch times the least number run."""
        if unit.variable in self._estimated:
            return self.estimator.cost(unit)
        if unit.variable in self._bounded:
            return self.screen.bound_cost(self._bounded[unit.variable], unit.pairs)
        if unit.variable in self._noise:
            return 0
        plan = self._plans[unit.variable]
        return round(plan.totals(unit.pairs, unit.layers).token_layers * self.screen.share_of(plan))

    def n_live(self, unit: Unit) -> int:
        """See `Work`; of an exact shard: the expected number before the ranking is known."""
        if unit.variable in self._plans:
            plan = self._plans[unit.variable]
            return round(plan.totals(unit.pairs, unit.layers).n_live * self.screen.share_of(plan))
        return 0

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: each shard is its own work item."""
        return unit

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        return [self._values(unit) for unit in units]

    def _values(self, unit: Unit) -> Values:
        if unit.variable in self._estimated:
            return self._estimate(unit)
        if unit.variable in self._bounded:
            return self._bound(self._bounded[unit.variable], unit)
        if unit.variable in self._noise:
            return self.top_k.noise(self._noise[unit.variable], unit)
        return self.top_k.values(self._plans[unit.variable], unit)

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`."""
        return self.top_k.references(unit)

    @cached_property
    def _estimates(self) -> Mapping[str, Values]:
        """Site -> estimates `[metric, pair, layer, pos, unit]` of all pairs."""
        blocks = [
            self.estimator.attribution.run(self.screen.method, pairs)
            for pairs in self.estimator.blocks()
        ]
        return {
            name: np.concatenate([block.cells[name] for block in blocks], axis=1)
            for name in self._plans
        }

    def _estimate(self, unit: Unit) -> Values:
        plan = self._estimated[unit.variable]
        cells = self._estimates[plan.site.name][:, unit.pairs.start : unit.pairs.stop]
        return self.estimator.as_stored(plan, cells)

    def _bound(self, plan: SitePlan, unit: Unit) -> Values:
        live = plan.live_patches()
        rest = live[~self.top_k.chosen(plan)[live]]
        gradient_model = self.estimator.attribution.gradients
        subsets = Subsets(self.estimator.request, gradient_model, plan, self.screen)
        return subsets.bounds(rest, unit.pairs)
