"""The panel that sets an attribution's estimates beside the exact effects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from patchsweep import summary
from patchsweep.report.html import count, esc, number, plural, visible

TRUST = 0.95
"""Pearson correlation from which the estimates are called good."""

SCREEN = 0.80
"""Pearson correlation from which they are called good enough to choose what to run exactly."""

SLOPES = (0.8, 1.25)
"""A slope outside these means that sizes are off, whatever the ranking."""

MIN_CELLS = 20
"""Below this many cells there is no verdict."""

MAX_POINTS = 1000
"""Points drawn: half of them the largest, the rest a fixed random sample."""

_N_MISSES = 5


@dataclass(frozen=True)
class Agreement:
    """How well estimates follow exact effects, over the cells where either is not zero."""

    n_cells: int
    pearson: float  # NaN where either side is constant
    spearman: float  # likewise
    slope: float  # of estimate on exact, through the origin


@dataclass(frozen=True)
class Panel:
    """One site, one method, one metric."""

    key: str  # unique in the page
    metric: str
    html: str
    payload: dict[str, object]  # for the page's script


def compare_panels(ds: xr.Dataset) -> list[Panel]:
    """A panel for each estimate that stands beside an exact site, for each metric."""
    exact = set(summary.sites(ds))
    found = [(n, s, m) for n, (s, m) in summary.estimates(ds).items() if s in exact]
    found.sort(key=lambda f: summary.sites(ds).index(f[1]))
    panels = []
    for name, site, method in found:
        one = ds[[site, name, "base_metric", "source_metric"]].load()
        for metric in (str(m) for m in ds["metric"].values):
            panels.append(_panel(one.sel(metric=[metric]), name, site, method, metric))
    return panels


def agreement(exact: np.ndarray, estimate: np.ndarray) -> Agreement:
    """Correlations and slope of two equally long vectors of effects without NaN."""
    enough = len(exact) > 2 and np.ptp(exact) > 0 and np.ptp(estimate) > 0
    return Agreement(
        n_cells=len(exact),
        pearson=float(stats.pearsonr(exact, estimate).statistic) if enough else np.nan,
        spearman=float(stats.spearmanr(exact, estimate).statistic) if enough else np.nan,
        slope=float(exact @ estimate / (exact @ exact)) if np.any(exact) else np.nan,
    )


def verdict(found: Agreement) -> tuple[str, str]:
    """(kind, sentence in plain words): "good", "screen", "poor" or "unknown"."""
    if found.n_cells < MIN_CELLS or not np.isfinite(found.pearson):
        return "unknown", f"Too little to judge: {plural(found.n_cells, 'cell')} to compare."
    low, high = SLOPES
    if found.pearson >= TRUST and low <= found.slope <= high:
        return "good", "Can be trusted here, in ranking and in size."
    if found.pearson >= TRUST:
        return (
            "screen",
            "Follows the large effects here, but sizes are off: do not quote its numbers.",
        )
    if found.pearson >= SCREEN:
        return "screen", "Good enough to choose what to run exactly; do not quote its numbers."
    return "poor", "Do not trust it here; run the exact sweep."


def _panel(ds: xr.Dataset, name: str, site: str, method: str, metric: str) -> Panel:
    exact = summary.effect_mean(ds, site).squeeze("metric", drop=True)
    estimate = summary.effect_mean(ds, name).squeeze("metric", drop=True)
    estimate = estimate.transpose(*exact.dims)
    x, y = exact.values.astype(np.float64).ravel(), estimate.values.astype(np.float64).ravel()
    # cells where both are exactly zero are dead: known without either, and they would flatter
    cells = np.flatnonzero(np.isfinite(x) & np.isfinite(y) & ((x != 0) | (y != 0)))
    x, y = x[cells], y[cells]
    found = agreement(x, y)
    kind, words = verdict(found)

    shown = _sample(x, y)
    misses = np.argsort(-np.abs(y - x), kind="stable")[:_N_MISSES]
    shown = np.union1d(shown, misses)
    tokens = summary.shared_tokens(ds) if "base_token" in ds.variables else []
    labels = [_label(exact, int(cells[i]), tokens) for i in shown]
    drawn = "" if len(shown) == len(x) else f", {count(len(shown))} of them drawn"
    over = f"mean over {plural(ds.sizes['pair'], 'pair')}, " if ds.sizes["pair"] > 1 else ""
    caption = (
        f"<strong>{esc(method)} on {esc(site)}: {words}</strong> "
        f"Pearson {number(found.pearson)}, Spearman {number(found.spearman)}, slope "
        f"{number(found.slope)} ({over}{plural(found.n_cells, 'cell')} where either effect is not "
        f"zero{drawn}); the largest misses are marked."
    )
    key = f"{metric}|{name}"
    payload: dict[str, object] = {
        "key": key,
        "metric": metric,
        "site": site,
        "method": method,
        "exact": [float(f"{v:.5g}") for v in x[shown]],
        "estimate": [float(f"{v:.5g}") for v in y[shown]],
        "labels": labels,
        "misses": [int(np.searchsorted(shown, i)) for i in misses],
    }
    html = (
        f'<figure class="panel {kind}" data-compare="{esc(key)}" data-metric="{esc(metric)}">'
        f'<div class="plot" role="img" aria-label="{esc(method)} against exact, {esc(site)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    return Panel(key, metric, html, payload)


def thresholds() -> str:
    """The rule behind the verdicts, as one sentence."""
    return (
        f"Verdicts: trusted from a Pearson correlation of {TRUST} with a slope between {SLOPES[0]} "
        f"and {SLOPES[1]}; good for choosing what to run exactly from {SCREEN}; not trusted below. "
        "Cells where exact and estimate are both exactly zero do not count."
    )


def _sample(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of at most `MAX_POINTS` points, ascending, the same ones every time."""
    if len(x) <= MAX_POINTS:
        return np.arange(len(x))
    order = np.argsort(-np.maximum(np.abs(x), np.abs(y)), kind="stable")
    rest = np.random.default_rng(0).permutation(order[MAX_POINTS // 2 :])
    return np.sort(np.concatenate([order[: MAX_POINTS // 2], rest[: MAX_POINTS - MAX_POINTS // 2]]))


def _label(array: xr.DataArray, cell: int, tokens: list[str | None]) -> str:
    """ "L12 H3 16 ␣to": the cell's layer, head, position and token."""
    at = dict(zip(array.dims, np.unravel_index(cell, array.shape), strict=True))
    letters = {"layer": "L", "head": "H", "kv_head": "KV", "neuron": "N", "pos": "@"}
    order = [d for d in letters if d in at]
    parts = [f"{letters[d]}{array[d].values[at[d]]}" for d in order]
    if "pos" in at and at["pos"] < len(tokens) and tokens[at["pos"]]:
        parts.append(visible(str(tokens[at["pos"]])))
    return " ".join(parts)
