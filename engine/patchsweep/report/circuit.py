"""The page of circuits: faithfulness and completeness by size, and a drawing of one circuit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, percent, plural
from patchsweep.report import question
from patchsweep.report.figure import (
    RED_BLUE,
    SERIES,
    figure,
    figure_scripts,
    level_lines,
    plain,
)
from patchsweep.report.graph import HOW_TO_READ, STYLE, Drawn, graph_of_edges, heads_per_key
from patchsweep.report.html import fact_list, numbers, table
from patchsweep.report.shell import page, section
from patchsweep.report.tables import provenance_table
from patchsweep.report.views import choose_views
from patchsweep.store.attributes import attributes

FAITHFUL = 0.8  # the page draws the smallest circuit with this faithfulness
N_DRAWN = 60  # most edges in the picture
N_LISTED = 30

_STYLE = f"{STYLE}tr.chosen td {{ font-weight: 600; }}\n"
_ABLATED = {
    "resample": "is what it would be on the <b>corrupted</b> prompt",
    "mean": "is its mean over the clean prompts",
    "zero": "is zero",
}


def chosen_size(ds: xr.Dataset) -> int:
    """Return the index of the size to draw: the smallest that is faithful, else the last.

    Faithfulness is that of the first metric.
    """
    faithful = np.flatnonzero(ds["faithfulness"].values[0] >= FAITHFUL)
    return int(faithful[0]) if faithful.size else ds.sizes["size"] - 1


def build(ds: xr.Dataset) -> str:
    """Return the page of a store of circuits as self-contained HTML."""
    metrics = [str(m) for m in ds["metric"].values]
    model = question.model_name(ds)
    parts = [_header(ds, model, metrics)]
    for n, metric in enumerate(metrics):
        suffix = f" of <code>{esc(metric)}</code>" if len(metrics) > 1 else ""
        parts.append(section(f"curves-{n}", f"How much a circuit does{suffix}", _curves(ds, n)))
        parts.append(section(f"sizes-{n}", f"Size by size{suffix}", _sizes(ds, n)))
    drawn = _edges(ds) if ds.attrs["level"] == "edges" else _nodes(ds)
    parts += [
        section("circuit", "The circuit", drawn),
        section("first", "The first to join", _first(ds)),
        section("provenance", "Where the numbers come from", provenance_table(ds)),
    ]
    return page(f"Circuits of {model}", parts, scripts=figure_scripts(), style=_STYLE)


def _header(ds: xr.Dataset, model: str, metrics: list[str]) -> str:
    level, ablation = str(ds.attrs["level"]), str(ds.attrs["intervention"])
    outside = _ABLATED.get(ablation, f"is given by the user ({esc(ablation)})")
    what = (
        "An <b>edge</b> is what one part writes into the residual stream, as far as one other part "
        "reads it"
        if level == "edges"
        else "A <b>node</b> is a head or an MLP"
    )
    names = " and ".join(f"<code>{esc(metric)}</code>" for metric in metrics)
    attrs = attributes(ds)
    signed = attrs.get("rank_by") == "signed"
    order = "what lowers the metric most when ablated first" if signed else "the largest first"
    if attrs["growth"] == "greedy":
        order = f"from the logits backwards, {order}"
    facts = [
        ("model", esc(model)),
        ("pairs", count(ds.sizes["pair"])),
        (level, count(_n_all(ds))),
        ("ranked by", f"{esc(ds.attrs['method'])}, {order}"),
        *((name.upper(), _area(ds, name, metrics[0])) for name in ("cpr", "cmd")),
    ]
    prompts = question.prompts(ds, metrics[0], choose_views(ds, ())[0])
    return (
        f'<header><h1>How much of what <span class="name">{esc(model)}</span> does is done by a '
        f'few of its {level}?</h1><p class="lead">{what}. A circuit is the foremost of them. The '
        "model reads the <b>clean</b> prompt with every other one ablated, so that what it passes "
        f"on {outside}, and {names} is read. <b>Faithfulness</b> is the share that is left: 1 "
        "where the circuit does as the whole model, 0 where it does as a model with everything "
        "ablated. <b>Completeness</b> asks the reverse: the circuit is ablated and all else kept, "
        "and 0 says that nothing of it happens elsewhere."
        f"{question.behind_means(attrs.get('means'))}{_undefined(attrs)}</p>"
        f"{fact_list(facts)}{prompts}</header>"
    )


def _undefined(told: Mapping[str, Any]) -> str:
    """Return HTML sentences with the reasons why a metric has no faithfulness."""
    reasons = told.get("undefined") or {}
    return "".join(f" There is no faithfulness: {esc(text)}." for text in reasons.values())


def _n_all(ds: xr.Dataset) -> int:
    return int((ds["rank"].values >= 0).sum())


def _area(ds: xr.Dataset, name: str, metric: str) -> str:
    value = attributes(ds)[name].get(metric)
    return number(math.nan if value is None else float(value))


def _curves(ds: xr.Dataset, n: int) -> str:
    metric, level = str(ds["metric"].values[n]), str(ds.attrs["level"])
    percents = 100 * ds["size"].values
    hover_texts = [
        f"{count(k)} of {count(_n_all(ds))} {level}<br>faithfulness {_share(f)}"
        f"<br>completeness {_share(c)}"
        for k, f, c in zip(
            ds["count"].values,
            ds["faithfulness"].values[n],
            ds["completeness"].values[n],
            strict=True,
        )
    ]
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": words,
            "x": percents,
            "y": ds[name].values[n],
            "text": hover_texts,
            "hovertemplate": "%{text}<extra></extra>",
            "line": {"color": colour, "dash": dash},
            "marker": {"symbol": symbol, "size": 8},
        }
        for name, words, colour, dash, symbol in (
            ("faithfulness", "the circuit alone (faithfulness)", SERIES[0], "solid", "circle"),
            ("completeness", "all but the circuit (completeness)", SERIES[1], "dot", "diamond"),
        )
    ]
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": f"share of the {level} in the circuit [%]"},
            "tickvals": [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100],
        },
        "yaxis": {"title": {"text": f"share of {plain(metric)}"}},
        "shapes": level_lines(0, 1),
        "height": 380,
    }
    drawn = figure(f"curve-{n}", traces, layout, caption="Point at a size for its numbers.")
    return f'<p>{_words(ds, metric)}</p><div class="grid">{drawn}</div>'


def _words(ds: xr.Dataset, metric: str) -> str:
    """Return HTML sentences on the smallest faithful circuit and on the curve's areas."""
    level = str(ds.attrs["level"])
    curves = ds.sel(metric=metric)
    faithful = np.flatnonzero(curves["faithfulness"].values >= FAITHFUL)
    if faithful.size:
        i = int(faithful[0])
        n, f = int(curves["count"].values[i]), float(curves["faithfulness"].values[i])
        first = (
            f"{count(n)} of {count(_n_all(ds))} {level} ({percent(n / _n_all(ds))}) keep "
            f"{number(f)} of the metric; of the sizes that were run it is the smallest with "
            f"{FAITHFUL} or more."
        )
    else:
        first = f"No circuit that was run keeps {FAITHFUL} of the metric."
    attrs = attributes(ds)
    if metric not in attrs["cpr"]:
        return f"{first} Where clean runs and fully ablated ones agree there is no such share."
    cpr, cmd = (number(float(attrs[name][metric])) for name in ("cpr", "cmd"))
    best = number(float(ds["size"].values[-1] - ds["size"].values[0]))
    return (
        f"{first} The area under the faithfulness curve (<b>CPR</b>) is {cpr}, where circuits that "
        f"do as the model at every size have {best}; more than that is possible, by circuits that "
        "leave out what works against the metric. The area between the curve and 1 "
        f"(<b>CMD</b>) is {cmd}; 0 is best. Both are taken over the share itself, as the MIB "
        "benchmark does, not over its logarithm as drawn: the large circuits count most. They can "
        "be compared with those of circuits of the same sizes alone."
    )


