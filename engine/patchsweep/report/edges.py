"""The page of edges: a drawing of the top-k, estimates against exact effects, and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, plural, token_html, visible
from patchsweep.report import question
from patchsweep.report.graph import HOW_TO_READ, Drawn, graph_of_edges, heads_per_key
from patchsweep.report.html import fact_list, numbers, table
from patchsweep.report.shell import page, section
from patchsweep.report.tables import provenance_table
from patchsweep.report.views import choose_views
from patchsweep.results.stated import stated_errors
from patchsweep.results.statistics import pearson
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.store.attributes import attributes

N_DRAWN = 40
N_LISTED = 40  # rows of the table before the fold
N_ESTIMATED = 200  # most rows if no edge was run exactly
N_ROWS = 2000  # most rows of a page, if every edge was run

# kind of reader -> its name, and its colour in the scatter plot
_KINDS = {
    "q": ("queries", "#2166ac"),
    "k": ("keys", "#7b3294"),
    "v": ("values", "#1f7a4d"),
    "mlp": ("MLPs", "#b35c00"),
    "logits": ("the logits", "#1c2126"),
}
_STYLE = """
.graph, .points { display: block; margin: 0 auto; }
.points { max-width: 100%; height: auto; }
.scroll.figure { border: 1px solid var(--line); border-radius: 4px; padding: .5rem; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem 2.5rem; align-items: flex-start; }
.side > * { min-width: 0; max-width: 100%; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
td .token { white-space: nowrap; }
td.flip { color: #a8152a; font-weight: 600; }
"""


@dataclass(frozen=True)
class Row:
    """One edge and metric, with effects averaged over the pairs that have the edge."""

    sender: str
    reader: str
    pos: int | None  # position of the reader; None: all positions together
    token: str  # base run's token at `pos`; "" where pairs differ
    estimate: float  # of the effect, in the metric's unit; NaN: not estimated
    exact: float  # exact effect, in the metric's unit; NaN: not run

    @property
    def value(self) -> float:
        """The exact effect, or the estimate if the edge was not run."""
        return self.exact if math.isfinite(self.exact) else self.estimate

    @property
    def kind(self) -> str:
        """Kind of the reader: q, k, v, mlp or logits."""
        if self.reader == "logits":
            return "logits"
        return "mlp" if self.reader.startswith("m") else self.reader[-1]


def rows_of(ds: xr.Dataset, metric: str, most: int | None = None) -> list[Row]:
    """Return the edges run exactly, or else the top-k estimates; largest first, at most `most`."""
    one = ds.sel(metric=metric)
    name = next((n for n in ("edge_estimate", "edge_eap", "edge_eap_ig") if n in one), None)
    listed = "edge_sender" in one.coords
    if "edge" in one:
        exact = _over_pairs(one["edge"] - one["base_metric"])
        estimate = exact * np.nan if name is None else _over_pairs(one[name])
    else:
        estimate = _over_pairs(one[name])
        exact = estimate * np.nan
        most = min(most or N_ESTIMATED, N_ESTIMATED)
    ends = [one[f"edge_{end}" if listed else end].values for end in ("sender", "reader")]
    x, y = exact.values.ravel(), estimate.values.ravel()
    size = np.abs(np.where(np.isfinite(x), x, y))
    order = np.argsort(-np.nan_to_num(size, nan=-1.0), kind="stable")
    shown = order[np.isfinite(size[order])][:most]
    tokens = _tokens(one)
    rows = []
    for i in shown:
        at = dict(zip(exact.dims, np.unravel_index(i, exact.shape), strict=True))
        sender, reader = (
            end[at["chosen" if listed else name]]
            for name, end in zip(("sender", "reader"), ends, strict=True)
        )
        pos = int(at["pos"]) if "pos" in at else None
        if "edge_pos" in one.coords:
            pos = int(one["edge_pos"].values[at["chosen"]])
        token = "" if pos is None else tokens[pos]
        rows.append(Row(str(sender), str(reader), pos, token, float(y[i]), float(x[i])))
    return rows


def correlation(rows: Sequence[Row]) -> float:
    """Return the Pearson correlation of estimates and exact effects; NaN if one is constant."""
    compared = [(r.estimate, r.exact) for r in rows if math.isfinite(r.estimate + r.exact)]
    return pearson(*np.array(compared).reshape(-1, 2).T)


def build(ds: xr.Dataset) -> str:
    """Return the page of a store of edges as self-contained HTML."""
    metrics = [str(m) for m in ds["metric"].values]
    model = question.model_name(ds)
    parts = [_header(ds, model, metrics)]
    for n, metric in enumerate(metrics):
        unit = str(ds["metric_unit"].values[n])
        rows = rows_of(ds, metric, N_ROWS)
        suffix = f": <code>{esc(metric)}</code>" if len(metrics) > 1 else ""
        parts += [
            section(f"graph-{n}", f"The foremost edges{suffix}", _graph(ds, rows, unit)),
            section(f"agreement-{n}", f"How far the estimates go{suffix}", _agreement(rows, unit)),
            section(f"table-{n}", f"The numbers{suffix}", _listed(rows, metric, unit)),
        ]
    parts.append(section("provenance", "Where the numbers come from", provenance_table(ds)))
    return page(f"Edges of {model}", parts, style=_STYLE)


def _over_pairs(values: xr.DataArray) -> xr.DataArray:
    return values.astype(np.float64).mean("pair", skipna=True)


def _tokens(ds: xr.Dataset) -> list[str]:
    """Return the base run's token per position; "" where the pairs differ."""
    columns = ds["base_token"].values.T
    return [str(column[0]) if len(set(column)) == 1 else "" for column in columns]


def _header(ds: xr.Dataset, model: str, metrics: Sequence[str]) -> str:
    noising = ds.attrs.get("direction") == "noising"
    base = "clean" if noising else "corrupted"
    resampled = ds.attrs.get("intervention") == "resample"
    change = (
        "what it writes in the <b>source</b> run, on the other prompt of the pair"
        if resampled
        else f"another value ({esc(ds.attrs.get('intervention'))})"
    )
    positions = attributes(ds).get("positions")
    where = " An edge here is read at one position alone." if positions is True else ""
    names = " and ".join(f"<code>{esc(metric)}</code>" for metric in metrics)
    view = choose_views(ds, ())[0]
    prompts = "".join(question.prompts(ds, metric, view) for metric in metrics[:1])
    rows = rows_of(ds, metrics[0], N_ROWS)
    facts = [("model", esc(model)), ("pairs", count(ds.sizes["pair"]))]
    name = next((n for n in ("edge_eap", "edge_eap_ig") if n in ds), None)
    if name is not None:
        scored = int(np.isfinite(ds[name].values[0]).any(axis=0).sum())
        facts.append(("edges scored", count(scored)))
    if "edge" in ds:
        found = np.isfinite(ds["edge"].values[0]).any(axis=0)
        dead = sum(attributes(ds).get("dead", {}).values())
        how = "run with a tolerance" if "edge_linear" in ds else "run exactly"
        facts.append((how, count(int(found.sum()) - dead)))
        if dead:
            facts.append(("proved dead", count(dead)))
        if math.isfinite(correlation(rows)):
            facts.append(("correlation", number(correlation(rows))))
    words = (*tolerance_notes(ds), *(x.words for x in stated_errors(ds)))
    stated = "".join(f'<p class="notice">{esc(text)}.</p>' for text in words)
    return (
        f'<header><h1>Which parts of <span class="name">{esc(model)}</span> listen to which?</h1>'
        f'<p class="lead">An edge leads from a part that writes into the residual stream (a '
        "<b>sender</b>: the embeddings, a head, an MLP) to a part that reads it (a <b>reader</b>: "
        "the queries, keys or values of a head, an MLP, the logits). The <b>base</b> run reads the "
        f"{base} prompt. One reader at a time is shown {change} for one sender, all else stays, "
        f"and {names} is read again: the change is the edge's effect.{where}"
        f"{question.behind_means(attributes(ds).get('means'))}</p>"
        f"{fact_list(facts)}{stated}{prompts}</header>"
    )


def _graph(ds: xr.Dataset, rows: Sequence[Row], unit: str) -> str:
    if not rows:
        return ""
    top = rows[:N_DRAWN]
    drawn = [Drawn(row.sender, row.reader, row.value, _title(row, unit)) for row in top]
    group = heads_per_key(ds)
    over = "" if ds.sizes["pair"] == 1 else f", mean over {plural(ds.sizes['pair'], 'pair')}"
    shared = (
        f" Keys and values are read once for {group} heads: they have boxes of their own (kv), "
        "which dashed lines join to the heads."
        if group > 1
        else ""
    )
    svg = graph_of_edges(ds, drawn, f"The {len(drawn)} largest edges as a graph")
    return (
        f"<p>The {plural(len(drawn), 'edge')} with the largest "
        f"{'exact effects' if math.isfinite(top[0].exact) else 'estimates'}{over}. "
        f'{HOW_TO_READ} <b class="blue">Blue</b>: the edge raises the metric. '
        '<b class="red">Red</b>: it lowers it. The wider, the larger. Letters below a head say '
        f"what reads: q, k or v.{shared} Point at a line for its numbers.</p>"
        f'<div class="scroll figure">{svg}</div>'
    )


def _title(row: Row, unit: str) -> str:
    where = "" if row.pos is None else f" at {_where(row)}"
    numbers = [
        f"{name} {number(value, sign=True)}"
        for name, value in (("exact", row.exact), ("estimate", row.estimate))
        if math.isfinite(value)
    ]
    return f"{row.sender} → {row.reader}{where}: {', '.join(numbers)} {unit}".rstrip()


def _where(row: Row) -> str:
    return f"{row.pos} {visible(row.token)}".rstrip()


def _agreement(rows: Sequence[Row], unit: str) -> str:
    """Return HTML of the scatter plot and a table by reader kind; "" without edges to compare."""
    compared = [row for row in rows if math.isfinite(row.estimate + row.exact)]
    if not compared:
        return ""
    body = []
    for kind, (name, colour) in _KINDS.items():
        group = [row for row in compared if row.kind == kind]
        if not group:
            continue
        same = sum(row.estimate * row.exact > 0 for row in group)
        ratios = [row.estimate / row.exact for row in group if row.exact]
        ratio = float(np.median(ratios or [math.nan]))
        cells = count(len(group)), number(correlation(group)), number(ratio)
        body.append(
            f'<tr><td><span class="dot" style="background:{colour}"></span>{name}</td>'
            f"{numbers(*cells, count(len(group) - same))}</tr>"
        )
    columns = ("read by", "edges", "correlation", "estimate / exact", "sign wrong")
    return (
        "<p>Each point is one edge: its exact effect across, its estimate up. On the diagonal the "
        "estimate is right. Both axes are stretched near zero (square roots), so that small "
        "effects can be told apart. Estimates are slopes at the base run, and edges were chosen "
        "by them: what they put too low is missing here. In the table the ratio is the median.</p>"
        f'<div class="side"><div>{_scatter(compared, unit)}</div>'
        f"{table(columns, body, columns[:1])}</div>"
    )


def _scatter(rows: Sequence[Row], unit: str) -> str:
    """Return an SVG of estimates against exact effects, both as signed square roots."""
    values = [v for row in rows for v in (row.exact, row.estimate)]
    ends = _root(min(0.0, *values)), _root(max(0.0, *values))
    room = 0.05 * ((ends[1] - ends[0]) or 1.0)
    low, high = ends[0] - room, ends[1] + room
    size, left, below = 400, 56, 44

    def at(value: float) -> float:
        return size * (_root(value) - low) / (high - low)

    parts = []
    for tick in _ticks(min(0.0, *values), max(0.0, *values)):
        x, y, axis = left + at(tick), 8 + size - at(tick), "#7c8894" if tick == 0 else "#e6eaee"
        parts.append(
            f'<path d="M{x:.1f} 8V{8 + size}M{left} {y:.1f}H{left + size}" stroke="{axis}"/>'
            f'<text x="{x:.1f}" y="{size + 24}" text-anchor="middle">{tick:g}</text>'
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    parts.append(
        f'<path d="M{left} {8 + size}L{left + size} 8" stroke="#7c8894" stroke-dasharray="4 4"/>'
    )
    for row in reversed(rows):  # the largest on top
        parts.append(
            f'<circle cx="{left + at(row.exact):.1f}" cy="{8 + size - at(row.estimate):.1f}" '
            f'r="4" fill="{_KINDS[row.kind][1]}" fill-opacity=".7" stroke="#fff" '
            f'stroke-width=".6"><title>{esc(_title(row, unit))}</title></circle>'
        )
    inside = f" [{esc(unit)}]" if unit else ""
    parts.append(
        f'<text x="{left + size / 2}" y="{size + below}" text-anchor="middle">exact{inside}</text>'
        f'<text transform="translate(14 {8 + size / 2}) rotate(-90)" text-anchor="middle">'
        f"estimate{inside}</text>"
    )
    width, height = left + size + 10, size + below + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="points" role="img" '
        f'aria-label="Estimates against exact effects" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-size="12" fill="#545d66">{"".join(parts)}</svg>'
    )


def _root(value: float) -> float:
    return math.copysign(math.sqrt(abs(value)), value)


def _ticks(low: float, high: float) -> list[float]:
    """Return the ticks from `low` to `high`: 0 and ±1 and ±3 times powers of ten."""
    largest = max(-low, high)
    if largest == 0:
        return [0.0]
    top = math.floor(math.log10(largest))
    sizes = [m * 10.0**k for k in (top - 1, top) for m in (1, 3) if m * 10.0**k >= largest / 40]
    return [0.0, *(sign * x for x in sizes for sign in (-1, 1) if low <= sign * x <= high)]


def _listed(rows: Sequence[Row], metric: str, unit: str) -> str:
    if not rows:
        return '<p class="empty">The store holds no edge.</p>'
    positions = any(row.pos is not None for row in rows)
    texts = ("sender", "reader", *(["position"] if positions else []))
    columns = (*texts, "estimate", "exact", "agreement")
    body = [_tr(row, positions) for row in rows]
    rest = body[N_LISTED:]
    fold = (
        f"<details><summary>{plural(len(rest), 'more edge')}</summary>"
        f"{table(columns, rest, texts)}</details>"
        if rest
        else ""
    )
    inside = f", in {esc(unit)}" if unit else ""
    return (
        f"<p>Effects on <code>{esc(metric)}</code>{inside}, the largest first. Agreement is the "
        "estimate as a share of the exact effect: 1 is right, below 0 has the wrong sign.</p>"
        f"{table(columns, body[:N_LISTED], texts)}{fold}"
    )


def _tr(row: Row, positions: bool) -> str:
    where = f"<td>{row.pos} {token_html(row.token) if row.token else ''}</td>" if positions else ""
    ratio = row.estimate / row.exact if row.exact else math.nan
    return (
        f'<tr><th scope="row">{esc(row.sender)}</th><td><code>{esc(row.reader)}</code></td>{where}'
        + numbers(number(row.estimate, sign=True))
        + numbers(number(row.exact, sign=True), kind="up" if row.value > 0 else "down")
        + numbers(number(ratio), kind="flip" if ratio < 0 else "")
        + "</tr>"
    )
