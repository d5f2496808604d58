"""The protocol of an attribution method, and its estimates for one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from patchsweep_kernels.attribution import attribution_dot
from torch import Tensor

from patchsweep.data.alignment import NONE
from patchsweep.forward.grad import Activations, GradientModel, Place, Visit
from patchsweep.forward.pattern import Prefix
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention, sees_source, takes_source, values_of
from patchsweep.spec.metrics import Logits, Metric, compute
from patchsweep.spec.plan import Ints, ModelShape, SitePlan
from patchsweep.spec.sites import Site
from patchsweep.spec.spec import model_shape


class Estimates:
    """Estimates per site, `[metric, pair, layer, pos, unit]`, fp32; zero without a gradient.

    The unit axis holds the plan's sets of heads or neurons. `add` sums each set at once, so that
    a few neurons do not need a `[pos, d_mlp]` tensor. What is added begins at position `start`.
    """

    def __init__(self, work: Work) -> None:
        self.metric = 0  # index of the metric whose backward pass is running
        self.rows: Sequence[int] | slice = slice(None)  # rows of the batch that are added to
        self.plans = {plan.site.name: plan for plan in work.plans}
        self._shape, self._start = work.shape, work.start
        self.values: dict[str, Tensor] = {}
        n_pairs, n_pos = work.batch.base.shape
        for name, plan in self.plans.items():
            n_layers = work.shape.n_layers if plan.site.layered else 1
            n_units = 1 if plan.axes.units is None else len(plan.axes.units)
            shape = (len(work.metrics), n_pairs, n_layers, n_pos, n_units)
            self.values[name] = torch.zeros(shape, device=work.batch.base.device)

    def add(
        self, place: Place, values: Tensor, base: Tensor, grad: Tensor, weight: float = 1.0
    ) -> None:
        """Add `weight` times (values - base) · grad; the tensors have the shape of `Place.flat`."""
        plan = self.plans[place.site.name]
        if plan.axes.n_sources:
            self.put(place, _by_cell(plan, values, base, grad), weight)
            return
        if place.is_pattern:
            dot = attribution_dot(values, base, grad).transpose(1, 2)  # [row, dest, head]
        elif plan.axes.units is None:
            dot = attribution_dot(values, base, grad).unsqueeze(-1)
        elif place.site.unit == "neuron":
            neurons = [neuron for members in plan.axes.units for neuron in members]
            dot = (values[..., neurons].float() - base[..., neurons].float()) * (
                grad[..., neurons].float()
            )
            self.put(place, _sum_sets(dot, plan.axes.units, compact=True), weight)
            return
        else:
            n = self._shape.n_units(place.site)
            dot = attribution_dot(*(x.unflatten(-1, (n, -1)) for x in (values, base, grad)))
        self.put(place, self._by_sets(plan, dot), weight)

    def add_units(self, place: Place, effect: Tensor, weight: float = 1.0) -> None:
        """Add `effect` `[row, pos, unit]`, one number per head of the site."""
        self.put(place, self._by_sets(self.plans[place.site.name], effect), weight)

    def put(self, place: Place, effect: Tensor, weight: float) -> None:
        """Add `weight` times `effect` `[row, pos, unit set]`, one row per pair."""
        target = self.values[place.site.name][self.metric, :, place.layer, self._start :]
        target[self.rows] += weight * effect.to(target)

    @staticmethod
    def _by_sets(plan: SitePlan, effect: Tensor) -> Tensor:
        if plan.axes.units is None:
            return effect.sum(dim=-1, keepdim=True)
        return _sum_sets(effect, plan.axes.units, compact=False)

    def cells(self, plan: SitePlan, patches: Ints, batch: Batch) -> NDArray[np.float32]:
        """Return the estimates `[metric, patch]` of `patches`; those of dead patches are exactly 0.

        The estimate of a span is the sum over its tokens, since a first-order estimate adds up.
        """
        values = self.values[plan.site.name].double().cpu().numpy()
        cumulative = np.concatenate([np.zeros_like(values[..., :1, :]), values.cumsum(-2)], axis=-2)
        local = batch.local
        pair = np.array([local[p] for p in plan.pair[patches].tolist()], dtype=np.int64)
        layer = np.array([layers[0] for layers in plan.axes.layers])[plan.layer_set[patches]]
        unit = plan.unit_set[patches]
        start, stop = plan.start[patches], plan.stop[patches]
        single = stop == start + 1
        summed = cumulative[:, pair, layer, stop, unit] - cumulative[:, pair, layer, start, unit]
        estimates = np.where(single, values[:, pair, layer, start, unit], summed)
        return np.where(plan.live[patches], estimates, 0.0).astype(np.float32)


def _by_cell(plan: SitePlan, values: Tensor, base: Tensor, grad: Tensor) -> Tensor:
    """Estimates `[row, dest, (unit set, src)]` of single pattern cells, not summed over src."""
    assert plan.axes.units is not None
    n_sources = plan.axes.n_sources
    product = (values.float() - base.float()) * grad.float()
    cells = _sum_sets(product.movedim(1, -1), plan.axes.units[::n_sources], compact=False)
    cells = cells.transpose(-1, -2)  # [row, dest, unit set, src]
    return torch.nn.functional.pad(cells, (0, n_sources - cells.shape[-1])).flatten(-2)


def _sum_sets(effect: Tensor, sets: Sequence[tuple[int, ...]], *, compact: bool) -> Tensor:
    """Sum the last axis over each of `sets`; `compact`: it holds only the members, set by set."""
    members = [unit for one_set in sets for unit in one_set]
    if not compact:
        if members == list(range(effect.shape[-1])) and len(sets) == len(members):
            return effect
        effect = effect[..., members]
    sizes = torch.tensor([len(one_set) for one_set in sets], device=effect.device)
    index = torch.repeat_interleave(torch.arange(len(sets), device=effect.device), sizes)
    out = effect.new_zeros(*effect.shape[:-1], len(sets))
    return out.index_add_(-1, index, effect)


@dataclass(frozen=True)
class Work:
    """One batch with the activations of its source run: the input of `Method.run`.

    Tokens before `start` are the same in base and source run. Nothing changes there, so they ran
    once and all later passes read their keys and values.
    """

    gradients: GradientModel
    batch: Batch
    plans: tuple[SitePlan, ...]
    metrics: tuple[Metric, ...]
    intervention: Intervention
    source: Activations  # of the source run; sites from `start` on

    @cached_property
    def shape(self) -> ModelShape:
        """The sizes of the model."""
        return model_shape(self.gradients.bridge)

    @property
    def prefix(self) -> Prefix | None:
        """The tokens that base and source share."""
        return self.source.prefix

    @property
    def start(self) -> int:
        """Position of the first token that passes run."""
        return 0 if self.prefix is None else self.prefix.length

    def forward(self, tokens: Int[Tensor, "row pos"], visit: Visit, **options: Any) -> Tensor:
        """Return the logits of a pass over `tokens`, from `start` on; see `GradientModel`."""
        return self.gradients.forward(
            tokens, visit, self.batch.reads, prefix=self.prefix, **options
        )

    def base_run(self, sites: Sequence[Site]) -> Activations:
        """Return the base run's activations, from `start` on."""
        return self.gradients.activations(
            self.batch.base, self.batch.reads, sites, prefix=self.prefix
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites to attribute; the gradient model may hook more."""
        return tuple(plan.site for plan in self.plans)

    def empty(self) -> Estimates:
        """Return estimates of zero for every site."""
        return Estimates(self)

    def rows(self, rows: Sequence[int]) -> Work:
        """Return the work of some rows of the batch."""
        if [*rows] == [*range(len(self.batch.pairs))]:
            return self
        chosen = [*rows]
        source = Activations(
            {name: [x[chosen] for x in xs] for name, xs in self.source.sites.items()},
            self.source.logits[chosen],
            None if self.prefix is None else self.prefix.rows(chosen),
        )
        return replace(self, batch=self.batch.rows(chosen), source=source)

    @torch.no_grad()
    def values(self, site: Site, layer: int, base: Tensor) -> Tensor:
        """Return the patch values that replace `base`, and `base` where the source has none."""
        source = self.source.sites[site.name][layer]
        values = values_of(self.intervention, site, layer, base, source, self.batch.spans)
        partner = self.batch.partner
        if partner is None or not sees_source(self.intervention):
            return values
        alone = (partner[:, self.start :] == NONE).to(base.device)
        return torch.where(alone.repeat(len(base) // len(alone), 1)[..., None], base, values)

    def score(
        self,
        logits: Float[Tensor, "row read d_vocab"],
        base_logits: Float[Tensor, "pair read d_vocab"],
    ) -> Float[Tensor, "metric row"]:
        """Return every metric of every row; `logits` may repeat the pairs several times."""
        copies = len(logits) // len(self.batch.base)
        answer, wrong = (
            logits.gather(2, x.repeat(copies, 1).unsqueeze(-1)).squeeze(-1)
            for x in (self.batch.answer, self.batch.wrong)
        )
        base, source = (x.repeat(copies, 1, 1) for x in (base_logits, self.source.logits))
        return compute(self.metrics, Logits(answer, wrong, logits, base, source))

    def references(
        self, base_logits: Float[Tensor, "pair read d_vocab"]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return the metrics `[metric, pair]` of the base run and of the source run."""
        with torch.no_grad():
            base = self.score(base_logits, base_logits)
            source = self.score(self.source.logits, base_logits)
        return base.cpu().numpy(), source.cpu().numpy()


def n_shared(model: GradientModel, batch: Batch, intervention: Intervention) -> int:
    """Return how many first tokens need no pass but the source run's.

    They are the same in both prompts. Interventions that do not take the source run's values
    change them all the same, and some models cannot begin behind others' tokens: 0.
    """
    shares = takes_source(intervention) and model.takes_positions
    return batch.first_difference() if shares else 0


@dataclass(frozen=True)
class Found:
    """The result of a method for one batch."""

    estimates: Estimates
    base_logits: Float[Tensor, "pair read d_vocab"]
    errors: Estimates | None = None  # of the estimates; the sign says nothing; None: not known
    # (site, layer) of a path, ("", 0) for all at once: what its estimates add up to minus the true
    # effect `[metric, pair]`, and the number of nodes `[pair]`
    residuals: Mapping[tuple[str, int], Tensor] = field(default_factory=dict)
    nodes: Mapping[tuple[str, int], NDArray[np.int64]] = field(default_factory=dict)


def backward_each(scores: Float[Tensor, "metric row"], estimates: Estimates) -> None:
    """Run one backward pass per metric, from its sum over rows (a mean would scale gradients)."""
    for metric, row in enumerate(scores):
        estimates.metric = metric
        row.sum().backward(retain_graph=metric + 1 < len(scores))


@runtime_checkable
class Method(Protocol):
    """Estimates metric(patched) - metric(base) for every patch of some sites.

    Estimates are signed, per pair, in the metric's unit.
    """

    @property
    def name(self) -> str:
        """Name in stores and on the command line."""

    @property
    def at_base(self) -> bool:
        """Whether the method takes gradients only at the base run."""

    def run(self, work: Work) -> Found:
        """Return the estimates for all sites of `work`."""

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Return the sites whose activations the method needs besides `sites`."""

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """Return the number of full forward passes; a backward pass counts as one forward pass."""


def states_of(method: Method) -> tuple[str, ...]:
    """Return what a method states besides its estimates: "error", "residual", "nodes"."""
    return tuple(getattr(method, "states", ()))
