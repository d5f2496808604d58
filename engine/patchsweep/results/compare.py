"""Comparison of attribution estimates with the exact effects of one store.

    comparison = compare("runs/ioi.zarr")      # or a Dataset
    comparison.sites[0].pearson                # Measure(value, low, high)

Cells are means over the pairs in which both numbers are known. A cell where both are exactly
zero is dead and does not count: its effect is known without a run and would raise the scores.
Intervals are percentile bootstraps over pairs, NaN with fewer than two. No model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.arguments import whole_number
from patchsweep.errors import StoreError, printable
from patchsweep.results import accessor as summary
from patchsweep.results.rounding import floor_of_mean, noise_floor
from patchsweep.results.stated import stated_errors
from patchsweep.results.statistics import (
    CalibrationBin,
    Floats,
    calibration,
    kendall,
    pearson,
    precision,
    recall,
    sign_agreement,
    slope,
    spearman,
)
from patchsweep.store.attributes import attributes

TRUST = 0.95  # Pearson correlation from which the estimates are called good
# Pearson correlation from which they are called good enough to choose what to run exactly
SCREEN = 0.80

SLOPES = (0.8, 1.25)  # a slope outside these means that sizes are off, whatever the ranking
MIN_CELLS = 20  # below this many cells there is no verdict
TOP_K = 20  # how many of the largest cells the recall looks for; a fifth of all, if there are fewer
N_MISSES = 5
N_RESAMPLES = 200
ALL = "all sites"


@dataclass(frozen=True)
class Measure:
    """A number with its 95 % bootstrap interval over pairs (NaN: fewer than two pairs)."""

    value: float  # NaN where it is not defined
    low: float
    high: float


@dataclass(frozen=True)
class Miss:
    """A cell with a large difference between estimate and exact effect."""

    place: str  # such as "a12.h3 @16 ␣to"
    layer: int | str | None
    pos: int | str | None
    head: int | str | None  # head, key head or neuron
    token: str | None  # base token, where all pairs share it
    exact: float  # effects: metric(patched) - metric(base)
    estimate: float


@dataclass(frozen=True)
class Agreement:
    """Agreement of one method with exact effects, at one site or over all sites."""

    metric: str
    site: str  # or ALL
    method: str
    n_pairs: int
    n_cells: int  # cells where either effect is not zero
    n_exact_missing: int  # cells with an estimate but no exact value
    n_below_noise: int  # cells whose exact effect is below the run's noise floor, if measured
    stated_error: float  # largest error that the estimates state; NaN: they state none
    pearson: Measure
    spearman: Measure
    kendall: Measure
    slope: Measure  # of estimate on exact, through the origin
    sign_agreement: Measure  # share of cells with the same sign
    top_k: int
    recall: Measure  # share of the exact top k among the first 2 k estimates
    precision: Measure  # share of the first k estimates that are in the exact top k
    pearson_of_pairs: float  # over the cells of single pairs, not averaged
    misses: tuple[Miss, ...]  # largest first
    calibration: tuple[CalibrationBin, ...]
    exact_token_layers: int | None  # cost of the site's exact sweep
    method_token_layers: int | None  # cost of the method, for all its sites at once
    cost_ratio: float  # exact over method; NaN where one is unknown
    verdict: str  # "good", "screen", "poor" or "unknown"
    words: str  # the verdict as a sentence


@dataclass(frozen=True)
class Comparison:
    """Agreement of every method with exact effects, by site and over all sites."""

    sites: tuple[Agreement, ...]
    overall: tuple[Agreement, ...]  # one per metric and method with more than one site

    def of(self, site: str, method: str, metric: str | None = None) -> Agreement:
        """Return the agreement of one site and method; `metric` defaults to the first.

        Raises:
            StoreError: the site and method were not compared.
        """
        for agreement in (*self.sites, *self.overall):
            if (agreement.site, agreement.method) == (site, method) and metric in (
                None,
                agreement.metric,
            ):
                return agreement
        known = ", ".join(f"{a.site}/{a.method}" for a in self.sites)
        raise StoreError(f"{site}/{method} was not compared; there are {known}")


def compare(
    store: xr.Dataset | str | Path, *, n_resamples: int = N_RESAMPLES, top_k: int = TOP_K
) -> Comparison:
    """Compare all estimates of a store with its exact effects.

    Raises:
        StoreError: the store cannot be read, or no site has both estimates and exact effects.
        PlanError: a number is out of range.
    """
    whole_number("n_resamples", n_resamples, least=0)
    whole_number("top_k", top_k, least=1)
    ds = store if isinstance(store, xr.Dataset) else _open(store)
    exact_sites = summary.sites(ds)
    comparable = comparable_in(ds)
    if not comparable:
        raise StoreError(
            "there is nothing to compare: no site has both exact values and estimates; run one "
            "sweep with method=[exact,atp], or method=screen"
        )
    sites: list[Agreement] = []
    overall: list[Agreement] = []
    for metric in [str(m) for m in ds["metric"].values]:
        one = ds.sel(metric=[metric])
        for method in sorted({method for _, _, method in comparable}):
            cells = [_cells(one, site, name) for name, site, m in comparable if m == method]
            for site_cells in cells:
                sites.append(_agree(one, metric, method, [site_cells], n_resamples, top_k))
            if len(cells) > 1:
                overall.append(_agree(one, metric, method, cells, n_resamples, top_k))
    sites.sort(key=lambda a: (exact_sites.index(a.site), a.method))
    return Comparison(tuple(sites), tuple(overall))


def comparable_in(ds: xr.Dataset) -> list[tuple[str, str, str]]:
    """Return (variable, site, method) of each estimate whose site has exact values too."""
    exact = summary.sites(ds)
    named = [(name, *of) for name, of in summary.estimates(ds).items() if of[0] in exact]
    return sorted(named, key=lambda one: (exact.index(one[1]), one[2]))


def thresholds() -> str:
    """Return the rule of the verdicts in words."""
    return (
        f"Verdicts: trusted from a Pearson correlation of {TRUST} with a slope between {SLOPES[0]} "
        f"and {SLOPES[1]}; good for choosing what to run exactly from {SCREEN}; not trusted below. "
        "Cells where exact and estimate are both exactly zero do not count."
    )


def verdict(n_cells: int, pearson: float, slope: float) -> tuple[str, str]:
    """Return (verdict, sentence); the verdict is "good", "screen", "poor" or "unknown"."""
    if n_cells < MIN_CELLS or not np.isfinite(pearson):
        cells = "1 cell" if n_cells == 1 else f"{n_cells} cells"
        return "unknown", f"Too little to judge: {cells} to compare."
    low, high = SLOPES
    if pearson >= TRUST and low <= slope <= high:
        return "good", "Can be trusted here, in ranking and in size."
    if pearson >= TRUST:
        return (
            "screen",
            "Follows the large effects here, but sizes are off: do not quote its numbers.",
        )
    if pearson >= SCREEN:
        return "screen", "Good enough to choose what to run exactly; do not quote its numbers."
    return "poor", "Do not trust it here; run the exact sweep."


@dataclass(frozen=True)
class Cells:
    """Exact effects and estimates of one site, cell by cell."""

    site: str
    exact: Floats  # [pair, cell], NaN where either is unknown
    estimate: Floats
    n_exact_missing: int
    floor: Floats  # [cell] noise floor of the exact mean over pairs; 0: not measured
    template: xr.DataArray  # an array of one pair, with the axes of the cells

    def means(self, weights: Floats | None = None) -> tuple[Floats, Floats]:
        """Return means over pairs, weighted by `weights` [pair]; NaN without any known pair."""
        known = np.isfinite(self.exact)
        w = known * (np.ones(len(known)) if weights is None else weights)[:, None]
        total = w.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            x = (np.where(known, self.exact, 0) * w).sum(axis=0) / total
            y = (np.where(known, self.estimate, 0) * w).sum(axis=0) / total
        return x, y


def means_of_both(
    ds: xr.Dataset, site: str, name: str
) -> tuple[xr.DataArray, Floats, Floats, NDArray[np.int64]]:
    """Return mean exact effects of `site`, which has the axes of the cells, then for flat cells
    those, the estimates in `name` over the same pairs, and the cells where either is not zero.

    `ds` has one metric. Where an estimate has no sign, the exact effects have none either.
    """
    exact = summary.effect_mean(ds, site).squeeze("metric", drop=True)
    known = np.isfinite(summary.effect(ds, site))
    estimate = summary.effect(ds, name).where(known).mean("pair").squeeze("metric", drop=True)
    estimate = estimate.transpose(*exact.dims)
    x, y = (array.values.astype(np.float64).ravel() for array in (exact, estimate))
    if summary.is_absolute(ds, name):
        x = np.abs(x)
    # cells where both are exactly zero are dead: known without a run, they would raise the scores
    return exact, x, y, np.flatnonzero(np.isfinite(x) & np.isfinite(y) & ((x != 0) | (y != 0)))


def _cells(ds: xr.Dataset, site: str, name: str) -> Cells:
    effects = summary.effect(ds, site)
    exact = effects.squeeze("metric", drop=True)
    floor = noise_floor(ds, site)
    floor = None if floor is None else floor_of_mean(effects, floor)
    estimate = summary.effect(ds, name).squeeze("metric", drop=True).transpose(*exact.dims)
    dims = [d for d in exact.dims if d != "pair"]
    x = exact.transpose("pair", *dims).values.astype(np.float64)
    y = estimate.transpose("pair", *dims).values.astype(np.float64)
    x, y = x.reshape(len(x), -1), y.reshape(len(y), -1)
    if summary.is_absolute(ds, name):
        x = np.abs(x)  # the estimate has no sign
    known = np.isfinite(x) & np.isfinite(y)
    missing = int((np.isfinite(y) & ~np.isfinite(x)).any(axis=0).sum())
    return Cells(
        site,
        np.where(known, x, np.nan),
        np.where(known, y, np.nan),
        missing,
        np.zeros(x.shape[1]) if floor is None else np.nan_to_num(floor.values).ravel(),
        exact.isel(pair=0, drop=True),
    )


def _agree(
    ds: xr.Dataset,
    metric: str,
    method: str,
    cells: Sequence[Cells],
    n_resamples: int,
    top_k: int,
) -> Agreement:
    x, y, index = _pooled(cells)
    k = max(1, min(top_k, len(x) // 5))
    measures: dict[str, Callable[[Floats, Floats], float]] = {
        "pearson": pearson,
        "spearman": spearman,
        "kendall": kendall,
        "slope": slope,
        "sign_agreement": sign_agreement,
        "recall": lambda a, b: recall(a, b, k),
        "precision": lambda a, b: precision(a, b, k),
    }
    n_pairs = len(cells[0].exact)
    drawn: dict[str, list[float]] = {name: [] for name in measures}
    rng = np.random.default_rng(0)
    for _ in range(n_resamples if n_pairs > 1 else 0):
        weights = rng.multinomial(n_pairs, np.full(n_pairs, 1 / n_pairs)).astype(np.float64)
        a, b, _ = _pooled(cells, weights)
        for name, measure in measures.items():
            drawn[name].append(measure(a, b))
    values = {
        name: Measure(measure(x, y), *_interval(drawn[name])) for name, measure in measures.items()
    }
    kind, words = verdict(len(x), values["pearson"].value, values["slope"].value)
    floor = np.concatenate([c.floor for c in cells])[index]
    n_below_noise = int(((floor > 0) & (np.abs(x) <= floor)).sum())
    if n_below_noise:
        words += (
            f" {n_below_noise} of the {len(x)} exact effects are below the run's noise floor, and "
            "rounding agrees with nothing."
        )
    stated = [x for x in stated_errors(ds) if x.method == method]
    stated = [x for x in stated if x.site in {c.site for c in cells}]
    words += "".join(f" {x.words}." for x in stated)
    pairwise = [np.concatenate([getattr(c, side).ravel() for c in cells]) for side in _SIDES]
    known = np.isfinite(pairwise[0]) & ((pairwise[0] != 0) | (pairwise[1] != 0))
    attrs = attributes(ds)
    plan: Mapping[str, Any] = attrs.get("plan", {})
    costs: Mapping[str, Any] = attrs.get("attribution", {})
    exact_cost = [plan.get(c.site, {}).get("token_layers") for c in cells]
    exact_total = None if None in exact_cost else sum(exact_cost)
    method_cost = costs.get(method, {}).get("token_layers")
    return Agreement(
        metric=metric,
        site=cells[0].site if len(cells) == 1 else ALL,
        method=method,
        n_pairs=n_pairs,
        n_cells=len(x),
        n_exact_missing=sum(c.n_exact_missing for c in cells),
        n_below_noise=n_below_noise,
        stated_error=max((x.largest for x in stated), default=math.nan),
        top_k=k,
        **values,
        pearson_of_pairs=pearson(pairwise[0][known], pairwise[1][known]),
        misses=_misses(ds, cells, x, y, index),
        calibration=calibration(x, y),
        exact_token_layers=exact_total,
        method_token_layers=method_cost,
        cost_ratio=exact_total / method_cost if exact_total and method_cost else math.nan,
        verdict=kind,
        words=words,
    )


_SIDES = ("exact", "estimate")


def _pooled(
    cells: Sequence[Cells], weights: Floats | None = None
) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Return mean exact effects, mean estimates and indices of cells where either is nonzero.

    Indices count through the concatenation of `cells`.
    """
    means = [c.means(weights) for c in cells]
    x, y = (np.concatenate([m[side] for m in means]) for side in (0, 1))
    index = np.flatnonzero(np.isfinite(x) & ((x != 0) | (y != 0)))
    return x[index], y[index], index


