"""Attribution patching: the first-order change of the metric, from one gradient.

    estimate = sum over d of (patched value - base value) * gradient of the metric at the base

Two forward passes and one backward pass give the estimate for every site, layer, position and
head (N. Nanda, Attribution Patching, 2023; Syed et al., arXiv 2310.10348). The estimate is wrong
where the metric is nonlinear between base and patched run, and where a softmax saturates.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchsweep.attribution.estimates import Estimates, Found, Work, backward_each
from patchsweep.forward.grad import Heads, Place
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import Site


@dataclass(frozen=True)
class Atp:
    """Estimate (values - base) · gradient, for every site from one backward pass per metric."""

    name: str = "atp"
    at_base: bool = True

    def run(self, work: Work) -> Found:
        """See `Method`."""
        estimates = work.empty()
        logits = differentiable_run(work, estimates, work.sites)
        backward_each(work.score(logits, logits.detach()), estimates)
        return Found(estimates, logits.detach())

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return ()

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`: the base run, the source run and one backward pass per metric."""
        return 2 + n_metrics


def differentiable_run(
    work: Work,
    estimates: Estimates,
    sites: tuple[Site, ...],
    *,
    fixed_pattern: bool = False,
    on_attention: Callable[[int, Heads], None] | None = None,
    on_output: Callable[[int, Tensor], None] | None = None,
    on_gradient: Callable[[Place, Tensor], None] | None = None,
    after: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Return the base run's logits; a backward pass from them fills `estimates` at `sites`.

    Each gradient is reduced over d in its hook, so that no gradient is kept. `sites` may hold more
    than those of `estimates`; `on_gradient` is called with the gradient at each of them.
    """

    def add_hook(place: Place, x: Tensor) -> None:
        # x holds the hook, so a hook that held x would keep both alive for ever
        base = x.detach()

        def reduce(grad: Tensor) -> None:
            if on_gradient is not None:
                on_gradient(place, place.flat(grad).detach())
            if place.site.name in estimates.plans:
                flat = place.flat(base)
                values = work.values(place.site, place.layer, flat)
                estimates.add(place, values, flat, place.flat(grad))

        x.register_hook(reduce)

    with torch.enable_grad():
        return work.forward(
            work.batch.base,
            add_hook,
            sites=sites,
            gradient=True,
            fixed_pattern=fixed_pattern,
            on_attention=on_attention,
            on_output=on_output,
            after=after,
        )
