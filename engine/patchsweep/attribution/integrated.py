"""Integrated gradients: the gradient averaged along a path from base to patched values.

Two methods differ in the path:

- `ig` interpolates one site of one layer, at all positions and heads together. The estimates of
  a layer sum over positions and heads to the effect of patching the whole layer, exactly in the
  limit of many nodes; so one patch that covers all positions and heads is exact. The division
  of that effect among single patches remains an approximation.
- `ig_inputs` interpolates the token embeddings and takes the gradient at every site
  (EAP-IG, Hanna et al., arXiv 2403.17806). It is complete only at the embeddings. At any other
  site it multiplies the full change of the activation by gradients along a path that the
  activation itself does not follow in proportion: the sum over a layer is **not** the effect
  of patching that layer.

The nodes of an integral are rows of one batch. Every estimate comes with the error of its
integral, see `attribution.quadrature`, and with a residual: what the estimates of one path add up
to, minus the effect that a run to the path's end gives.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchsweep.attribution.budget import token_layers_per_pass
from patchsweep.attribution.estimates import Found, Work
from patchsweep.attribution.integral import Integral, Key
from patchsweep.attribution.quadrature import Path, Rule, Steps
from patchsweep.forward.grad import Activations, Place
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import SITES, Site


@dataclass(frozen=True)
class _Integrated:
    """The settings of both methods, see `Path`."""

    n_steps: Steps
    rule: Rule = "gauss"
    rtol: float = 1e-2

    def __post_init__(self) -> None:
        _ = self.path

    @property
    def path(self) -> Path:
        """The nodes."""
        return Path(self.n_steps, self.rule, self.rtol)

    @property
    def states(self) -> tuple[str, ...]:
        """See `estimates.states_of`."""
        return ("error", "residual", *(("nodes",) if self.path.adds_nodes else ()))


@dataclass(frozen=True)
class IntegratedSite(_Integrated):
    """`ig`: interpolates each site's own activation, layer by layer.

    A node of a layer is a row that enters the model at that layer: about the cost of exact patches
    of as many whole layers.
    """

    n_steps: Steps = 5
    name: str = "ig"
    at_base: bool = False

    def run(self, work: Work) -> Found:
        """See `Method`."""
        sites = {site.name: site for site in (*work.sites, SITES["resid_pre"])}
        base = work.base_run([*sites.values()])
        keys = [(plan.site.name, layer) for plan in work.plans for layer in layers_of(plan)]
        keys.sort(key=lambda key: key[1])
        integral = Integral(work, self.path, keys, base.logits)
        for nodes, rows in integral.rounds():
            pairs = sorted({pair for of_key in rows.values() for pair in of_key})
            for group in _groups(work, [*rows], nodes, len(pairs)):
                _site_pass(work, base, integral, group, pairs)
        return integral.found()

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return (SITES["resid_pre"],)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`: a row from layer L runs n_layers - L blocks."""
        blocks = sum(n_layers - layer for plan in plans for layer in layers_of(plan))
        return 2 + (1 + self.path.usual_steps * (1 + n_metrics)) * blocks / n_layers


def _groups(
    work: Work, keys: Sequence[Key], nodes: Sequence[int], n_pairs: int
) -> Iterator[dict[Key, list[int]]]:
    """Yield the nodes of each key in groups that fit one pass, from the first layer on."""
    n_layers, n_tokens = work.gradients.n_layers, work.batch.length - work.start
    most = token_layers_per_pass(work.gradients.bridge, work.batch.length)
    group: dict[Key, list[int]] = {}
    held = 0
    for site, layer in keys:
        cost = n_pairs * n_tokens * (n_layers - layer)
        for node in nodes:
            alone = not SITES[site].layered and (site, layer) not in group  # starts before block 0
            after = any(not SITES[name].layered for name, _ in group) and SITES[site].layered
            if group and (held + cost > most or alone or after):
                yield group
                group, held = {}, 0
            group.setdefault((site, layer), []).append(node)
            held += cost
    if group:
        yield group


