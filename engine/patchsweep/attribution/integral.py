"""Integrals of gradients along a path: sums by several rules, their errors and residuals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.attribution.estimates import Estimates, Found, Work
from patchsweep.attribution.quadrature import Path
from patchsweep.forward.grad import Place

Key = tuple[str, int]  # a site and a layer whose nodes are chosen together; ("", 0): all of them
END = -1  # the path's end instead of a node: it gives the true effect, and no gradient


class Integral:
    """The integrals of one batch, summed by each rule of a quadrature.

    Rows of a pass are `[node, pair]`. `keys` converge by themselves, pair by pair.
    """

    def __init__(self, work: Work, path: Path, keys: Sequence[Key]) -> None:
        self.work, self.path, self.keys = work, path, [*keys]
        self._rules = path.quadrature
        self.by_rule = [work.empty() for _ in range(self._rules.n_rules)]
        n_metrics, n_pairs = len(work.metrics), len(work.batch.pairs)
        self.level = np.full((len(self.keys), n_pairs), self._rules.n_rules - 1)
        shape = (len(self.keys), n_metrics, n_pairs)
        # what the estimates of a key add up to, and what they should
        self._sums = torch.zeros(self._rules.n_rules, *shape, device=work.batch.base.device)
        self._effect = torch.zeros(shape, device=work.batch.base.device)

    def rounds(self) -> Iterator[tuple[list[int], dict[Key, list[int]]]]:
        """Yield nodes to run, and the rows of the pairs that need them by key.

        The first round has the path's end too. Nodes are added only where the stated error is too
        large.
        """
        rules = self._rules
        open_ = np.ones_like(self.level, dtype=bool)
        first = 1 if self.path.adds_nodes else rules.n_rules - 1
        for rule in range(first, rules.n_rules):
            nodes = np.flatnonzero(rules.level <= rule) if rule == first else rules.first(rule)
            rows = {
                key: np.flatnonzero(of_key).tolist()
                for key, of_key in zip(self.keys, open_, strict=True)
                if of_key.any()
            }
            if not rows:
                return
            yield [*nodes.tolist(), *([END] if rule == first else [])], rows
            if self.path.adds_nodes:
                self.level[open_] = rule
                open_ &= ~self._converged(rule)

    def fraction(self, nodes: Sequence[int], like: Tensor) -> Tensor:
        """Return how far along the path the nodes are, `[node]`."""
        return like.new_tensor([1.0 if i == END else self._rules.nodes[i] for i in nodes])

    def add(
        self,
        key: Key,
        place: Place,
        base: Tensor,
        grad: Tensor,
        nodes: Sequence[int],
        metric: int,
        pairs: Sequence[int],
        *,
        sums: bool = False,
    ) -> None:
        """Add the gradients `[(node, pair), ...]` at a place, in the form of `Place.flat`.

        `base` are the base run's activations of all pairs. With `sums`, they count for what the
        estimates of `key` add up to; without an estimate of the site, they count for nothing else.
        """
        taken = [i for i, node in enumerate(nodes) if node != END]
        if not taken:
            return
        by_node = grad.detach().unflatten(0, (len(nodes), len(pairs)))[taken]
        base = base[pairs]
        values = self.work.rows(pairs).values(place.site, place.layer, base)
        change = (values - base).float() if sums else None
        for rule, estimates in enumerate(self.by_rule):
            weights = self._rules.weights[rule, [nodes[i] for i in taken]]
            if not weights.any():  # NaN counts: a single node has no error
                continue
            mean = torch.einsum("n,n...->...", by_node.new_tensor(weights), by_node)
            if place.site.name in estimates.plans:
                estimates.metric, estimates.rows = metric, pairs
                estimates.add(place, values, base, mean)
            if change is not None:
                self._sums[rule, self.keys.index(key), metric, pairs] += (
                    (change * mean.float()).flatten(1).sum(dim=1)
                )

    def end(self, key: Key, effect: Float[Tensor, "metric pair"], pairs: Sequence[int]) -> None:
        """Note the true effect of the path's end on the metrics of `pairs`."""
        self._effect[self.keys.index(key)][:, pairs] = effect

    def found(self, base_logits: Tensor) -> Found:
        """Return the estimates of the finest rule that ran, their errors, residuals and nodes."""
        values, errors = self.work.empty(), self.work.empty()
        counts = (self._rules.weights != 0).sum(axis=1)
        for plan in self.work.plans:
            name = plan.site.name
            n_layers = values.values[name].shape[2]
            level = torch.from_numpy(np.stack([self._level(name, i) for i in range(n_layers)], 1))
            for rule in range(1, self._rules.n_rules):
                at = (level == rule)[None, :, :, None, None].to(values.values[name].device)
                fine, coarse = (self.by_rule[i].values[name] for i in (rule, rule - 1))
                values.values[name] = torch.where(at, fine, values.values[name])
                errors.values[name] = torch.where(at, fine - coarse, errors.values[name])
        residuals, nodes = {}, {}
        for i, key in enumerate(self.keys):
            rule = torch.from_numpy(self.level[i]).to(self._sums.device)
            sums = self._sums[:, i].gather(0, rule.expand(1, *self._sums.shape[2:]))[0]
            residuals[key] = sums - self._effect[i]
            nodes[key] = counts[self.level[i]]
        return Found(values, base_logits, errors, residuals, nodes)

    def _level(self, site: str, layer: int) -> NDArray[np.int64]:
        """Return the rule of each pair at a place."""
        key = (site, layer)
        if key in self.keys:
            return self.level[self.keys.index(key)]
        return self.level[0]  # all places have one key, or no estimate is made here

    def _converged(self, rule: int) -> NDArray[np.bool_]:
        """Return `[key, pair]`: the stated errors are within the tolerance."""
        done = np.ones_like(self.level, dtype=bool)
        for plan in self.work.plans:
            fine, coarse = (self.by_rule[i].values[plan.site.name] for i in (rule, rule - 1))
            largest = fine.abs().flatten(2).amax(dim=2)[:, :, None]  # [metric, pair, 1]
            error = (fine - coarse).abs().flatten(3).amax(dim=3)  # [metric, pair, layer]
            within = (error <= self.path.rtol * largest).all(dim=0).cpu().numpy()
            for i, (site, layer) in enumerate(self.keys):
                if site == plan.site.name:
                    done[i] &= within[:, layer]
                elif not site:
                    done[i] &= within.all(axis=1)
        return done
