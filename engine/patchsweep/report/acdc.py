"""The page of pruned circuits: sizes by threshold, and drawings of the edges that are left."""

from __future__ import annotations

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, plural
from patchsweep.report.graph import STYLE, Drawn, graph_of_edges
from patchsweep.report.html import fact_list, numbers, table
from patchsweep.report.question import model_name
from patchsweep.report.shell import page, section
from patchsweep.report.tables import provenance_table

N_DRAWN = 60  # most edges in one picture


def build(ds: xr.Dataset) -> str:
    """Return the page of a store of pruned circuits as self-contained HTML."""
    model = model_name(ds)
    parts = [_header(ds, model), section("sizes", "Threshold by threshold", _sizes(ds))]
    for i, threshold in enumerate(ds["threshold"].values):
        title = f"The circuit at {float(threshold):g}"
        parts.append(section(f"circuit-{i}", title, _drawing(ds.isel(threshold=i))))
    parts.append(section("provenance", "Where the numbers come from", provenance_table(ds)))
    return page(f"Pruned circuits of {model}", parts, style=STYLE)


def _header(ds: xr.Dataset, model: str) -> str:
    metric = f"<code>{esc(ds.attrs['metric'])}</code>"
    facts = [
        ("model", esc(model)),
        ("pairs", count(ds.sizes["pair"])),
        ("edges", count(int(ds["n_candidates"][0]))),
        ("ablation", esc(ds.attrs["ablation"])),
    ]
    return (
        f'<header><h1>Which edges of <span class="name">{esc(model)}</span> can go?</h1>'
        '<p class="lead">An <b>edge</b> is what one part writes into the residual stream, as far '
        "as one other part reads it. From the logits down each edge is tried: it goes if that adds "
        f"less than the threshold to the distance from the model, the mean of |{metric} of the "
        f"circuit &minus; {metric} of the model| over the pairs.</p>"
        f"{fact_list(facts)}</header>"
    )


def _sizes(ds: xr.Dataset) -> str:
    names = ("n_edges", "n_connected", "distance", "n_dead", "n_runs")
    columns = ("threshold", "edges left", "on a way to the logits", "distance", "dead", "runs")
    body = []
    for i, threshold in enumerate(ds["threshold"].values):
        one = ds.isel(threshold=i)
        cells = [f"{float(threshold):g}"]
        for name in names:
            value = one[name].item()
            cells.append(number(value) if name == "distance" else count(int(value)))
        body.append(f"<tr>{numbers(*cells)}</tr>")
    words = "<p>Dead edges went without a run: no metric depends on them any more.</p>"
    return words + table(columns, body)


def _drawing(one: xr.Dataset) -> str:
    change = np.where(one["kept"].values, one["change"].values, np.nan)
    if "pos" in one["kept"].dims:  # the position that matters most
        change = np.nan_to_num(change, nan=-np.inf).max(axis=-1)
        change[~np.isfinite(change)] = np.nan
    order = np.argsort(-np.nan_to_num(change, nan=-np.inf), axis=None, kind="stable")
    at = [np.unravel_index(i, change.shape) for i in order[:N_DRAWN]]
    senders, readers = one["sender"].values, one["reader"].values
    drawn = [
        Drawn(str(senders[u]), str(readers[v]), float(change[u, v]), number(float(change[u, v])))
        for u, v in at
        if np.isfinite(change[u, v])
    ]
    if not drawn:
        return '<p class="empty">No edge is left.</p>'
    svg = graph_of_edges(one, drawn, "The edges that are left")
    return (
        f"<p>The {plural(len(drawn), 'edge')} whose removal would add most, of "
        f"{count(int(one['n_edges']))} that are left. The wider, the more.</p>"
        f'<div class="scroll figure">{svg}</div>'
    )
