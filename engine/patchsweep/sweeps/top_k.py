"""Exact values of the top-k patches by estimate; each patch runs once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from patchsweep.runners.base import Runner
from patchsweep.spec.finite import check_cells
from patchsweep.spec.plan import Ints, SitePlan
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit
from patchsweep.sweeps.exact import Block, Captured, Captures, measured_floor, references_of
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.screen_settings import Screen, live_of


class TopK:
    """Ranks the places of each site by mean |estimate| over pairs, and runs the top k.

    `estimate_of` returns a site's estimates `[metric, pair, layer, pos, unit]`.
    """

    def __init__(
        self,
        request: Request,
        runner: Runner,
        screen: Screen,
        estimate_of: Callable[[SitePlan], Values],
    ) -> None:
        self.request, self.runner, self.screen = request, runner, screen
        self._estimate_of = estimate_of
        self.captures = Captures(request, runner)
        self._chosen: dict[str, NDArray[np.bool_]] = {}
        self._ran: dict[str, Values] = {}  # site -> [metric, patch], NaN until the patch runs

    def chosen(self, plan: SitePlan) -> NDArray[np.bool_]:
        """Return `[patch]`: whether each patch runs exactly."""
        name = plan.site.name
        if name not in self._chosen:
            self._chosen[name] = self._choose(plan)
        return self._chosen[name]

    def values(self, plan: SitePlan, unit: Unit) -> Values:
        """Return the shard's values: exact for selected and dead patches, NaN elsewhere."""
        selected = self.chosen(plan)
        block = Block(plan, unit, len(self.request.metrics))
        for captured in self.captures.of(unit.pairs):
            live = block.fill_dead(captured)
            patches = live[selected[live]]
            if len(patches):
                block.put(patches, self._run(captured, plan, patches))
        return block.values()

    def noise(self, plan: SitePlan, unit: Unit) -> Values:
        """Return the noise floor `[metric, pair]` of the shard's pairs."""
        metrics = self.request.metrics
        return measured_floor(self.runner, self.captures, plan, unit.pairs, metrics)

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """Return base and source metric `[metric, pair]` of the shard's pairs."""
        return references_of(self.captures, unit, len(self.request.metrics))

    def _choose(self, plan: SitePlan) -> NDArray[np.bool_]:
        screen = self.screen
        live = live_of(plan)
        sizes = np.where(live, np.abs(self._estimate_of(plan)[0].reshape(live.shape)), np.nan)
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