def _sizes(ds: xr.Dataset, n: int) -> str:
    level, drawn_size = str(ds.attrs["level"]), chosen_size(ds)
    has_connected = "n_connected" in ds
    columns = ["share", level, *(["on a whole way"] if has_connected else []), "metric, mean"]
    body = []
    for i, share in enumerate(ds["size"].values):
        scores = ds.isel(metric=n, size=i)
        cells = [percent(float(share)), count(int(scores["count"]))]
        if has_connected:
            cells.append(count(int(scores["n_connected"])))
        cells.append(number(float(scores["circuit_metric"].mean()), sign=True))
        cells += [_share(float(scores[name])) for name in ("faithfulness", "completeness")]
        kind = " class=chosen" if i == drawn_size else ""
        body.append(f"<tr{kind}>{numbers(*cells)}</tr>")
    ends = ", ".join(
        f"{words} {number(float(ds[name].values[n].mean()), sign=True)}"
        for name, words in (("base_metric", "clean"), ("empty_metric", "everything ablated"))
    )
    note = (
        " Edges on no whole way from the embeddings to the logits count for the size, and are "
        "ablated in the run."
        if has_connected
        else ""
    )
    return (
        f"<p>Means over {plural(ds.sizes['pair'], 'pair')}: {ends}.{note} The bold row is the "
        f"circuit below.</p>{table([*columns, 'faithfulness', 'completeness'], body)}"
    )


def _share(x: float) -> str:
    """Return `x` with three decimals, without an exponent for small numbers."""
    return number(x if not abs(x) < 5e-4 else 0.0)