def _site_pass(
    work: Work,
    base: Activations,
    integral: Integral,
    group: Mapping[Key, list[int]],
    pairs: Sequence[int],
) -> None:
    """Run the nodes of a group's keys as rows of one pass, and add their gradients."""
    part = work.rows(pairs)
    leaves: dict[Key, Tensor] = {}
    first_row: dict[Key, int] = {}
    streams: dict[int, list[Tensor]] = defaultdict(list)
    n_rows = 0
    for (name, layer), nodes in group.items():
        start = base.sites[name][layer][pairs]
        values = part.values(SITES[name], layer, start)
        fraction = integral.fraction(nodes, start.float()).view(-1, *[1] * start.ndim)
        moved = torch.lerp(start.float(), values.float(), fraction).flatten(0, 1)
        leaves[name, layer] = moved.to(start.dtype).requires_grad_()
        first_row[name, layer] = n_rows
        n_rows += len(moved)
        if SITES[name].layered:
            stream = base.sites["resid_pre"][layer][pairs]
            streams[layer].append(stream.repeat(len(nodes), 1, 1))
    places: dict[Key, Place] = {}

    def visit(place: Place, x: Tensor) -> Tensor | None:
        key = (place.site.name, place.layer)
        if key not in leaves:
            return None
        places[key] = place
        return place.replaced(x, leaves[key], first_row[key])

    with torch.enable_grad():
        logits = part.forward(
            part.batch.base if streams else part.batch.base.repeat(n_rows // len(pairs), 1),
            visit,
            sites=[site for site in work.sites if any(name == site.name for name, _ in group)],
            entries={layer: torch.cat(rows) for layer, rows in streams.items()},
        )
        scores = part.score(logits, base.logits[pairs])
    for metric, row in enumerate(scores):
        grads = torch.autograd.grad(
            row.sum(), [*leaves.values()], retain_graph=metric + 1 < len(scores), allow_unused=True
        )
        for (key, nodes), grad in zip(group.items(), grads, strict=True):
            if grad is not None:  # else no metric depends on this activation
                start = base.sites[key[0]][key[1]]
                integral.add(key, places[key], start, grad, nodes, metric, pairs, sums=True)
    for key, nodes in group.items():
        integral.end(key, scores[:, first_row[key] :], nodes, pairs)


def layers_of(plan: SitePlan) -> list[int]:
    """Return the distinct layers of a plan, ascending."""
    return sorted({layer for layers in plan.axes.layers for layer in layers})


@dataclass(frozen=True)
class IntegratedInputs(_Integrated):
    """`ig_inputs`: interpolates the token embeddings; the rows of one batch cover all sites.

    Estimates are not complete per component, see the module's docstring.
    """

    n_steps: Steps = 10
    name: str = "ig_inputs"
    at_base: bool = False
    needs_source: bool = True

    def run(self, work: Work) -> Found:
        """See `Method`."""
        embed = SITES["embed"]
        sites = {site.name: site for site in (*work.sites, embed)}
        base = work.base_run([*sites.values()])
        integral = Integral(work, self.path, [ALL], base.logits)
        n_layers, n_tokens = work.gradients.n_layers, work.batch.length - work.start
        most = token_layers_per_pass(work.gradients.bridge, work.batch.length)
        for nodes, rows in integral.rounds():
            pairs = rows[ALL]
            size = max(1, most // (len(pairs) * n_tokens * n_layers))
            for i in range(0, len(nodes), size):
                _inputs_pass(work, base, integral, nodes[i : i + size], pairs, [*sites.values()])
        return integral.found()

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """See `Method`."""
        return (SITES["embed"],)

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """See `Method`."""
        return 3 + self.path.usual_steps * (1 + n_metrics)


ALL: Key = ("", 0)  # the one path of `ig_inputs`


def _inputs_pass(
    work: Work,
    base: Activations,
    integral: Integral,
    nodes: Sequence[int],
    pairs: Sequence[int],
    sites: Sequence[Site],
) -> None:
    """Run nodes as rows of one pass, and add their gradients at all sites."""
    part = work.rows(pairs)
    start = base.sites["embed"][0][pairs]
    fraction = integral.fraction(nodes, start).view(-1, 1, 1, 1)
    metric = [0]

    def visit(place: Place, x: Tensor) -> None:
        def add(grad: Tensor) -> None:
            of_all = base.sites[place.site.name][place.layer]
            integral.add(
                ALL, place, of_all, place.flat(grad), nodes, metric[0], pairs,
                sums=place.site.name == "embed",
            )  # fmt: skip

        x.register_hook(add)

    with torch.enable_grad():
        logits = part.forward(
            part.batch.base.repeat(len(nodes), 1),
            visit,
            sites=sites,
            gradient=True,
            embeds=torch.lerp(start, part.values(SITES["embed"], 0, start), fraction).flatten(0, 1),
        )
        scores = part.score(logits, base.logits[pairs])
        for metric[0], row in enumerate(scores):
            row.sum().backward(retain_graph=metric[0] + 1 < len(scores))
    integral.end(ALL, scores, nodes, pairs)
