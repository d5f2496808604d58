"""Estimates as units of work: which variables a run gains, and the values of each unit."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from patchsweep.attribution.method import Method
from patchsweep.attribution.run import Attribution, BlockOfPairs, pairs_per_block, token_layers
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit, Variable
from patchsweep.sweeps.layout import dims_of, shape_of


def variable_name(site: str, method: str) -> str:
    """Where a store keeps a method's estimates of a site."""
    return f"{site}_{method}"


def is_signed(method: Method) -> bool:
    """Whether a method's estimates have a sign; GradDrop sums absolute values."""
    return not getattr(method, "grad_drop", False)


def variables_of(request: Request, methods: Sequence[Method]) -> tuple[Variable, ...]:
    """One variable for each site and method; a unit is some pairs and all layers."""
    return tuple(
        Variable(
            name=variable_name(plan.site.name, method.name),
            dims=dims_of(plan),
            shape=shape_of(plan, len(request.metrics)),
            unit=(pairs_per_block(plan), plan.shape[1]),
            attrs={
                "long_name": f"{method.name}: estimate of metric(patched) - metric(base) at "
                f"{plan.site.name}" + ("" if is_signed(method) else ", absolute"),
                "role": "estimate",
                "site": plan.site.name,
                "method": method.name,
                "sign": "signed" if is_signed(method) else "absolute",
            },
        )
        for method in methods
        for plan in request.plans
    )


class Estimator:
    """The values of units of estimates; the sites of one pass are kept until all are written."""

    def __init__(
        self, request: Request, methods: Sequence[Method], *, tells_references: bool = True
    ) -> None:
        self.tells_references = tells_references
        # means of its own: the exact runner may keep them of other places (rotated q)
        request = replace(request, intervention=deepcopy(request.intervention))
        self.attribution = Attribution(request, methods)
        self.request = request
        self._owner = {
            variable_name(plan.site.name, method.name): (plan, method)
            for method in methods
            for plan in request.plans
        }
        self._kept: dict[tuple[str, int], BlockOfPairs] = {}
        self._first = methods[0].name

    def __contains__(self, variable: str) -> bool:
        return variable in self._owner

    def cost(self, unit: Unit) -> int:
        """Token-layers of the unit: its share of the pass that gives all sites at once."""
        _, method = self._owner[unit.variable]
        whole = token_layers(self.request, method)
        pairs = self.request.plans[0].full_lengths
        share = pairs[unit.pairs.start : unit.pairs.stop].sum() / pairs.sum()
        return round(whole * share / len(self.request.plans))

    def n_live(self, unit: Unit) -> int:
        """Live patches that the unit estimates."""
        plan, _ = self._owner[unit.variable]
        return plan.totals(unit.pairs).n_live

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: a pass gives all sites at once."""
        _, method = self._owner[unit.variable]
        return method.name, unit.pair_block

    def values(self, units: Sequence[Unit]) -> list[NDArray[np.float32]]:
        """See `Work`."""
        return [self._values(unit) for unit in units]

    def _values(self, unit: Unit) -> NDArray[np.float32]:
        plan, method = self._owner[unit.variable]
        return self.as_stored(plan, self._block(method, unit.pairs).cells[plan.site.name])

    def as_stored(self, plan: SitePlan, cells: NDArray[np.float32]) -> NDArray[np.float32]:
        """`cells` `[metric, pair, layer, pos, unit]` without the axes that the site lacks."""
        shape = list(shape_of(plan, len(self.request.metrics)))
        shape[1] = cells.shape[1]
        return cells.reshape(shape)

    def blocks(self) -> list[range]:
        """All pairs, in the blocks that are estimated at once."""
        n, size = len(self.request.pairs), pairs_per_block(self.request.plans[0])
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    def references(self, unit: Unit) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Base and source metric of the unit's pairs; one method alone tells them, so that
        their last bits do not depend on which came first."""
        _, method = self._owner[unit.variable]
        if not self.tells_references or method.name != self._first:
            return None
        block = self._block(method, unit.pairs)
        return block.base_metric, block.source_metric

    def _block(self, method: Method, pairs: range) -> BlockOfPairs:
        key = (method.name, pairs.start)
        if key not in self._kept:
            for old in [old for old in self._kept if old[1] != pairs.start]:
                del self._kept[old]
            self._kept[key] = self.attribution.run(method, pairs)
        return self._kept[key]
