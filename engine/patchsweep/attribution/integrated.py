"""Integrated gradients: the gradient averaged along a path from base to patched values.

Two methods differ in the path:

- `ig` interpolates one site of one layer, at all positions and heads together. The estimates of
  a layer sum over positions and heads to the effect of patching the whole layer, exactly in the
  limit of many steps; so one patch that covers all positions and heads is exact. The division
  of that effect among single patches remains an approximation.
- `ig_inputs` interpolates the token embeddings and takes the gradient at every site
  (EAP-IG, Hanna et al., arXiv 2403.17806). It is complete only at the embeddings. At any other
  site it multiplies the full change of the activation by gradients along a path that the
  activation itself does not follow in proportion: the sum over a layer is **not** the effect
  of patching that layer.

Nodes and weights are those of Gauss-Legendre quadrature on [0, 1].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsweep.arguments import whole_number
from patchsweep.attribution.estimates import Estimates, Found, Work, backward_each
from patchsweep.errors import MethodError
from patchsweep.forward.grad import Place
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import SITES, Site

# most tokens of one forward pass; steps are stacked as rows up to this number
MAX_TOKENS = 4096


def nodes(n_steps: int) -> list[tuple[float, float]]:
    """Return (node in [0, 1], weight) of each of the `n_steps` gradients.

    Raises:
        MethodError: `n_steps` is not a whole number of at least 1.
    """
    whole_number("n_steps", n_steps, least=1, error=MethodError)
    x, w = np.polynomial.legendre.leggauss(n_steps)
    return [(float(a), float(b)) for a, b in zip((x + 1) / 2, w / 2, strict=True)]


@dataclass(frozen=True)
class IntegratedSite:
    """`ig`: interpolates each site's own activation, layer by layer.

    For every layer of every site it makes `n_steps` forward and backward passes through the
    blocks from that layer on: for short prompts about the cost of exact patching of the site.
    """

    n_steps: int = 5
    name: str = "ig"
    at_base: bool = False

    def __post_init__(self) -> None:
        nodes(self.n_steps)

    def run(self, work: Work) -> Found:
        """See `Method`."""
        sites = {site.name: site for site in (*work.sites, SITES["resid_pre"])}
        base, logits = work.tape.activations(work.batch.base, work.batch.reads, [*sites.values()])
        estimates = work.empty()
        for plan in work.plans:
            for layer in layers_of(plan):
                self._layer(work, estimates, plan.site, layer, base, logits)
        return Found(estimates, logits)

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return (SITES["resid_pre"],)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`: a pass from layer L runs n_layers - L blocks."""
        blocks = sum(n_layers - layer for plan in plans for layer in layers_of(plan))
        return 2 + self.n_steps * (1 + n_metrics) * blocks / n_layers

    def _layer(
        self,
        work: Work,
        estimates: Estimates,
        site: Site,
        layer: int,
        base: dict[str, list[Tensor]],
        base_logits: Tensor,
    ) -> None:
        start = base[site.name][layer]
        values = work.values(site, layer, start)
        n_pairs, length = work.batch.base.shape
        all_nodes = nodes(self.n_steps)
        per_pass = max(1, MAX_TOKENS // (n_pairs * length))
        for first in range(0, len(all_nodes), per_pass):
            part = all_nodes[first : first + per_pass]
            n = len(part)

            def spread(x: Tensor, n: int = n) -> Tensor:
                return x.repeat(n, *[1] * (x.ndim - 1))

            fraction = torch.tensor([x for x, _ in part], device=start.device)
            fraction = fraction.repeat_interleave(n_pairs).view(-1, *[1] * (start.ndim - 1))
            moved = torch.lerp(spread(start).float(), spread(values).float(), fraction)
            leaf = moved.to(start.dtype).requires_grad_()
            place: list[Place] = []

            def visit(
                here: Place, x: Tensor, leaf: Tensor = leaf, place: list[Place] = place
            ) -> None:
                if here.layer == layer:
                    here.write(x, leaf)
                    place.append(here)

            with torch.enable_grad():
                logits = work.tape.forward(
                    spread(work.batch.base),
                    visit,
                    work.batch.reads,
                    sites=[site],
                    first_layer=layer,
                    stream=spread(base["resid_pre"][layer]) if site.layered else None,
                )
                scores = work.score(logits, base_logits)
            for metric, row in enumerate(scores):
                estimates.metric = metric
                (grad,) = torch.autograd.grad(
                    row.sum(), leaf, retain_graph=metric + 1 < len(scores), allow_unused=True
                )
                if grad is None:  # no metric depends on this activation
                    continue
                for (_, weight), g in zip(part, grad.split(n_pairs), strict=True):
                    estimates.add(place[0], values, start, g, weight)


def layers_of(plan: SitePlan) -> list[int]:
    """Return the distinct layers of a plan, ascending."""
    return sorted({layer for layers in plan.axes.layers for layer in layers})


@dataclass(frozen=True)
class IntegratedInputs:
    """`ig_inputs`: interpolates the token embeddings; `n_steps` passes cover all sites.

    Estimates are not complete per component, see the module's docstring.
    """

    n_steps: int = 10
    name: str = "ig_inputs"
    at_base: bool = False

    def __post_init__(self) -> None:
        nodes(self.n_steps)

    def run(self, work: Work) -> Found:
        """See `Method`."""
        embed = SITES["embed"]
        sites = {site.name: site for site in (*work.sites, embed)}
        base, base_logits = work.tape.activations(
            work.batch.base, work.batch.reads, [*sites.values()]
        )
        start = base["embed"][0]
        values = work.values(embed, 0, start)
        estimates = work.empty()
        for fraction, weight in nodes(self.n_steps):

            def visit(place: Place, x: Tensor, weight: float = weight) -> None:
                x.register_hook(lambda grad: add(place, grad, weight))

            def add(place: Place, grad: Tensor, weight: float) -> None:
                site_base = base[place.site.name][place.layer]
                site_values = work.values(place.site, place.layer, site_base)
                estimates.add(place, site_values, site_base, place.flat(grad), weight)

            with torch.enable_grad():
                logits = work.tape.forward(
                    work.batch.base,
                    visit,
                    work.batch.reads,
                    sites=work.sites,
                    gradient=True,
                    embeds=torch.lerp(start, values, fraction),
                )
                backward_each(work.score(logits, base_logits), estimates)
        return Found(estimates, base_logits)

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return (SITES["embed"],)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`."""
        return 2 + self.n_steps * (1 + n_metrics)
