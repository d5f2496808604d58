"""Estimates as `Work`: the variables of attribution methods, and the values of their shards."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from patchsweep.attribution.estimates import Method, states_of
from patchsweep.attribution.run import Attribution, BlockOfPairs, pairs_per_block, token_layers
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit, Variable
from patchsweep.sweeps.layout import axes_of


def variable_name(site: str, method: str) -> str:
    """Return the name of the variable with a method's estimates of a site."""
    return f"{site}_{method}"


def is_signed(method: Method) -> bool:
    """Whether a method's estimates have a sign; GradDrop averages absolute values."""
    return not getattr(method, "grad_drop", False)


# role of a variable -> what it holds
_WORDS = {
    "estimate": "{method}: estimate of metric(patched) - metric(base){at}",
    "error": "{method}: error that the estimate{at} states",
    "residual": "{method}: what the estimates{at} add up to, minus the effect of the whole path",
    "nodes": "{method}: number of gradients in the integral{at}",
}


@dataclass(frozen=True)
class Part:
    """What a variable holds: a method's estimates of a plan, or what it states besides them."""

    plan: SitePlan
    method: Method
    role: str = "estimate"  # or one of `attribution.estimates.states_of`
    of_all: bool = False  # one path for all sites together

    @property
    def site(self) -> str:
        """Name of the site; "" if the variable is of all sites."""
        return "" if self.of_all else self.plan.site.name

    @property
    def name(self) -> str:
        """Name of the variable."""
        ending = () if self.role == "estimate" else (self.role,)
        return "_".join(name for name in (self.site, self.method.name, *ending) if name)

    @property
    def by_cell(self) -> bool:
        """Whether there is one number for each cell."""
        return self.role in ("estimate", "error")

    @property
    def dims(self) -> tuple[str, ...]:
        """Axes of the variable."""
        if self.by_cell:
            return tuple(axes_of(self.plan, 1))
        by_layer = self.plan.site.layered and not self.of_all
        return ("metric", "pair", *(("layer",) if by_layer else ()))

    def variable(self, n_metrics: int) -> Variable:
        """Return the variable; a shard is some pairs and all layers."""
        sizes = axes_of(self.plan, n_metrics)
        absolute = self.role == "estimate" and not is_signed(self.method)
        words = _WORDS[self.role].format(
            method=self.method.name, at=f" at {self.site}" if self.site else ""
        )
        attrs = {
            "long_name": words + ", absolute" * absolute,
            "role": self.role,
            "site": self.site,
            "method": self.method.name,
        }
        if self.role == "estimate":
            attrs["sign"] = "absolute" if absolute else "signed"
        return Variable(
            name=self.name,
            dims=self.dims,
            shape=tuple(sizes[dim] for dim in self.dims),
            unit=(pairs_per_block(self.plan), self.plan.shape[1]),
            attrs=attrs,
        )


def parts_of(request: Request, methods: Sequence[Method]) -> list[Part]:
    """Return what the variables of `methods` hold."""
    parts = []
    for method in methods:
        states = states_of(method)
        of_paths = [role for role in states if role != "error"]
        one_path = getattr(method, "needs_source", False)  # from prompt to prompt, for all sites
        for plan in request.plans:
            parts.append(Part(plan, method))
            if "error" in states:
                parts.append(Part(plan, method, "error"))
            if not one_path:
                parts += [Part(plan, method, role) for role in of_paths]
        if one_path:
            parts += [Part(request.plans[0], method, role, of_all=True) for role in of_paths]
    return parts


def variables_of(request: Request, methods: Sequence[Method]) -> tuple[Variable, ...]:
    """Return the variables of `methods`."""
    return tuple(part.variable(len(request.metrics)) for part in parts_of(request, methods))


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
        self._owner = {part.name: part for part in parts_of(request, methods)}
        self._kept: dict[tuple[str, int], BlockOfPairs] = {}
        self._first = methods[0].name

    def __contains__(self, variable: str) -> bool:
        return variable in self._owner

    def cost(self, unit: Unit) -> int:
        """Return the token-layers of the shard: its part of the pass that gives all sites."""
        part = self._owner[unit.variable]
        if part.role != "estimate":  # comes with the estimates
            return 0
        total = token_layers(self.request, part.method)
        pairs = self.request.plans[0].full_lengths
        share = pairs[unit.pairs.start : unit.pairs.stop].sum() / pairs.sum()
        return round(total * share / len(self.request.plans))

    def n_live(self, unit: Unit) -> int:
        """Return the number of live patches that the shard estimates."""
        part = self._owner[unit.variable]
        return 0 if part.role != "estimate" else part.plan.totals(unit.pairs).n_live

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: one pass gives all sites, so their shards are one work item."""
        return self._owner[unit.variable].method.name, unit.pair_block

    def values(self, units: Sequence[Unit]) -> list[NDArray[np.float32]]:
        """See `Work`."""
        return [self._values(unit) for unit in units]

    def _values(self, unit: Unit) -> NDArray[np.float32]:
        part = self._owner[unit.variable]
        block = self._block(part.method, unit.pairs)
        if part.role == "estimate":
            return self.as_stored(part.plan, block.cells[part.site])
        values = block.stated[part.site, part.role]
        if part.by_cell:
            return self.as_stored(part.plan, values)
        return values if "layer" in part.dims else values[..., 0]

    def as_stored(self, plan: SitePlan, cells: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return `cells` `[metric, pair, layer, pos, unit]` without axes that the site lacks."""
        axes = axes_of(plan, len(self.request.metrics)) | {"pair": cells.shape[1]}
        return cells.reshape(*axes.values())

    def blocks(self) -> list[range]:
        """Return all pairs, in the blocks that are estimated at once."""
        n, size = len(self.request.pairs), pairs_per_block(self.request.plans[0])
        return [range(i, min(i + size, n)) for i in range(0, n, size)]

    def references(self, unit: Unit) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return base and source metric `[metric, pair]` of the shard's pairs, or None.

        Only the first method gives them: their last bits must not depend on the order of work.
        """
        method = self._owner[unit.variable].method
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
