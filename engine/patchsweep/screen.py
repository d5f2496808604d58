"""Screening: attribution ranks all patches, the exact engine runs the foremost, and random
subsets of the rest bound what was missed.

The bound follows AtP* (Kramár et al., arXiv 2403.00745, section on diagnostics). Random subsets
of the patches that were not run are patched jointly. For each patch, the mean metric of the
subsets that hold it minus the mean of those that do not estimates its effect among random
others; a one-sided Welch test rejects "|effect| >= theta". "Some patch is >= theta" takes the
largest p-value, so it is rejected at the stated level for every theta above

    max over patches of |difference of means| + t * (Welch standard error).

**Assumption**: a patch's effect among random others says what its effect alone is. Patches that
cancel or stand in for one another (backup heads) can hide from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from patchsweep.attribution import Attribution, Method, get_methods
from patchsweep.attribution.run import token_layers
from patchsweep.attribution.tape import Heads, Place, Prefix, Tape
from patchsweep.attribution.units import variable_name, variables_of
from patchsweep.batch import Batch
from patchsweep.errors import MethodError
from patchsweep.metrics import Logits, compute
from patchsweep.planner import SitePlan
from patchsweep.probe import Choice
from patchsweep.request import Request
from patchsweep.results import shape_of
from patchsweep.store import Unit, Variable

Values = NDArray[np.float32]
# tokens of one pass of jointly patched rows
MAX_TOKENS = 4096
ASSUMPTION = (
    "a patch's mean effect among random subsets of the patches that were not run stands for its "
    "effect alone; patches that cancel or back each other up can hide"
)


@dataclass(frozen=True)
class Screen:
    """How to screen. Patches are ranked, site by site, by their mean |estimate| over the pairs
    for the first metric; a chosen one runs on every pair.

    Raises:
        MethodError: a number is out of range.
    """

    by: str | Method = "atp"  # the method that ranks
    k: int = 100  # patches of each site that run exactly; with `margin`: the top ones sought
    # go on until the k-th largest exact effect is (1 + margin) times every remaining estimate
    margin: float | None = None
    subsets: int = 64  # random subsets per pair and site; 0: no bound
    # of the subsets hold a patch; the fewer others stand beside it, the better its effect there
    # speaks for its effect alone
    share: float = 0.05
    level: float = 0.05  # of the one-sided test
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "k": (self.k >= 1, "k >= 1"),
            "margin": (self.margin is None or self.margin >= 0, "margin >= 0"),
            "subsets": (self.subsets == 0 or self.subsets >= 8, "subsets >= 8, or 0 for no bound"),
            "share": (0 < self.share < 1, "0 < share < 1"),
            "level": (0 < self.level < 0.5, "0 < level < 0.5"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise MethodError(f"screen has {name}={getattr(self, name)}; use {rule}")

    @property
    def method(self) -> Method:
        """The method that ranks."""
        return get_methods([self.by])[0]

    def check(self, request: Request, n_slices: int) -> None:
        """Raise unless `request` can be screened so.

        Raises:
            MethodError: k is larger than the plan, or the run is cut into slices.
        """
        if n_slices > 1:
            raise MethodError(
                f"n_slices={n_slices} with method=screen: the ranking needs all pairs at once; "
                "screen in one process"
            )
        for plan in request.plans:
            if plan.axes.n_sources and self.subsets:
                raise MethodError(
                    "single cells of a pattern are patched one by one, not in random subsets; "
                    "use Screen(subsets=0) for pattern_cell"
                )
            n_live = int((live_of(plan)).any(axis=0).sum())
            if self.k > n_live:
                raise MethodError(
                    f"screen has k={self.k}, and site {plan.site.name} has {n_live} patches that "
                    f"can change the metric; use k <= {n_live}, or method=exact"
                )


MethodLike = str | Method | Screen


@dataclass(frozen=True)
class Asked:
    """What `method=` asked for."""

    exact: bool  # patches run exactly: all, or those that the screen chooses
    methods: tuple[Method, ...]
    screen: Screen | None

    def variables(self, request: Request) -> tuple[Variable, ...]:
        """The variables besides the exact ones."""
        found = variables_of(request, self.methods)
        if self.screen is None or not self.screen.subsets:
            return found
        n_metrics, n_pairs = len(request.metrics), len(request.pairs)
        return found + tuple(
            Variable(
                name=bound_name(plan.site.name),
                dims=("metric", "pair"),
                shape=(n_metrics, n_pairs),
                unit=(n_pairs, 1),
                attrs={
                    "long_name": f"largest |effect| that a patch of {plan.site.name} that was not "
                    "run may have, at the stated level"
                },
            )
            for plan in request.plans
        )

    def attrs(self, request: Request) -> dict[str, Any]:
        """What a store records of the methods."""
        if not self.methods:
            return {}
        costs = {
            method.name: {"token_layers": token_layers(request, method)} for method in self.methods
        }
        names = ["exact"] * (self.exact and self.screen is None) + [*costs]
        found: dict[str, Any] = {"method": ", ".join(names), "attribution": costs}
        if self.screen is not None:
            screen = self.screen
            found["method"] = "screen"
            found["screen"] = {
                "by": screen.method.name,
                "k": screen.k,
                "margin": screen.margin,
                "subsets": screen.subsets,
                "share": screen.share,
                "level": screen.level,
                "seed": screen.seed,
                "assumption": ASSUMPTION,
                "cells": "<site> holds exact values where a patch was run or is known to change "
                "nothing, NaN elsewhere; <site>_<method> holds an estimate everywhere",
            }
        return found


def get_asked(given: MethodLike | Sequence[MethodLike]) -> Asked:
    """What `method=given` asks for.

    Raises:
        MethodError: a method is unknown, or screening stands beside other methods.
    """
    methods: list[MethodLike] = (
        list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    )
    screens = [m for m in methods if m == "screen" or isinstance(m, Screen)]
    if screens:
        if len(methods) > 1:
            raise MethodError("method=screen stands alone; its ranking method is Screen(by=...)")
        screen = screens[0] if isinstance(screens[0], Screen) else Screen()
        return Asked(exact=True, methods=(screen.method,), screen=screen)
    others = [m for m in methods if m != "exact"]
    found = get_methods(others) if others or not methods else ()  # type: ignore[arg-type]
    return Asked(exact=len(others) < len(methods), methods=found, screen=None)


def bound_name(site: str) -> str:
    """Where a store keeps the bound of a site."""
    return f"{site}_bound"


@dataclass(frozen=True)
class Screened:
    """What a screen found."""

    values: Mapping[str, Values]  # variable -> as the store keeps it
    base: Values  # [metric, pair]
    source: Values
    exact_token_layers: Mapping[str, int]  # site -> of the patches that ran
    subset_token_layers: Mapping[str, int]  # site -> of the random subsets


def run_screen(request: Request, choice: Choice, screen: Screen) -> Screened:
    """Estimate all patches, run the foremost exactly, and bound the rest."""
    attribution = Attribution(request, [screen.method])
    n_pairs = len(request.pairs)
    size = max(1, MAX_TOKENS // int(request.plans[0].full_lengths.max()))
    blocks = [range(i, min(i + size, n_pairs)) for i in range(0, n_pairs, size)]
    found = [attribution.run(screen.method, pairs) for pairs in blocks]
    exact = _Exact(request, choice, blocks)
    values: dict[str, Values] = {}
    costs: dict[str, int] = {}
    subset_costs: dict[str, int] = {}
    for plan in request.plans:
        name = plan.site.name
        estimate = np.concatenate([block.cells[name] for block in found], axis=1)
        ran = _choose(plan, estimate, screen, exact)
        cells = exact.cells(plan)
        shape = shape_of(plan, len(request.metrics))
        values[name] = cells.reshape(shape)
        values[variable_name(name, screen.method.name)] = estimate.reshape(shape)
        costs[name] = int(plan.cost[ran].sum())
        if screen.subsets:
            rest = np.setdiff1d(np.flatnonzero(plan.live), ran)
            subsets = _Subsets(request, attribution.tape, plan, screen)
            values[bound_name(name)] = subsets.bounds(rest, blocks)
            subset_costs[name] = subsets.token_layers
    base, source = exact.references
    return Screened(values, base, source, costs, subset_costs)


class ScreenWork:
    """A screen as work: all is found at once, when the first unit is asked for."""

    def __init__(self, request: Request, choice: Choice, screen: Screen) -> None:
        self._arguments = (request, choice, screen)
        self._found: Screened | None = None
        # only the exact values of a site are cut along the layers
        self._cut = {plan.site.name: plan.site.layered for plan in request.plans}
        self._whole = {v.name for v in get_asked(screen).variables(request)}

    def __contains__(self, variable: str) -> bool:
        return variable in self._cut or variable in self._whole

    def cost(self, unit: Unit) -> int:
        """See `work.Work`; unknown before the estimates are."""
        return 0

    def n_live(self, unit: Unit) -> int:
        """See `work.Work`."""
        return 0

    def values(self, unit: Unit) -> Values:
        """See `work.Work`."""
        block = self.found.values[unit.variable][:, unit.pairs.start : unit.pairs.stop]
        cut = self._cut.get(unit.variable, False)
        return block[:, :, unit.layers.start : unit.layers.stop] if cut else block

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `work.Work`."""
        pairs = slice(unit.pairs.start, unit.pairs.stop)
        return self.found.base[:, pairs], self.found.source[:, pairs]

    @property
    def found(self) -> Screened:
        if self._found is None:
            self._found = run_screen(*self._arguments)
        return self._found


