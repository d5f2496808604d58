"""The page of patched latents: the largest effects of each pair, and estimates against effects."""

from __future__ import annotations

import numpy as np
import xarray as xr

from patchsweep.analyses.latents.findings import (
    agreement,
    effects_of,
    largest_latents,
    methods_of,
)
from patchsweep.data.show import count, esc, number, percent, token_html
from patchsweep.report.figure import figure, figure_scripts
from patchsweep.report.html import numbers, table
from patchsweep.report.question import model_name
from patchsweep.report.shell import page, section
from patchsweep.results.tolerance import tolerance_notes

N_PAIRS = 8  # pairs whose largest effects are on the page
N_LARGEST = 20
N_POINTS = 3000  # points of the figure of estimates, the largest effects first


def build(ds: xr.Dataset) -> str:
    """Return the page of the Dataset of `patchsweep.analyses.latents.latents`."""
    model = model_name(ds)
    metric = str(ds["metric"].values[0])
    n_pairs = ds.sizes["pair"]
    names = ", ".join(dict.fromkeys(str(x) for x in ds["dictionary"].values))
    rest = "" if n_pairs <= N_PAIRS else f" The first {N_PAIRS} of {n_pairs} pairs are listed."
    header = (
        f'<header><h1>Latents of <span class="name">{esc(model)}</span></h1>'
        f'<p class="lead">One latent of {esc(names)} at one position takes another activation; '
        f"the rest of the base run stays. {int(ds.attrs['n_live']):,} of "
        f"{int(ds.attrs['n_patches']):,} patches change an activation. Effects in "
        f"{esc(metric)}.{rest}</p></header>"
    )
    notes = "".join(f"<p>{esc(text)}</p>" for text in tolerance_notes(ds))
    told = [section("tolerance", "Tolerance", notes)] if notes else []
    parts = [header, *told, *_estimates(ds, metric)]
    parts += [_pair(ds, metric, pair) for pair in range(min(n_pairs, N_PAIRS))]
    return page(f"Latents of {model}", parts, scripts=figure_scripts())


def _estimates(ds: xr.Dataset, metric: str) -> list[str]:
    """Return the section of estimates beside exact effects; none if one of the two is missing."""
    found = [one for one in agreement(ds, metric) if one.n > 1]
    if not found:
        return []
    rows = [
        f"<tr><td>{esc(one.method)}</td>"
        f"{numbers(number(one.pearson), percent(one.same_sign), count(one.n))}</tr>"
        for one in found
    ]
    listed = table(("estimate", "Pearson's r", "same sign", "patches"), rows, ("estimate",))
    exact = effects_of(ds, metric).values
    order = np.argsort(-np.abs(np.nan_to_num(exact)), axis=None, kind="stable")[:N_POINTS]
    traces = []
    for method in methods_of(ds):
        estimate = ds[method].sel(metric=metric).transpose("pair", "pos", "latent").values
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": method,
                "x": exact.ravel()[order],
                "y": estimate.ravel()[order],
                "marker": {"size": 5, "opacity": 0.6},
            }
        )
    layout = {
        "height": 420,
        "xaxis": {"title": {"text": f"exact effect in {metric}"}},
        "yaxis": {"title": {"text": "estimate"}},
    }
    words = "<p>Signs are weighed by the size of the exact effect.</p>"
    return [section("estimates", "Estimates", listed + words + figure("estimates", traces, layout))]


def _pair(ds: xr.Dataset, metric: str, pair: int) -> str:
    one = ds.sel(metric=metric).isel(pair=pair)
    methods = methods_of(ds)
    prompt = "".join(token_html(str(t)) for t in one["base_token"].values if str(t))
    base, source = (float(one[f"{x}_metric"]) for x in ("base", "source"))
    rows = []
    for x in largest_latents(ds, metric, pair, N_LARGEST):
        values = [x.change, x.effect, *(x.estimates[method] for method in methods)]
        rows.append(
            f"<tr><td>{esc(x.dictionary)}</td>{numbers(x.latent)}"
            f"<td>{x.pos} {token_html(x.token)}</td>"
            f"{numbers(*(number(value, sign=True) for value in values))}</tr>"
        )
    heads = ("dictionary", "latent", "position", "change", "effect", *methods)
    words = f"<p>{prompt}</p><p>{esc(metric)}: base {number(base)}, source {number(source)}.</p>"
    listed = table(heads, rows, ("dictionary", "position"))
    return section(f"pair-{pair}", f"Pair {pair}", words + listed)
