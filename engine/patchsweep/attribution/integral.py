"""Integrals of gradients along a path: sums by several rules, their errors and residuals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.attribution.estimates import Found, Work
from patchsweep.attribution.quadrature import Path
from patchsweep.forward.grad import Place

Key = tuple[str, int]  # a site and a layer whose nodes are chosen together; ("", 0): all of them
END = -1  # the path's end instead of a node: it gives the true effect, and no gradient


def stated_error(
    fine: Float[Tensor, "metric pair ..."], coarse: Float[Tensor, "metric pair ..."]
) -> Float[Tensor, "metric pair ..."]:
    """Return how far `fine` may be from converged, from its difference to a coarser rule.

    Two rules may agree in a cell by accident. So the relative difference over all cells of a pair
    counts besides, as a share of the cell's value.
    """
    difference = fine - coarse
    dims = tuple(range(2, fine.ndim))
    size = fine.square().sum(dims, keepdim=True).clamp_min(1e-30)
    relative = (difference.square().sum(dims, keepdim=True) / size).sqrt()
    return difference.abs() + relative * fine.abs()


class Rounds:
    """Which nodes run for which keys and pairs, and the rule that each of them ends with."""

    def __init__(self, path: Path, n_keys: int, n_pairs: int) -> None:
        self.path, self.quadrature = path, path.quadrature
        # [key, pair] the finest rule that ran
        self.level = np.full((n_keys, n_pairs), self.quadrature.n_rules - 1)

    def __call__(
        self, converged: Callable[[int], NDArray[np.bool_]]
    ) -> Iterator[tuple[list[int], NDArray[np.bool_]]]:
        """Yield nodes to run, and the keys and pairs `[key, pair]` that need them.

        The first round has the path's end too. Nodes are added where `converged`, which gets a
        rule and returns `[key, pair]`, says that the error is too large.
        """
        rules = self.quadrature
        open_ = np.ones_like(self.level, dtype=bool)
        first = 1 if self.path.adds_nodes else rules.n_rules - 1
        for rule in range(first, rules.n_rules):
            if not open_.any():
                return
            if rule == first:
                yield [*np.flatnonzero(rules.level <= rule).tolist(), END], open_
            else:
                yield rules.first(rule).tolist(), open_
            if self.path.adds_nodes:
                self.level[open_] = rule
                open_ &= ~converged(rule)

    @property
    def counts(self) -> NDArray[np.int64]:
        """Number of nodes that gave the values, `[key, pair]`."""
        counts: NDArray[np.int64] = (self.quadrature.weights != 0).sum(axis=1)[self.level]
        return counts


class Integral:
    """The integrals of one batch, summed by each rule of a quadrature.

    Rows of a pass are `[node, pair]`. `keys` converge by themselves, pair by pair.
    """

    def __init__(self, work: Work, path: Path, keys: Sequence[Key], base_logits: Tensor) -> None:
        self.work, self.path, self.keys = work, path, [*keys]
        self._rounds = Rounds(path, len(self.keys), len(work.batch.pairs))
        self._rules = self._rounds.quadrature
        self.by_rule = [work.empty() for _ in range(self._rules.n_rules)]
        shape = (len(self.keys), len(work.metrics), len(work.batch.pairs))
        # what the estimates of a key add up to, and what they should
        self._sums = torch.zeros(self._rules.n_rules, *shape, device=work.batch.base.device)
        self._effect = torch.zeros(shape, device=work.batch.base.device)
        self._base_logits = base_logits
        with torch.no_grad():
            self._base_metric = work.score(base_logits, base_logits)

    def rounds(self) -> Iterator[tuple[list[int], dict[Key, list[int]]]]:
        """Yield nodes to run, and the rows of the pairs that need them by key; see `Rounds`."""
        for nodes, open_ in self._rounds(self._converged):
            yield (
                nodes,
                {
                    key: np.flatnonzero(of_key).tolist()
                    for key, of_key in zip(self.keys, open_, strict=True)
                    if of_key.any()
                },
            )

    def fraction(self, nodes: Sequence[int], like: Tensor) -> Tensor:
        """Return how far along the path the nodes are, `[node]`."""
        at = [1.0 if i == END else float(self._rules.nodes[i]) for i in nodes]
        return torch.tensor(at, dtype=like.dtype, device=like.device)

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
            on_device = torch.tensor(weights, dtype=by_node.dtype, device=by_node.device)
            mean = torch.einsum("n,n...->...", on_device, by_node)
            if place.site.name in estimates.plans:
                estimates.metric, estimates.rows = metric, pairs
                estimates.add(place, values, base, mean)
            if change is not None:
                self._sums[rule, self.keys.index(key), metric, pairs] += (
                    (change * mean.float()).flatten(1).sum(dim=1)
                )

    def end(
        self,
        key: Key,
        scores: Float[Tensor, "metric row"],
        nodes: Sequence[int],
        pairs: Sequence[int],
    ) -> None:
        """Note the true effect of the path's end, if it is among `nodes`; rows as in `add`."""
        if END not in nodes:
            return
        first = nodes.index(END) * len(pairs)
        at_end = scores.detach()[:, first : first + len(pairs)]
        self._effect[self.keys.index(key)][:, pairs] = at_end - self._base_metric[:, pairs]

    def found(self) -> Found:
        """Return the estimates of the finest rule that ran, their errors, residuals and nodes."""
        values, errors = self.work.empty(), self.work.empty()
        for plan in self.work.plans:
            name = plan.site.name
            n_layers = values.values[name].shape[2]
            level = torch.from_numpy(np.stack([self._level(name, i) for i in range(n_layers)], 1))
            for rule in range(1, self._rules.n_rules):
                at = (level == rule)[None, :, :, None, None].to(values.values[name].device)
                fine, coarse = (self.by_rule[i].values[name] for i in (rule, rule - 1))
                values.values[name] = torch.where(at, fine, values.values[name])
                error = stated_error(fine, coarse)
                errors.values[name] = torch.where(at, error, errors.values[name])
        residuals, nodes = {}, {}
        for i, key in enumerate(self.keys):
            chosen = torch.from_numpy(self._rounds.level[i]).to(self._sums.device)
            sums = self._sums[:, i].gather(0, chosen.expand(1, *self._sums.shape[2:]))[0]
            residuals[key] = sums - self._effect[i]
            nodes[key] = self._rounds.counts[i]
        return Found(values, self._base_logits, errors, residuals, nodes)

    def _level(self, site: str, layer: int) -> NDArray[np.int64]:
        """Return the rule of each pair at a place."""
        key, level = (site, layer), self._rounds.level
        # else all places have one key, or no estimate is made here
        return level[self.keys.index(key) if key in self.keys else 0]

    def _converged(self, rule: int) -> NDArray[np.bool_]:
        """Return `[key, pair]`: the stated errors are within the tolerance."""
        done = np.ones_like(self._rounds.level, dtype=bool)
        for plan in self.work.plans:
            fine, coarse = (self.by_rule[i].values[plan.site.name] for i in (rule, rule - 1))
            largest = fine.abs().flatten(2).amax(dim=2)[:, :, None]  # [metric, pair, 1]
            error = stated_error(fine, coarse).flatten(3).amax(dim=3)  # [metric, pair, layer]
            within = (error <= self.path.rtol * largest).all(dim=0).cpu().numpy()
            for i, (site, layer) in enumerate(self.keys):
                if site == plan.site.name:
                    done[i] &= within[:, layer]
                elif not site:
                    done[i] &= within.all(axis=1)
        return done