def live_of(plan: SitePlan) -> NDArray[np.bool_]:
    """[pair, place] whether the patch of that pair at that layer, position and unit is live."""
    live = np.zeros(int(np.prod(plan.shape)), dtype=bool)
    live[plan.cell[plan.live]] = True
    return live.reshape(plan.shape[0], -1)


def _choose(plan: SitePlan, estimate: Values, screen: Screen, exact: _Exact) -> NDArray[np.int64]:
    """Run the foremost patches; returns which ran."""
    live = live_of(plan)
    sizes = np.where(live, np.abs(estimate[0].reshape(live.shape)), np.nan)
    some = live.any(axis=0)
    score = np.where(some, np.nansum(sizes, axis=0) / np.maximum(1, live.sum(axis=0)), -1.0)
    order = np.argsort(-score, kind="stable")[: int(some.sum())]
    place_of = plan.cell % live.shape[1]
    n_run = 0
    while n_run < len(order):
        places = order[n_run : n_run + screen.k]
        exact.run(plan, np.flatnonzero(plan.live & np.isin(place_of, places)))
        n_run += len(places)
        if screen.margin is None:
            break
        effects = np.sort(exact.mean_effect(plan, order[:n_run]))[::-1]
        left = score[order[n_run:]].max(initial=0.0)
        if effects[screen.k - 1] >= (1 + screen.margin) * left:
            break
    return np.flatnonzero(plan.live & np.isin(place_of, order[:n_run]))