def _edges(ds: xr.Dataset) -> str:
    """Return HTML with the graph of the circuit of size `chosen_size`."""
    size = chosen_size(ds)
    n = int(ds["count"].values[size])
    ranks, scores = ds["rank"].values, ds["score"].values
    ends_of_edges = np.argwhere((ranks >= 0) & (ranks < min(n, N_DRAWN)))
    if not len(ends_of_edges):
        return '<p class="empty">The circuit has no edge.</p>'
    drawn = []
    for sender, reader in sorted(ends_of_edges.tolist(), key=lambda ends: int(ranks[tuple(ends)])):
        u, v = str(ds["sender"].values[sender]), str(ds["reader"].values[reader])
        score, rank = float(scores[sender, reader]), int(ranks[sender, reader])
        title = f"{u} → {v}: number {rank + 1}, {_effect(score)}"
        drawn.append(Drawn(u, v, -score, title))
    group = heads_per_key(ds)
    shared = (
        f" Keys and values are read once for {group} heads: they have boxes of their own (kv)."
        if group > 1
        else ""
    )
    part = (
        f"Too many to draw: these are the first {count(len(drawn))} that joined"
        if n > len(drawn)
        else f"All {plural(len(drawn), 'edge')} are drawn"
    )
    svg = graph_of_edges(ds, drawn, "The circuit as a graph")
    return (
        f"<p>{_which(ds, size, plural(n, 'edge'))} {part}. {HOW_TO_READ} "
        '<b class="blue">Blue</b>: the metric falls without the edge. <b class="red">Red</b>: it '
        "rises. The wider, the more, by the score that ranked it. Letters below a head say what "
        f"reads: q, k or v.{shared} Point at a line for its numbers.</p>"
        f'<div class="scroll figure">{svg}</div>'
    )


def _which(ds: xr.Dataset, size: int, size_in_words: str) -> str:
    f = float(ds["faithfulness"].values[0][size])
    if f >= FAITHFUL:
        return (
            f"The smallest circuit that was run with a faithfulness of {FAITHFUL} or more has "
            f"{size_in_words} ({number(f)})."
        )
    return f"No circuit that was run is as faithful as {FAITHFUL}; the largest has {size_in_words}."


def _effect(score: float) -> str:
    return f"{number(score, sign=True)} when it is ablated"


def _nodes(ds: xr.Dataset) -> str:
    """Return HTML with a map, layer by head, of the circuit of size `chosen_size`."""
    size = chosen_size(ds)
    n, n_heads = int(ds["count"].values[size]), int(ds.attrs["n_heads"])
    inside = ds["member"].values[size].astype(bool)
    effect = np.where(inside, -ds["score"].values, np.nan).reshape(-1, n_heads + 1)
    hover_texts = [
        f"{plain(name)}: number {rank + 1}, {_effect(float(score))}"
        + ("" if inside_circuit else "<br>not in the circuit")
        for name, rank, score, inside_circuit in zip(
            ds["node"].values, ds["rank"].values, ds["score"].values, inside, strict=True
        )
    ]
    limit = float(np.nanmax(np.abs(effect))) if inside.any() else 1.0
    columns = [*(f"h{head}" for head in range(n_heads)), "MLP"]
    layers = [str(layer) for layer in range(len(effect))]
    trace = {
        "type": "heatmap",
        "x": columns,
        "y": layers,
        "z": effect,
        "text": np.array(hover_texts, dtype=object).reshape(effect.shape),
        "hovertemplate": "%{text}<extra></extra>",
        "hoverongaps": True,
        "colorscale": RED_BLUE,
        "zmin": -limit or -1.0,
        "zmax": limit or 1.0,
        "xgap": 2,
        "ygap": 2,
        "colorbar": {"title": {"text": "falls by"}, "thickness": 12},
    }
    layout = {
        "height": max(260, 90 + 18 * len(layers)),
        "xaxis": {"type": "category", "showgrid": False},
        "yaxis": {"type": "category", "title": {"text": "layer"}, "showgrid": False},
        "plot_bgcolor": "#ccd3da",
    }
    drawn = figure("nodes", [trace], layout, caption="Point at a node for its numbers.")
    return (
        f"<p>{_which(ds, size, plural(n, 'node'))} Each cell is a head or an MLP, the last layer "
        'on top; grey ones are outside and ablated. <b class="blue">Blue</b>: the metric falls '
        'when the node alone is ablated. <b class="red">Red</b>: it rises. The embeddings belong '
        f'to every circuit.</p><div class="grid">{drawn}</div>'
    )


def _first(ds: xr.Dataset) -> str:
    ranks, scores = ds["rank"].values, ds["score"].values
    edges = ds.attrs["level"] == "edges"
    names = ["sender", "reader"] if edges else ["node"]
    body = []
    for place in sorted(np.argwhere((ranks >= 0) & (ranks < N_LISTED)).tolist(),
                        key=lambda place: int(ranks[tuple(place)])):  # fmt: skip
        labels = "".join(
            f"<td>{esc(ds[dim].values[i])}</td>" for dim, i in zip(names, place, strict=True)
        )
        rank, score = int(ranks[tuple(place)]), float(scores[tuple(place)])
        assert math.isfinite(score)
        body.append(f"<tr>{numbers(rank + 1)}{labels}{numbers(number(score, sign=True))}</tr>")
    unit = str(ds["metric_unit"].values[0])
    columns = ("turn", *names, f"effect [{unit}]" if unit else "effect")
    return (
        f"<p>What ranked them: the effect on <code>{esc(ds['metric'].values[0])}</code> of "
        f"ablating it alone, by {esc(ds.attrs['method'])}, mean over the pairs. Below zero: the "
        f"metric falls without it.</p>{table(columns, body, names)}"
    )
