"""Estimates of all latents from a few backward passes: the gradient at a site, times decoder rows.

A latent's patch adds change · decoder row. So its first-order effect is change times the gradient's
component along that row: the gradient of the metric with respect to the latent, if the dictionary
is spliced into the model with its error term (Marks et al., arXiv 2403.19647). `ig` averages the
gradient along the path on which all latents of a layer change together; its estimates of a layer
add up to the effect of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.analyses.latents.changes import Changes, Floats
from patchsweep.attribution.check import check_metric, check_model
from patchsweep.attribution.estimates import Estimates, Method, Work, n_shared
from patchsweep.errors import MethodError
from patchsweep.forward.grad import GradientModel, Place
from patchsweep.spec.batch import Batch, pair_shape
from patchsweep.spec.dictionary import Dictionary
from patchsweep.spec.interventions import Intervention, shuffles
from patchsweep.spec.plan import Axes, Ints, SitePlan
from patchsweep.spec.planner import plan_site
from patchsweep.spec.sites import Site
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.joint import JointRequest

# methods that take a gradient at the site itself
METHODS = ("atp", "relp", "relp_ah", "gim", "ig")


@dataclass(frozen=True)
class Column:
    """Latents of one dictionary that change somewhere in a batch, and what changes."""

    decoder: Float[Tensor, "column width"]
    change: Float[Tensor, "pair pos column"]
    first: int  # of its columns among those of the dictionaries at the same place

    @property
    def stop(self) -> int:
        return self.first + len(self.decoder)


Columns = Mapping[tuple[str, int], Sequence[Column]]  # (site, layer) -> those written there


class LatentEstimates(Estimates):
    """Estimates of latents: the last axis holds the columns of a place instead of heads."""

    def __init__(self, columns: Columns, work: Work) -> None:
        super().__init__(work)
        self.columns = columns
        widest = max(of_place[-1].stop for of_place in columns.values())
        for name, x in self.values.items():
            self.values[name] = x.new_zeros(*x.shape[:-1], widest)

    def add(
        self, place: Place, values: Tensor, base: Tensor, grad: Tensor, weight: float = 1.0
    ) -> None:
        """Add `weight` times change · (decoder row · gradient), latent by latent."""
        for column in self.columns.get((place.site.name, place.layer), ()):
            along = grad.float() @ column.decoder.T
            effect = along * column.change[self.rows, self._start :]
            target = self.values[place.site.name][self.metric, :, place.layer, self._start :]
            target[self.rows, :, column.first : column.stop] += weight * effect


@dataclass(frozen=True)
class LatentWork(Work):
    """Work whose patch values change all latents of a place at once."""

    columns: Columns = field(default_factory=dict)
    members: Sequence[int] | None = None  # rows of the batch; None: all

    def empty(self) -> Estimates:
        """See `Work`."""
        return LatentEstimates(self.columns, self)

    def rows(self, rows: Sequence[int]) -> Work:
        """See `Work`."""
        part = super().rows(rows)
        assert isinstance(part, LatentWork)
        return part if part is self else replace(part, members=[*rows])

    @torch.no_grad()
    def values(self, site: Site, layer: int, base: Tensor) -> Tensor:
        """See `Work`."""
        moved = base.float().clone()
        rows = slice(None) if self.members is None else [*self.members]
        for column in self.columns.get((site.name, layer), ()):
            moved += column.change[rows, self.start :] @ column.decoder
        return moved.to(base.dtype)


def check_methods(request: JointRequest, methods: Sequence[Method]) -> None:
    """Raise unless every method can attribute the metrics of `request` to latents.

    Raises:
        MethodError: one cannot; the message names an alternative.
    """
    for method in methods:
        if method.name not in METHODS:
            raise MethodError(
                f"method={method.name} has no estimate for latents; use {', '.join(METHODS)}"
            )
        for metric in request.metrics:
            check_metric(metric, method)
    if methods:
        check_model(request.bridge)


class LatentAttribution:
    """Runs an attribution method on the latents of dictionaries."""

    def __init__(
        self,
        request: JointRequest,
        dictionaries: Sequence[Dictionary],
        intervention: Intervention,
        method: Method,
    ) -> None:
        self.request, self.dictionaries = request, tuple(dictionaries)
        self.intervention, self.method = intervention, method
        extra = dict.fromkeys(method.extra_sites(request.sites))
        own = [site for site in extra if site not in request.sites]
        self.sites = [*request.sites, *own]
        longest = request.pairs.longest
        self.gradients = GradientModel(
            request.bridge, request.sites, own, longest, compute_dtype=request.compute_dtype
        )
        self.plans = tuple(self._plan(site) for site in request.sites)

    def _plan(self, site: Site) -> SitePlan:
        layers = sorted({one.layer for one in self.dictionaries if one.site == site.name})
        request = self.request
        shapes = [pair_shape(pair, request.direction, request.read) for pair in request.pairs]
        axes = Axes(tuple((layer,) for layer in layers), None, None)
        return plan_site(site, axes, request.shape, shapes)

    def run(self, batch: Batch, changes: Changes) -> tuple[Values, Values]:
        """Return estimates `[metric, change]` of changes on pairs of a batch, and
        `[2, metric, pair]` of base and source runs."""
        columns, column = self._columns(batch, changes)
        request = self.request
        with self.gradients.frozen():
            source = self.gradients.activations(
                batch.source,
                batch.reads,
                self.sites,
                # another pair's values may differ from the first token on
                keep_from=0
                if shuffles(self.intervention)
                else n_shared(self.gradients, batch, self.intervention),
            )
            work = LatentWork(
                self.gradients,
                batch,
                self.plans,
                request.metrics,
                self.intervention,
                source,
                columns,
            )
            found = self.method.run(work)
            references = np.stack(work.references(found.base_logits))
        estimates: Values = np.empty((len(request.metrics), len(changes)), np.float32)
        for i, one in enumerate(self.dictionaries):
            mine = changes.dictionary == i
            values = found.estimates.values[one.site][:, :, one.layer]
            row, pos, unit = (
                torch.from_numpy(x[mine]).to(values.device)
                for x in (changes.rows(batch), changes.pos, column)
            )
            estimates[:, mine] = values[:, row, pos, unit].cpu().numpy()
        return estimates, references

    def _columns(self, batch: Batch, changes: Changes) -> tuple[Columns, Ints]:
        """Return the columns of each place, and that of each change."""
        columns: dict[tuple[str, int], list[Column]] = {}
        column = np.empty(len(changes), np.int64)
        device = batch.base.device
        for i, one in enumerate(self.dictionaries):
            mine = changes.dictionary == i
            x = changes.at(mine)
            latents, number = np.unique(x.latent, return_inverse=True)
            here = columns.setdefault((one.site, one.layer), [])
            first = here[-1].stop if here else 0
            change: Floats = np.zeros((*batch.base.shape, len(latents)), np.float32)
            change[x.rows(batch), x.pos, number] = x.change
            decoder = one.decoder.to(device)[torch.from_numpy(latents).to(device)]
            here.append(Column(decoder, torch.from_numpy(change).to(device), first))
            column[mine] = first + number
        return columns, column
