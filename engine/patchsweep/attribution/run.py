"""Runs attribution methods over the pairs of a request, block of pairs by block of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from patchsweep.attribution.atp_star import AtpStar, check_intervention
from patchsweep.attribution.estimates import Found, Method, Work, n_shared
from patchsweep.data.alignment import n_shared as n_shared_tokens
from patchsweep.forward.grad import GradientModel
from patchsweep.models.offload import device_of
from patchsweep.spec.batch import Batch, base_and_source, clean_prompts
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
    # what the method states besides, see `estimates.states_of`: (site, "error") -> as the cells;
    # (site, "residual") and (site, "nodes") -> [metric, pair, layer]; "" for all sites together
    stated: Mapping[tuple[str, str], NDArray[np.float32]]
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
        longest = request.pairs.longest
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
        stated = {(site, "error"): np.full_like(x, np.nan) for site, x in cells.items()}
        references = np.full((2, len(request.metrics), len(pairs)), np.nan, np.float32)
        # while the host reads a batch's results, a GPU captures the next one; a CPU gains nothing
        # by it and would hold two captures
        overlaps = device_of(request.bridge).type != "cpu"
        ahead: Work | None = None
        batches = request.batches(pairs)
        for batch, following in zip(batches, [*batches[1:], None], strict=True):
            with self.gradients.frozen():
                work = ahead or self._work(method, batch)
                result = method.run(work)
                ahead = self._work(method, following) if overlaps and following else None
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
                at = (slice(None), pair - pairs.start, layer, pos, unit)
                cells[plan.site.name][at] = values
                if result.errors is not None:
                    errors = np.abs(result.errors.cells(plan, patches, batch))
                    stated[plan.site.name, "error"][at] = errors
            for plan in request.plans:
                _put_paths(stated, result, plan, rows, (len(request.metrics), len(pairs)))
        return BlockOfPairs(pairs, cells, stated, references[0], references[1])

    def _work(self, method: Method, batch: Batch) -> Work:
        request = self.request
        needed_sites = {s.name: s for s in (*request.sites, *method.extra_sites(request.sites))}
        start = n_shared(self.gradients, batch, request.intervention)
        source = self.gradients.activations(
            batch.source,
            batch.source_reads,
            [*needed_sites.values()],
            keep_from=start,
        )
        moved = {name: [batch.at_base(x, start) for x in xs] for name, xs in source.sites.items()}
        source = replace(source, sites=moved)
        return Work(
            self.gradients, batch, request.plans, request.metrics, request.intervention, source
        )


def _put_paths(
    stated: dict[tuple[str, str], NDArray[np.float32]],
    found: Found,
    plan: SitePlan,
    rows: Sequence[int],
    shape: tuple[int, int],
) -> None:
    """Put the residuals and numbers of nodes of a batch's paths into `stated`."""
    site = plan.site.name if ("", 0) not in found.residuals else ""
    layers = [layers[0] for layers in plan.axes.layers] if site else [0]
    for i, layer in enumerate(layers):
        key = (site, layer)
        if key not in found.residuals:
            continue
        for name, values in (
            ("residual", found.residuals[key].cpu().numpy()),
            ("nodes", found.nodes[key]),
        ):
            empty = np.full((*shape, len(layers)), np.nan, np.float32)
            stated.setdefault((site, name), empty)[:, rows, i] = values


def token_layers(request: Request, method: Method) -> int:
    """Cost of `method` in tokens times blocks; a backward pass counts as one forward pass.

    The source run has all tokens, the others those from the first difference on.
    """
    n_layers = request.shape.n_layers
    tokens = int(request.plans[0].full_lengths.sum())
    live = tokens
    if takes_source(request.intervention):
        runs = [base_and_source(pair, request.direction) for pair in request.pairs]
        live -= sum(min(n_shared_tokens(base, source), len(base) - 1) for base, source in runs)
    passes = method.passes(request.plans, n_layers, len(request.metrics))
    return round(n_layers * (tokens + live * (passes - 1)))


def pairs_per_block(plan: SitePlan) -> int:
    """Number of pairs that one pass attributes; a function of the plan alone."""
    return max(1, min(plan.shape[0], MAX_TOKENS // int(plan.full_lengths.max())))
