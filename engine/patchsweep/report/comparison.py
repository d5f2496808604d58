"""Panels that plot an attribution's estimates against exact effects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, plural
from patchsweep.results import accessor as summary
from patchsweep.results.compare import Agreement, Measure, at, comparable_in, compare, means_of_both

MAX_POINTS = 1000  # points drawn: half of them the largest, the rest a fixed random sample


@dataclass(frozen=True)
class Panel:
    """The panel of one site, method and metric."""

    html: str
    payload: dict[str, object]  # for the page's script


def compare_panels(ds: xr.Dataset) -> list[Panel]:
    """Return a panel for each metric and each estimate whose site also has exact values."""
    panels = []
    for name, site, method in comparable_in(ds):
        ends = {(method, site), (method, "")}
        attrs = {str(x): ds[x].attrs for x in ds.data_vars}
        stated = [x for x, of in attrs.items() if (of.get("method"), of.get("site")) in ends]
        one = ds[[site, name, *{*stated} - {name}, "base_metric", "source_metric"]].load()
        for metric in (str(m) for m in ds["metric"].values):
            one_metric = one.sel(metric=[metric])
            panels.append(_panel(one_metric, name, compare(one_metric).of(site, method)))
    return panels


def _panel(ds: xr.Dataset, name: str, found: Agreement) -> Panel:
    exact, x, y, cells = means_of_both(ds, found.site, name)
    x, y = x[cells], y[cells]

    shown = _sample(x, y)
    misses = np.argsort(-np.abs(y - x), kind="stable")[: len(found.misses)]
    shown = np.union1d(shown, misses)
    tokens = summary.shared_tokens(ds) if "base_token" in ds.variables else []
    labels = [at(exact, int(cells[i]), tokens)["place"] for i in shown]
    drawn = "" if len(shown) == len(x) else f", {count(len(shown))} of them drawn"
    over = f"mean over {plural(found.n_pairs, 'pair')}, " if found.n_pairs > 1 else ""
    caption = (
        f"<strong>{esc(found.method)} on {esc(found.site)}: {found.words}</strong> "
        f"Pearson {_measure(found.pearson)}, Spearman {_measure(found.spearman)}, slope "
        f"{_measure(found.slope)} ({over}{plural(found.n_cells, 'cell')} where either effect is "
        f"not zero{drawn}). Of the {found.top_k} largest exact effects "
        f"{count(found.recall.value * found.top_k)} are among the first {2 * found.top_k} "
        f"estimates{_cost(found)}; the largest misses are marked."
    )
    key = f"{found.metric}|{name}"
    payload: dict[str, object] = {
        "key": key,
        "metric": found.metric,
        "site": found.site,
        "method": found.method,
        "exact": [float(f"{v:.5g}") for v in x[shown]],
        "estimate": [float(f"{v:.5g}") for v in y[shown]],
        "labels": labels,
        "misses": [int(np.searchsorted(shown, i)) for i in misses],
    }
    html = (
        f'<figure class="panel {found.verdict}" data-compare="{esc(key)}" '
        f'data-metric="{esc(found.metric)}">'
        f'<div class="plot" role="img" aria-label="{esc(found.method)} against exact, '
        f'{esc(found.site)}"></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )
    return Panel(html, payload)


def _measure(found: Measure) -> str:
    """Return the number, with its interval if it has one."""
    if not math.isfinite(found.low):
        return number(found.value)
    return f"{number(found.value)} ({number(found.low)} to {number(found.high)})"


def _cost(found: Agreement) -> str:
    if not math.isfinite(found.cost_ratio):
        return ""
    return f"; all of the method's sites cost 1/{count(found.cost_ratio)} of this exact sweep"


def _sample(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return ascending indices of at most `MAX_POINTS` points, the same in every call."""
    if len(x) <= MAX_POINTS:
        return np.arange(len(x))
    order = np.argsort(-np.maximum(np.abs(x), np.abs(y)), kind="stable")
    rest = np.random.default_rng(0).permutation(order[MAX_POINTS // 2 :])
    return np.sort(np.concatenate([order[: MAX_POINTS // 2], rest[: MAX_POINTS - MAX_POINTS // 2]]))
