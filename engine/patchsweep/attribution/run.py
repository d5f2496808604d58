"""Runs attribution methods over the pairs of a request, block of pairs by block of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.attribution.atp_star import AtpStar, check_intervention
from patchsweep.attribution.estimates import Work
from patchsweep.attribution.method import Method
from patchsweep.forward.grad import GradientModel
from patchsweep.spec.batch import Batch, clean_prompts
from patchsweep.spec.finite import check_cells, check_references
from patchsweep.spec.interventions import Reader, takes_source
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request

# most prompt tokens that one pass attributes
MAX_TOKENS = 2048


@dataclass(frozen=True)
class BlockOfPairs:
    """Estimates of one method for consecutive pairs."""

    pairs: range
    cells: Mapping[str, NDArray[np.float32]]  # site -> [metric, pair, layer, pos, unit]
    base_metric: NDArray[np.float32]  # [metric, pair]
    source_metric: NDArray[np.float32]


class Attribution:
    """Runs methods on one request.

    Raises:
        MethodError: the model does not have a site, or no gradient reaches it.
    """

    def __init__(self, request: Request, methods: Sequence[Method]) -> None:
        self.request = request
        self.methods = tuple(methods)
        extra = {s.name: s for m in methods for s in m.extra_sites(request.sites)}
        added = [site for site in extra.values() if site not in request.sites]
        self.sites = (*request.sites, *added)
        longest = max(int(plan.full_lengths.max()) for plan in request.plans)
        self.gradients = GradientModel(
            request.bridge, request.sites, added, longest, compute_dtype=request.compute_dtype
        )
        if any(isinstance(method, AtpStar) for method in methods):
            check_intervention(self.gradients, request.sites, request.intervention)
        self._prepare()

    def _prepare(self) -> None:
        """Prepare the intervention (means, for example) on the clean prompts."""
        request = self.request
        numbers = range(len(request.pairs))
        batches = request.batches(numbers)
        clean = clean_prompts(batches, request.direction)
        reader = Reader(
            "attribution", self.sites, lambda tokens: self.gradients.activations(tokens).sites
        )
        request.intervention.prepare(clean, reader)

    def run(self, method: Method, pairs: range) -> BlockOfPairs:
        """Return the estimates of `method` for `pairs`."""
        request = self.request
        cells = {
            plan.site.name: np.full(
                (len(request.metrics), len(pairs), *plan.shape[1:]), np.nan, np.float32
            )
            for plan in request.plans
        }
        references = np.full((2, len(request.metrics), len(pairs)), np.nan, np.float32)
        for batch in request.batches(pairs):
            with self.gradients.frozen():
                work = self._work(method, batch)
                result = method.run(work)
            rows = [pair - pairs.start for pair in batch.pairs]
            references[:, :, rows] = check_references(
                *work.references(result.base_logits), batch.pairs, request.metrics
            )
            for plan in request.plans:
                patches = plan.patches(batch.pairs)
                pair, layer, pos, unit = np.unravel_index(plan.cell[patches], plan.shape)
                values = check_cells(
                    result.estimates.cells(plan, patches, batch),
                    plan,
                    patches,
                    request.metrics,
                    f"the {method.name} estimate",
                )
                cells[plan.site.name][:, pair - pairs.start, layer, pos, unit] = values
        return BlockOfPairs(pairs, cells, references[0], references[1])

    def _work(self, method: Method, batch: Batch) -> Work:
        request = self.request
        needed_sites = {s.name: s for s in (*request.sites, *method.extra_sites(request.sites))}
        source = self.gradients.activations(
            batch.source,
            batch.reads,
            [*needed_sites.values()],
            keep_from=self._start(batch),
        )
        return Work(
            gradients=self.gradients,
            batch=batch,
            plans=request.plans,
            shape=request.shape,
            metrics=request.metrics,
            intervention=request.intervention,
            source=source.sites,
            source_logits=source.logits,
            prefix=source.prefix,
        )

    def _start(self, batch: Batch) -> int:
        """Return the first position at which base and source run can differ, or logits are read.

        Interventions that do not take the source run's values change all tokens.
        """
        shares = takes_source(self.request.intervention) and self.gradients.takes_positions
        return batch.first_difference() if shares else 0


def token_layers(request: Request, method: Method) -> int:
    """Cost of `method` in tokens times blocks; a backward pass counts as one forward pass."""
    n_layers = request.shape.n_layers
    tokens = int(request.plans[0].full_lengths.sum())
    return round(tokens * n_layers * method.passes(request.plans, n_layers, len(request.metrics)))


def pairs_per_block(plan: SitePlan) -> int:
    """Number of pairs that one pass attributes; a function of the plan alone."""
    return max(1, min(plan.shape[0], MAX_TOKENS // int(plan.full_lengths.max())))
