"""Plotly figures of a sweep: maps of sites, and estimates against exact effects.

Colours, directions and hover texts are those of the reports: blue towards the source run, red away
from it, grey where nothing ran; layers run upwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from patchsweep.arguments import one_of
from patchsweep.data.show import number, visible
from patchsweep.errors import MethodError
from patchsweep.report.axes import DIM_WORDS, Axes, folded, lay_out, strongest
from patchsweep.report.figure import RED_BLUE, plain
from patchsweep.report.heatmap import NATURAL, colour_limit
from patchsweep.results import accessor as summary
from patchsweep.results.compare import compare, means_of_both

UNRUN = "#b9bec4"
_MAX_ROW, _HEIGHT = 22, 460  # pixels: of a row at most, of all rows
_LAYOUT = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 20, "t": 50, "b": 60},
    "font": {"size": 12},
    "hoverlabel": {"align": "left"},
}


def plot(
    ds: xr.Dataset,
    site: str,
    *,
    metric: str | None = None,
    pair: int | None = None,
    quantity: str | None = None,
    placebo: xr.Dataset | None = None,
) -> go.Figure:
    """Return a map of `site`: layers upwards, tokens or heads across, one cell per patch.

    A site with heads and positions shows heads, each at the position where its effect is largest;
    select positions to see one: `ds.sel(pos=[16]).patchsweep.plot("z")`. A site with one axis is
    drawn as bars. `fig.write_image("map.svg")` writes SVG, PNG and PDF (with kaleido).

    Args:
        metric: default the first.
        pair: a pair; default the mean over pairs.
        quantity: `recovered` (no unit) or `effect` (the metric's unit). Default: recovered, or
            effect where source and base differ too little for it (see `summary.small_gaps`).
        placebo: a sweep with a meaningless donor; cells whose mean effect is not above its control
            level (`patchsweep.summary.control_level`) are left blank.

    Raises:
        SiteError, MetricError, PlanError, ConfigError: an argument names nothing in `ds`, or a
            placebo is given for one pair.
    """
    if quantity is not None:
        one_of("quantity", quantity, ("recovered", "effect"))
    name = summary.metric_name(ds, metric)
    one = summary.chosen(ds, name, pair)
    control = summary.control_of(placebo, site, name, pair)
    arrays = {
        "value": summary.value(one, site).mean("pair"),
        "effect": summary.effect_mean(one, site),
        "recovered": summary.recovered_mean(one, site),
    }
    if quantity is None:
        weak = bool(summary.small_gaps(ds.sel(metric=[name])).sel(pair=one["pair"]).all())
        quantity = "effect" if weak or not arrays["recovered"].notnull().any() else "recovered"
    axes = lay_out(summary.value(one, site))
    grids = {key: axes.grid(array.squeeze("metric", drop=True)) for key, array in arrays.items()}
    at, flattened = strongest(grids["effect"], grids.values())
    flat = dict(zip(grids, flattened, strict=True))
    tokens = summary.shared_tokens(one, pair)
    behind = axes.grid(summary.n_pairs(one, site).squeeze("metric", drop=True))
    (n_behind,) = strongest(grids["effect"], [behind])[1]
    n_pairs = one.sizes["pair"]

    within = np.zeros(at.shape, bool) if control is None else np.abs(flat["effect"]) <= control

    def tell(row: int, column: int) -> str:
        index = {axes.rows: row, axes.columns: column, axes.hidden: int(at[row, column])}
        lines = [f"{DIM_WORDS[d]} {_named(axes, d, i, tokens)}" for d, i in index.items() if d]
        if np.isnan(flat["value"][row, column]):
            return "<br>".join([*lines, "<b>not run</b>"])
        lines += [
            f"<b>recovered {number(float(flat['recovered'][row, column]))}</b>",
            f"effect {number(float(flat['effect'][row, column]), sign=True)}",
            f"{plain(name)} {number(float(flat['value'][row, column]))}",
        ]
        if n_pairs > 1:
            lines.append(f"mean over {int(n_behind[row, column])} of {n_pairs} pairs")
        if control is not None and within[row, column]:
            lines.append(f"within the control level of {number(control)}")
        return "<br>".join(lines)

    fold = folded(flat["effect"]) if axes.columns == "pos" else 0
    kept = range(max(0, fold - 1), flat["value"].shape[1])  # the first stands for the folded ones
    shown = np.where(within, np.nan, flat[quantity])[:, kept.start :]
    texts = [[tell(r, c) for c in kept] for r in range(shown.shape[0])]
    if fold:
        names = axes.labels["pos"]
        for row in texts:
            row[0] = (
                f"positions {names[0]} to {names[fold - 1]}<br>before the first token that "
                "differs:<br>no patch changes anything here"
            )
    over = f"pair {pair}" if pair is not None else f"mean over {n_pairs} pairs"
    title = f"{summary.SITE_WORDS.get(site, site)}" + (f", {over}" if ds.sizes["pair"] > 1 else "")
    if control is not None:
        title += f"; blank: within the placebo's control level of {number(control)}"
    figure = go.Figure(layout={**_LAYOUT, "title": {"text": plain(title), "font": {"size": 15}}})
    what = "recovered" if quantity == "recovered" else f"effect on {plain(name)}"
    columns = _ticks(axes, axes.columns, tokens, behind if n_pairs > 1 else None)[kept.start :]
    if fold:
        columns[0] = f"<i>{fold} positions</i>"
    if axes.rows and axes.columns:
        natural = NATURAL if quantity == "recovered" else float(abs(summary.gap(one)).median())
        limit, _ = colour_limit(shown, natural if np.isfinite(natural) else NATURAL)
        _heat(figure, shown, texts, limit, what, narrow=fold > 0)
        rows = _ticks(axes, axes.rows, tokens, None)
        figure.update_yaxes(title=DIM_WORDS[axes.rows], **_tick_axis(rows, 24))
        figure.update_layout(height=130 + round(min(_HEIGHT, _MAX_ROW * len(rows))))
    else:
        limit, _ = colour_limit(shown, np.inf)
        columns = columns if axes.columns else _ticks(axes, axes.rows, tokens, None)
        _bars(figure, shown.ravel(), [t for row in texts for t in row], limit)
        figure.update_yaxes(title=what, zeroline=True)
    dim = axes.columns or axes.rows
    figure.update_xaxes(title=DIM_WORDS.get(dim or "", ""), **_tick_axis(columns, 60))
    if fold and axes.rows:
        figure.update_xaxes(tickvals=[0.25, *figure.layout.xaxis.tickvals[1:]])
    if dim == "pos":
        figure.update_xaxes(tickangle=-90, tickfont={"family": "monospace", "size": 11}, title="")
    return figure


def scatter(ds: xr.Dataset, site: str, method: str, *, metric: str | None = None) -> go.Figure:
    """Return the estimates of `method`, such as `atp`, against the exact effects of `site`.

    A point is a cell, with its mean over pairs; cells where both are zero are left out. On the
    dotted diagonal the estimate is right. The title has the agreement of `ps.compare`.

    Raises:
        SiteError, MetricError, MethodError: `ds` has no such site, metric or estimate.
    """
    name = f"{site}_{method}"
    if name not in summary.estimates(ds) or site not in summary.sites(ds):
        both = [x for x, (s, _) in summary.estimates(ds).items() if s in summary.sites(ds)]
        raise MethodError(
            f"there are no exact effects and estimates of {method} for site={site!r}; "
            f"the Dataset has {', '.join(both) or 'none'}; sweep with method=['exact', 'atp']"
        )
    metric = summary.metric_name(ds, metric)
    one = ds.sel(metric=[metric])
    exact, x, y, cells = means_of_both(one, site, name)
    tokens = summary.shared_tokens(one)
    texts = []
    for cell in cells:
        labels, token = summary.place_of(exact, cell, tokens)
        place = ", ".join(
            f"{DIM_WORDS[dim]} {label}"
            + (f" {plain(visible(token or ''))}" if dim == "pos" else "")
            for dim, label in labels.items()
        )
        texts.append(
            f"{place}<br>exact {number(x[cell], sign=True)}<br>{plain(method)} "
            f"{number(y[cell], sign=True)}"
        )
    found = compare(one).of(site, method)
    title = (
        f"{plain(method)} on {plain(site)}: Pearson {number(found.pearson.value)}, slope "
        f"{number(found.slope.value)}"
    )
    ends = [float(min(*x[cells], *y[cells], 0)), float(max(*x[cells], *y[cells], 0))]
    figure = go.Figure(layout={**_LAYOUT, "title": {"text": title, "font": {"size": 15}}})
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"dash": "dot", "color": "#545d66"}, hoverinfo="skip"
    )
    figure.add_scatter(
        x=x[cells],
        y=y[cells],
        mode="markers",
        marker={"color": "#2166ac", "opacity": 0.5, "size": 6},
        hovertext=texts,
        hoverinfo="text",
    )
    figure.update_layout(showlegend=False, width=520, height=480)
    figure.update_xaxes(title=f"exact effect on {plain(metric)}", zeroline=True)
    figure.update_yaxes(title=f"{plain(method)} estimate", zeroline=True)
    return figure


def _heat(
    figure: go.Figure,
    shown: np.ndarray,
    texts: list[list[str]],
    limit: float,
    what: str,
    *,
    narrow: bool,
) -> None:
    """Draw a map; `narrow`: the first column has half the width of the others."""
    edges = [i - 0.5 for i in range(shown.shape[1] + 1)]
    edges[0] += 0.5 * narrow
    common = {
        "x": edges,
        "y": list(range(shown.shape[0])),
        "hovertext": texts,
        "hoverinfo": "text",
        "xgap": 1,
        "ygap": 1,
    }
    figure.add_heatmap(
        z=shown,
        zmin=-limit,
        zmax=limit,
        colorscale=RED_BLUE,
        hoverongaps=False,
        colorbar={
            "title": {"text": what, "side": "right"},
            "thickness": 12,
            "exponentformat": "e",
        },
        **common,
    )
    if np.isnan(shown).any():
        figure.add_heatmap(
            z=np.where(np.isnan(shown), 1.0, np.nan),
            colorscale=[[0, UNRUN], [1, UNRUN]],
            showscale=False,
            hoverongaps=False,
            **common,
        )


def _bars(figure: go.Figure, shown: np.ndarray, texts: list[str], limit: float) -> None:
    figure.add_bar(
        x=list(range(len(shown))),
        y=shown,
        hovertext=texts,
        hoverinfo="text",
        marker={
            "color": shown,
            "cmin": -limit,
            "cmax": limit,
            "colorscale": RED_BLUE,
            "line": {"color": "#545d66", "width": 0.5},
        },
    )
    figure.update_layout(height=380)


def _named(axes: Axes, dim: str, index: int, tokens: Sequence[str | None]) -> str:
    label = plain(axes.labels[dim][index])
    token = tokens[index] if dim == "pos" and index < len(tokens) else None
    return f"{label} {plain(visible(token))}" if token else label


def _ticks(
    axes: Axes, dim: str | None, tokens: Sequence[str | None], behind: np.ndarray | None
) -> list[str]:
    """Return a label per index of `dim`: tokens for positions, with the pairs behind if unequal."""
    if dim is None:
        return ["all"]
    if dim != "pos":
        return [plain(label) for label in axes.labels[dim]]
    labels = []
    counts = [] if behind is None else behind.max(axis=(0, 2)).astype(int).tolist()
    unequal = len(set(counts)) > 1
    for i, label in enumerate(axes.labels[dim]):
        token = plain(visible(tokens[i] or ""))
        labels.append(f"{token} {plain(label)}".strip() + (f" n={counts[i]}" if unequal else ""))
    return labels


def _tick_axis(labels: Sequence[str], most: int) -> dict[str, object]:
    step = max(1, -(-len(labels) // most))
    at = list(range(0, len(labels), step))
    return {
        "tickmode": "array",
        "tickvals": at,
        "ticktext": [labels[i] for i in at],
        "showgrid": False,
        "zeroline": False,
    }
