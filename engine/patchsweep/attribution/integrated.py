"""Integrated gradients: the gradient averaged on the way from base to patched values.

Two ways to walk, named apart:

- `ig` moves one site of one layer, at all positions and heads together. Over the positions and
  heads of a layer the estimates sum to the effect of patching the whole layer at once, exactly
  in the limit of many steps; so one patch that covers all positions and heads is exact. How
  that effect is shared out among single patches is still an approximation.
- `ig_inputs` moves the token embeddings and takes the gradient at every site on the way
  (EAP-IG, Hanna et al., arXiv 2403.17806). It is complete at the embeddings alone. At any
  other site it multiplies the whole change of the activation with gradients taken along a path
  which that activation does not follow in proportion: the sum over a layer is **not** the
  effect of patching that layer.

Nodes and weights are those of Gauss and Legendre on [0, 1].
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

# tokens of one forward pass; steps are stacked as rows up to this many
MAX_TOKENS = 4096


def nodes(n_steps: int) -> list[tuple[float, float]]:
    """Where on [0, 1] gradients are taken, and their weights.

    Raises:
        MethodError: there is no step, or no whole number of them.
    """
    whole_number("steps", n_steps, least=1, error=MethodError)
    x, w = np.polynomial.legendre.leggauss(n_steps)
    return [(float(a), float(b)) for a, b in zip((x + 1) / 2, w / 2, strict=True)]


@dataclass(frozen=True)
class IntegratedSite:
    """`ig`: each site's own activation is moved, layer by layer.

    It costs `n_steps` forward and backward passes from every layer of every site on: for short
    prompts about what exact patching of the same site costs.
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
        """See `Method`: a walk from layer L on passes the n - L blocks from there."""
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

            share = torch.tensor([x for x, _ in part], device=start.device)
            share = share.repeat_interleave(n_pairs).view(-1, *[1] * (start.ndim - 1))
            moved = torch.lerp(spread(start).float(), spread(values).float(), share)
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
                if grad is None:  # nothing that is read depends on it
                    continue
                for (_, weight), g in zip(part, grad.split(n_pairs), strict=True):
                    estimates.add(place[0], values, start, g, weight)


def layers_of(plan: SitePlan) -> list[int]:
    """The layers of a plan, each once."""
    return sorted({layer for layers in plan.axes.layers for layer in layers})


@dataclass(frozen=True)
class IntegratedInputs:
    """`ig_inputs`: the token embeddings are moved; all sites in `n_steps` forward and backwards.

    Not complete per component, see the module's docstring.
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
        for share, weight in nodes(self.n_steps):

            def visit(place: Place, x: Tensor, weight: float = weight) -> None:
                x.register_hook(lambda grad: add(place, grad, weight))

            def add(place: Place, grad: Tensor, weight: float) -> None:
                unmoved = base[place.site.name][place.layer]
                to = work.values(place.site, place.layer, unmoved)
                estimates.add(place, to, unmoved, place.flat(grad), weight)

            with torch.enable_grad():
                logits = work.tape.forward(
                    work.batch.base,
                    visit,
                    work.batch.reads,
                    sites=work.sites,
                    gradient=True,
                    embeds=torch.lerp(start, values, share),
                )
                backward_each(work.score(logits, base_logits), estimates)
        return Found(estimates, base_logits)

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return (SITES["embed"],)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`."""
        return 2 + self.n_steps * (1 + n_metrics)
