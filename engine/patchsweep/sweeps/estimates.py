"""Estimates as `Work`: the variables of attribution methods, and the values of their shards."""

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
    """Return the name of the variable with a method's estimates of a site."""
    return f"{site}_{method}"


def is_signed(method: Method) -> bool:
    """Whether a method's estimates have a sign; GradDrop averages absolute values."""
    return not getattr(method, "grad_drop", False)


def variables_of(request: Request, methods: Sequence[Method]) -> tuple[Variable, ...]:
    """Return a variable for each site and method; a shard is some pairs and all layers."""
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
    """Computes shards of estimates; keeps all sites of a pass until their shards are written."""

    def __init__(
        self, request: Request, methods: Sequence[Method], *, tells_references: bool = True
    ) -> None:
        self.tells_references = tells_references
        # a copy with its own means: the exact runner may take them at other places (rotated q)
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
        """Return the token-layers of the shard: its part of the pass that gives all sites."""
        _, method = self._owner[unit.variable]
        total = token_layers(self.request, method)
        pairs = self.request.plans[0].full_lengths
        share = pairs[unit.pairs.start : unit.pairs.stop].sum() / pairs.sum()
        return round(total * share / len(self.request.plans))

    def n_live(self, unit: Unit) -> int:
        """Return the number of live patches that the shard estimates."""
        plan, _ = self._owner[unit.variable]
        return plan.totals(unit.pairs).n_live

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: one pass gives all sites, so their shards are one work item."""
        _, method = self._owner[unit.variable]
        return method.name, unit.pair_block

    def values(self, units: Sequence[Unit]) -> list[NDArray[np.float32]]:
        """See `Work`."""
        return [self._values(unit) for unit in units]

    def _values(self, unit: Unit) -> NDArray[np.float32]:
        plan, method = self._owner[unit.variable]
        return self.as_stored(plan, self._block(method, unit.pairs).cells[plan.site.name])

    def as_stored(self, plan: SitePlan, cells: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `cells` `[metric, pair, layer, pos, unit]` without axes that the site lacks."""
        shape = list(shape_of(plan, len(self.request.metrics)))
        shape[1] = cells.shape[1]
        return cells.reshape(shape)

    def blocks(self) -> list[range]:
        """Return all pairs, in the blocks that are estimated at once."""
        n, size = len(self.request.pairs), pairs_per_block(self.request.plans[0])
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    def references(self, unit: Unit) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return base and source metric `[metric, pair]` of the shard's pairs, or None.

        Only the first method gives them: their last bits must not depend on the order of work.
        """
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
