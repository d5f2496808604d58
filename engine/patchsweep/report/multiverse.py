"""The page of a multiverse: a circuit's faithfulness in all variants, and what moves it most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, plural
from patchsweep.report.figure import SERIES, figure, figure_scripts, level_lines, plain
from patchsweep.report.html import fact_list, numbers, table
from patchsweep.report.question import model_name
from patchsweep.report.shell import page, section
from patchsweep.report.tables import provenance_table
from patchsweep.store.attributes import attributes

_CHOICES = ("ablation", "mean_set", "direction", "positions", "level")
_WORDS = {
    "ablation": "what the rest is replaced by",
    "mean_set": "the prompts of means",
    "direction": "ablate the rest (noising), or restore the circuit (denoising)",
    "positions": "where ablated values act",
    "level": "edges, or all edges of their nodes",
    "metric": "the metric",
}


def build(ds: xr.Dataset) -> str:
    """Return the page of a store of variants as self-contained HTML."""
    attrs = attributes(ds)
    model = model_name(ds)
    parts = [
        _header(ds, attrs, model),
        section("range", "Every variant", _curve(ds)),
        section("choices", "What moves it", _choices(ds)),
        section("options", "Option by option", _options(ds)),
        section("variants", "The numbers", _variants(ds)),
        section("provenance", "Where the numbers come from", provenance_table(ds)),
    ]
    return page(f"Ways to measure a circuit of {model}", parts, scripts=figure_scripts())


def _header(ds: xr.Dataset, attrs: Mapping[str, Any], model: str) -> str:
    values = ds["faithfulness"].values
    known = values[np.isfinite(values)]
    low, high = (known.min(), known.max()) if known.size else (np.nan, np.nan)
    facts = [
        ("model", esc(model)),
        ("pairs", count(int(attrs["n_pairs"]))),
        ("edges", f"{count(int(attrs['count']))}, by {esc(attrs['method'])}"),
        ("variants", count(int(attrs["n_variants"]))),
        ("faithfulness", f"{number(float(low))} … {number(float(high))}"),
    ]
    most = str(attrs["most"]).replace("_", " ")
    moved = f" The choice that moves it most is <b>{esc(most)}</b>." if most else ""
    undefined = int(attrs["undefined"])
    without = (
        f" {plural(undefined, 'variant')} without: there, ablating everything moves the metric by "
        "no more than rounding."
        if undefined
        else ""
    )
    return (
        '<header><h1>How faithful is one circuit of <span class="name">'
        f'{esc(model)}</span>?</h1><p class="lead"><b>Faithfulness</b> is (m(circuit) &minus; '
        "m(nothing)) / (m(everything) &minus; m(nothing)). What it comes to depends on what the "
        "rest of the model is replaced by, where, in which direction, and on the metric m. Here "
        f"one circuit is measured under every combination.{moved}{without}</p>"
        f"{fact_list(facts)}</header>"
    )


def _curve(ds: xr.Dataset) -> str:
    """Return HTML with all variants in the order of their faithfulness, metric by metric."""
    traces = []
    for i, metric in enumerate(ds["metric"].values):
        values = ds["faithfulness"].sel(metric=metric).values
        order = np.argsort(values)[: int(np.isfinite(values).sum())]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": plain(metric),
                "x": np.linspace(0, 100, len(order)),
                "y": values[order],
                "text": [_named(ds, int(at)) for at in order],
                "hovertemplate": "%{text}<br>%{y:.3f}<extra>" + plain(metric) + "</extra>",
                "line": {"color": SERIES[i % len(SERIES)], "width": 1},
                "marker": {"size": 6},
            }
        )
    layout = {
        "xaxis": {"title": {"text": "variants with less [%]"}},
        "yaxis": {"title": {"text": "faithfulness"}},
        "shapes": level_lines(0, 1),
        "height": 380,
    }
    drawn = figure("variants", traces, layout, caption="Point at a variant for its choices.")
    return f'<div class="grid">{drawn}</div>'


def _named(ds: xr.Dataset, i: int) -> str:
    options = (str(ds[name].values[i]) for name in _CHOICES)
    return ", ".join(plain(option) for option in options if option)


def _choices(ds: xr.Dataset) -> str:
    order = np.argsort(-np.nan_to_num(ds["moves"].values, nan=-1.0), kind="stable")
    rows = []
    for i in order:
        name = str(ds["choice"].values[i])
        shown = f"<td>{esc(name.replace('_', ' '))}</td><td>{_WORDS[name]}</td>"
        moves = (number(float(ds[key].values[i])) for key in ("moves", "moves_most"))
        rows.append(f"<tr>{shown}{numbers(*moves)}</tr>")
    return (
        "<p>How far faithfulness moves when one choice alone changes: the largest minus the least, "
        "all else equal.</p>" + table(("choice", "", "on average", "at most"), rows, ("choice", ""))
    )


def _options(ds: xr.Dataset) -> str:
    rows = []
    for name in (*_CHOICES, "metric"):
        options = list(dict.fromkeys(map(str, ds[name].values)))
        named = [option for option in options if option]
        for option in named if len(named) > 1 else []:
            at = (ds[name] == option).values
            values = ds["faithfulness"].values
            own = values[:, at] if name == "metric" else values[at]
            own = own[np.isfinite(own)]
            parts = np.quantile(own, [0, 0.5, 1]) if own.size else np.full(3, np.nan)
            rows.append(
                f"<tr><td>{esc(name.replace('_', ' '))}</td><td>{esc(option)}</td>"
                f"{numbers(count(own.size), *map(number, parts))}</tr>"
            )
    columns = ("choice", "option", "variants", "least", "median", "most")
    return table(columns, rows, columns[:2])


def _variants(ds: xr.Dataset) -> str:
    metrics = [str(metric) for metric in ds["metric"].values]
    rows = []
    for i in range(ds.sizes["variant"]):
        options = "".join(f"<td>{esc(ds[name].values[i])}</td>" for name in _CHOICES)
        values = ds["faithfulness"].values[i]
        rows.append(f"<tr>{options}{numbers(*map(number, values))}</tr>")
    choices = [name.replace("_", " ") for name in _CHOICES]
    inner = table([*choices, *metrics], rows, choices)
    return f"<details><summary>{plural(len(rows), 'row')}</summary>{inner}</details>"
