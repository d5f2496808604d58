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
from patchsweep.forward.grad import Place
from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import Site


class OneGradient:
    """A method that needs no further sites; by default one backward pass from the base run."""

    fixed_pattern = False  # attention patterns are constants

    def rules(self, unwrapped: UnwrappedModel) -> AbstractContextManager[None]:
        """Return the context in which the graph of the backward pass is built."""
        return nullcontext()

    def run(self, work: Work) -> Found:
        """See `Method`."""
        estimates = work.empty()
        with self.rules(work.gradients.unwrapped):
            logits = differentiable_run(
                work, estimates, work.sites, fixed_pattern=self.fixed_pattern
            )
        # outside the rules: the metric has its ordinary gradient
        backward_each(work.score(logits, logits.detach()), estimates)
        return Found(estimates, logits.detach())

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return ()

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`: the base run, the source run and one backward pass per metric."""
        return 2 + n_metrics


@dataclass(frozen=True)
class Atp(OneGradient):
    """Estimate (values - base) · gradient, for every site from one backward pass per metric."""

    name: str = "atp"
    at_base: bool = True


@dataclass(frozen=True)
class AtpEnds(OneGradient):
    """The mean of the estimates with the gradients of base and source run.

    The gradient of the source run multiplies the same change. Half the difference of the two is
    stated as the error: where it exceeds the estimate, the two ends dispute the sign.
    """

    name: str = "atp_ends"
    at_base: bool = False
    needs_source: bool = True
    states: tuple[str, ...] = ("error",)

    def run(self, work: Work) -> Found:
        """See `Method`. Both prompts are rows of one pass."""
        estimates, errors = work.empty(), work.empty()
        n_pairs = len(work.batch.pairs)

        def add_hook(place: Place, x: Tensor) -> None:
            base = place.flat(x.detach())[:n_pairs]

            def reduce(grad: Tensor) -> None:
                values = work.values(place.site, place.layer, base)
                ends = place.flat(grad).float()
                estimates.add(place, values, base, (ends[:n_pairs] + ends[n_pairs:]) / 2)
                errors.metric = estimates.metric
                errors.add(place, values, base, (ends[n_pairs:] - ends[:n_pairs]) / 2)

            x.register_hook(reduce)

        with torch.enable_grad():
            logits = work.forward(
                torch.cat([work.batch.base, work.batch.source]),
                add_hook,
                sites=work.sites,
                gradient=True,
            )
            base_logits = logits[:n_pairs].detach()
            backward_each(work.score(logits, base_logits), estimates)
        return Found(estimates, base_logits, errors)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`."""
        return 3 + 2 * n_metrics


def differentiable_run(
    work: Work,
    estimates: Estimates,
    sites: tuple[Site, ...],
    *,
    on_gradient: Callable[[Place, Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """Return the base run's logits; a backward pass from them fills `estimates` at `sites`.

    Each gradient is reduced over d in its hook, so that no gradient is kept. `sites` may hold more
    than those of `estimates`; `on_gradient` is called with the gradient at each of them. `options`
    are those of `GradientModel.forward`; `entries` gives other rows than the base run's.
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
        return work.forward(work.batch.base, add_hook, sites=sites, gradient=True, **options)
