"""Attribution patching: the first-order change of the metric, from one gradient.

    estimate = sum over d of (patched value - base value) * gradient of the metric at the base

for every site, layer, position and head from two forward passes and one backward pass
(N. Nanda, Attribution Patching, 2023; Syed et al., arXiv 2310.10348). Where the metric bends
between base and patched run, and where a softmax saturates, it is wrong.
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
    """(values - base) · gradient, at every site in one backward pass."""

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
        """See `Method`: base, source, and one backward pass a metric."""
        return 2 + n_metrics


def differentiable_run(
    work: Work,
    estimates: Estimates,
    sites: tuple[Site, ...],
    *,
    fixed_pattern: bool = False,
    on_attention: Callable[[int, Heads], None] | None = None,
    after: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Tensor:
    """Logits of the base run; a backward pass from them fills `estimates` at `sites`.

    The product over d is taken as soon as a gradient comes, so that no gradient is kept.
    """

    def visit(place: Place, x: Tensor) -> None:
        # the hook must not hold `x` itself: it hangs on x, and the two would never be freed
        base = x.detach()

        def on_gradient(grad: Tensor) -> None:
            flat = place.flat(base)
            values = work.values(place.site, place.layer, flat)
            estimates.add(place, values, flat, place.flat(grad))

        x.register_hook(on_gradient)

    with torch.enable_grad():
        return work.tape.forward(
            work.batch.base,
            visit,
            work.batch.reads,
            sites=sites,
            gradient=True,
            fixed_pattern=fixed_pattern,
            on_attention=on_attention,
            after=after,
        )