class _Exact:
    """Exact values of chosen patches, all others NaN but for those known to change nothing."""

    def __init__(self, request: Request, choice: Choice, blocks: Sequence[range]) -> None:
        self.request, self.choice = request, choice
        self._batches = [batch for pairs in blocks for batch in request.batches(pairs)]
        n_metrics, n_pairs = len(request.metrics), len(request.pairs)
        self.references = np.full((2, n_metrics, n_pairs), np.nan, np.float32)
        for batch in self._batches:
            loaded = choice.runner.load(batch, request.intervention)
            found = choice.runner.references(loaded, request.metrics)
            self.references[:, :, list(batch.pairs)] = torch.stack(found).cpu().numpy()
        self._cells: dict[str, Values] = {}

    def cells(self, plan: SitePlan) -> Values:
        """[metric, cell] raw patched metrics."""
        name = plan.site.name
        if name not in self._cells:
            n_cells = int(np.prod(plan.shape))
            cells = np.full((len(self.request.metrics), n_cells), np.nan, np.float32)
            dead = ~plan.live
            cells[:, plan.cell[dead]] = self.references[0][:, plan.pair[dead]]
            self._cells[name] = cells
        return self._cells[name]

    def run(self, plan: SitePlan, patches: NDArray[np.int64]) -> None:
        """Run `patches` of the plan."""
        cells = self.cells(plan)
        for batch in self._batches:
            mine = patches[np.isin(plan.pair[patches], batch.pairs)]
            if len(mine):
                loaded = self.choice.runner.load(batch, self.request.intervention)
                found = self.choice.runner.run(loaded, plan, mine, self.request.metrics)
                cells[:, plan.cell[mine]] = found.numpy()

    def mean_effect(self, plan: SitePlan, places: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean over pairs of |value - base| of the first metric, at places that ran."""
        values = self.cells(plan)[0].reshape(plan.shape[0], -1)[:, places].astype(np.float64)
        effects = np.abs(values - self.references[0, 0][:, None])
        live = live_of(plan)[:, places]
        total = np.where(live, effects, 0.0).sum(axis=0)
        mean: NDArray[np.float64] = total / np.maximum(1, live.sum(axis=0))
        return mean


class _Subsets:
    """Random subsets of patches, each patched in one forward pass."""

    def __init__(self, request: Request, tape: Tape, plan: SitePlan, screen: Screen) -> None:
        self.request, self.tape, self.plan, self.screen = request, tape, plan, screen
        self.token_layers = 0

    def bounds(self, rest: NDArray[np.int64], blocks: Sequence[range]) -> Values:
        """[metric, pair] above which no patch of `rest` is, at the stated level."""
        request = self.request
        found = np.zeros((len(request.metrics), len(request.pairs)), np.float32)
        for pairs in blocks:
            for batch in request.batches(pairs):
                run = self._capture(batch)
                for row, pair in enumerate(batch.pairs):
                    mine = rest[self.plan.pair[rest] == pair]
                    if len(mine):
                        found[:, pair] = self._bound(batch, row, mine, run)
        return found

    def _bound(
        self, batch: Batch, row: int, patches: NDArray[np.int64], run: _BaseRun
    ) -> NDArray[np.float64]:
        rng = np.random.default_rng([self.screen.seed, batch.pairs[row]])
        member = draw_members(rng, self.screen.subsets, len(patches), self.screen.share)
        start = int(min(self.plan.start[patches].min(), batch.reads[0]))
        rows = max(1, MAX_TOKENS // (batch.length - start))
        parts = [
            self._patched(batch, row, patches, member[i : i + rows], run, start)
            for i in range(0, len(member), rows)
        ]
        self.token_layers += len(member) * (batch.length - start) * self.tape.n_layers
        effects = np.concatenate(parts, axis=1)
        return np.array([upper_bound(effect, member, self.screen.level) for effect in effects])

    @torch.no_grad()
    def _capture(self, batch: Batch) -> _BaseRun:
        site, tape = self.plan.site, self.tape
        keys: list[Tensor] = []
        values: list[Tensor] = []
        base: list[Tensor] = []

        def keep(layer: int, heads: Heads) -> None:
            keys.append(heads.k)
            values.append(heads.v)

        logits = tape.forward(
            batch.base,
            lambda place, x: base.append(place.flat(x).clone()),
            batch.reads,
            sites=[site],
            on_attention=keep,
        )
        source, source_logits = tape.activations(batch.source, batch.reads, [site])
        donors = [
            self.request.intervention.values(site, layer, b, s, batch.spans)
            for layer, (b, s) in enumerate(zip(base, source[site.name], strict=True))
        ]
        return _BaseRun(donors, keys, values, logits, source_logits)

    @torch.no_grad()
    def _patched(
        self,
        batch: Batch,
        row: int,
        patches: NDArray[np.int64],
        member: NDArray[np.bool_],
        run: _BaseRun,
        start: int,
    ) -> NDArray[np.float64]:
        """Metrics `[metric, subset]` of the subsets `member` `[subset, patch]` of one pair."""
        n = len(member)
        masks = torch.from_numpy(self._masks(patches, member, batch.length)).to(batch.base.device)

        def visit(place: Place, x: Tensor) -> None:
            mask = masks[:, place.layer, start:]  # [subset, pos, unit]
            if not bool(mask.any()):
                return
            flat = place.flat(x)
            donor = run.donors[place.layer][row]
            if place.site.name == "pattern":
                place.write(x, torch.where(mask.transpose(1, 2)[..., None], donor[:, start:], flat))
                return
            n_units = mask.shape[-1]
            new = torch.where(
                mask[..., None],
                donor[start:].unflatten(-1, (n_units, -1)),
                flat.unflatten(-1, (n_units, -1)),
            )
            place.write(x, new.flatten(-2))

        logits = self.tape.forward(
            batch.base[row].expand(n, -1),
            visit,
            batch.reads,
            sites=[self.plan.site],
            prefix=Prefix(
                start,
                [k[row].expand(n, *k.shape[1:]) for k in run.keys],
                [v[row].expand(n, *v.shape[1:]) for v in run.values],
            ),
        )
        targets = torch.stack([batch.answer[row], batch.wrong[row]])  # [2, read]
        chosen = logits.gather(2, targets.T.expand(n, -1, -1))
        seen = Logits(
            chosen[..., 0],
            chosen[..., 1],
            logits,
            run.logits[row].expand(n, -1, -1),
            run.source_logits[row].expand(n, -1, -1),
        )
        found: NDArray[np.float64] = compute(self.request.metrics, seen).double().cpu().numpy()
        return found

    def _masks(
        self, patches: NDArray[np.int64], member: NDArray[np.bool_], length: int
    ) -> NDArray[np.bool_]:
        """[subset, layer, pos, unit] what each subset replaces."""
        plan = self.plan
        units = plan.axes.units
        n_units = 1 if units is None else self.request.shape.n_units(plan.site)
        n_layers = plan.n_layers if plan.site.layered else 1
        masks = np.zeros((len(member), n_layers, length, n_units), dtype=bool)
        for column, patch in enumerate(patches.tolist()):
            which = [0] if units is None else list(units[plan.unit_set[patch]])
            span = slice(int(plan.start[patch]), int(plan.stop[patch]))
            for layer in plan.axes.layers[plan.layer_set[patch]]:
                for unit in which:
                    masks[:, layer, span, unit] |= member[:, column, None]
        return masks


@dataclass(frozen=True)
class _BaseRun:
    """What subsets of patches share."""

    donors: list[Tensor]  # per layer, as `Place.flat` gives them
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor  # [pair, read, d_vocab] of the base run
    source_logits: Tensor


def draw_members(
    rng: np.random.Generator, n_subsets: int, n_patches: int, share: float
) -> NDArray[np.bool_]:
    """[subset, patch]: each patch is in the same number of subsets, drawn at random, two at least
    and out of two at least."""
    n_in = min(max(2, round(share * n_subsets)), n_subsets - 2)
    ranks = rng.random((n_subsets, n_patches)).argsort(axis=0)
    member: NDArray[np.bool_] = ranks < n_in
    return member


def upper_bound(metric: NDArray[np.float64], member: NDArray[np.bool_], level: float) -> float:
    """The smallest theta for which "some patch has |effect| >= theta" is rejected at `level`.

    `metric` `[subset]` of the patched runs, `member` `[subset, patch]`. Welch's test, one-sided.
    """
    held = member.astype(np.float64)
    n_in, n_out = held.sum(axis=0), (1 - held).sum(axis=0)
    centred = metric - metric.mean()
    mean_in, mean_out = centred @ held / n_in, centred @ (1 - held) / n_out
    var_in = ((centred[:, None] - mean_in) ** 2 * held).sum(axis=0) / (n_in - 1)
    var_out = ((centred[:, None] - mean_out) ** 2 * (1 - held)).sum(axis=0) / (n_out - 1)
    a, b = var_in / n_in, var_out / n_out
    error = np.sqrt(a + b)
    freedom = (a + b) ** 2 / np.maximum(a**2 / (n_in - 1) + b**2 / (n_out - 1), 1e-300)
    quantile = stats.t.ppf(1 - level, np.maximum(freedom, 1.0))
    return float((np.abs(mean_in - mean_out) + quantile * error).max())