def _interval(drawn: Sequence[float]) -> tuple[float, float]:
    finite = np.array([value for value in drawn if math.isfinite(value)])
    if not len(finite):
        return math.nan, math.nan
    low, high = np.percentile(finite, [2.5, 97.5])
    return float(low), float(high)


def _misses(
    ds: xr.Dataset,
    cells: Sequence[Cells],
    x: Floats,
    y: Floats,
    index: NDArray[np.int64],
) -> tuple[Miss, ...]:
    starts = np.cumsum([0, *(c.exact.shape[1] for c in cells)])
    tokens = summary.shared_tokens(ds) if "base_token" in ds.variables else []
    misses = []
    for i in np.argsort(-np.abs(y - x), kind="stable")[:N_MISSES]:
        site = int(np.searchsorted(starts, index[i], side="right")) - 1
        template = cells[site].template
        location = at(template, int(index[i] - starts[site]), tokens)
        name = location["place"] if len(cells) == 1 else f"{cells[site].site} {location['place']}"
        misses.append(Miss(**{**location, "place": name}, exact=float(x[i]), estimate=float(y[i])))
    return tuple(misses)


def at(template: xr.DataArray, cell: int, tokens: Sequence[str | None]) -> dict[str, Any]:
    """Return the place of flat index `cell`: `place` in words, layer, pos, head and token."""
    labels, token = summary.place_of(template, cell, tokens)
    letters = {"layer": "L", "head": "H", "kv_head": "KV", "neuron": "N", "pos": "@"}
    unit = next((d for d in summary.UNIT_DIMS if d in labels), None)
    if unit in ("head", "kv_head") and "layer" in labels:  # as in graphs and edges
        parts = [f"a{labels['layer']}.{'h' if unit == 'head' else 'kv'}{labels[unit]}"]
        parts += [f"@{labels['pos']}"] if "pos" in labels else []
    else:
        parts = [f"{letter}{labels[dim]}" for dim, letter in letters.items() if dim in labels]
    if token:
        parts.append(printable(token.replace(" ", "␣").replace("\n", "⏎")))
    return {
        "place": " ".join(parts),
        "layer": labels.get("layer"),
        "pos": labels.get("pos"),
        "head": labels[unit] if unit else None,
        "token": token,
    }


def _open(store: str | Path) -> xr.Dataset:
    from patchsweep.store.dataset import open_store

    return open_store(store)
