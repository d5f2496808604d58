"""The page of a study of heads: maps of every ablation, classes, and differences of ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.data.show import count, esc, number, plural
from patchsweep.report import question
from patchsweep.report.axes import strongest
from patchsweep.report.figure import SERIES, colour_of
from patchsweep.report.head_terms import ABLATIONS, CLASSES, RULES, class_name
from patchsweep.report.html import fact_list, numbers, table
from patchsweep.report.shell import page, section
from patchsweep.report.tables import provenance_table
from patchsweep.report.views import choose_views
from patchsweep.store.attributes import attributes

N_LISTED = 12  # most heads in the row of a class
N_HEADS = 30  # rows of the table of single heads
_ALL = "all"
# rows of the table that are not a class
_WHOLE = {_ALL: "all heads", "with_constant": "heads with an optimal constant"}
_REFERENCE = "resample"
_STYLE = """
.heads {
  display: grid; gap: 1.6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 16rem), 1fr));
}
.heads svg { display: block; width: 100%; height: auto; }
.heads text { font: 11px var(--sans); fill: var(--soft); }
.heads h3 { margin-bottom: .3rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
.scroll td { vertical-align: baseline; }
td.wide { white-space: normal !important; min-width: 16rem; }
"""
_COLOURS = (*SERIES, "#d6609a")  # one for each class
_SIZE = 15  # pixels, side of a cell
_LEFT, _TOP = 30, 6


@dataclass(frozen=True)
class Heads:
    """One metric of a study as plain arrays, averaged over pairs."""

    metric: str
    unit: str
    ablations: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    effect: NDArray[np.float64]  # [ablation, layer, head]; at the position where it is largest
    pos: NDArray[np.object_] | None  # [ablation, layer, head] name of that position, if any
    classes: dict[tuple[int, int], list[str]]  # (layer, head) -> its classes without `other`

    @property
    def limit(self) -> float:
        """The |effect| at which the colours of all maps end."""
        sizes = np.abs(self.effect[np.isfinite(self.effect)])
        return float(sizes.max()) if sizes.size and sizes.max() > 0 else 1.0


def build(ds: xr.Dataset) -> str:
    """Return the page of a study of heads as self-contained HTML."""
    model = question.model_name(ds)
    metrics = [str(m) for m in ds["metric"].values]
    parts = [_header(ds, model, metrics)]
    means = attributes(ds).get("means", {})
    for n, metric in enumerate(metrics):
        metric_heads = heads_of(ds, metric)
        suffix = f": <code>{esc(metric)}</code>" if len(metrics) > 1 else ""
        maps = section(f"maps-{n}", f"What each ablation does{suffix}", _maps(metric_heads, means))
        table = section(
            f"table-{n}", f"How much each disagrees with resample{suffix}", _table(ds, n)
        )
        scatter = section(f"points-{n}", f"Head by head{suffix}", _scatter(metric_heads))
        first = (
            section("classes", "What the heads are", _classes(ds, metric_heads)) if n == 0 else ""
        )
        parts += [maps, first, table, scatter]
    parts += [
        section("heads", "The heads that matter most", _single(ds, heads_of(ds, metrics[0]))),
        section("optimal", "Optimal constants", _optimal(ds)),
        section("provenance", "Where the numbers come from", provenance_table(ds)),
    ]
    return page(f"Heads of {model}", parts, style=_STYLE)


def heads_of(ds: xr.Dataset, metric: str) -> Heads:
    """Return the arrays of one metric that the page shows."""
    one = ds.sel(metric=metric)
    effect = (one["ablated"] - one["base_metric"]).mean("pair", skipna=False)
    effect = effect.transpose("ablation", "layer", "head", ...)
    values, pos = effect.values.astype(np.float64), None
    if values.ndim > 3:
        at, (values,) = strongest(values, [values])
        pos = ds["pos"].values.astype(str).astype(object)[at]
    layers, heads = (tuple(int(i) for i in ds[dim].values) for dim in ("layer", "head"))
    classes: dict[tuple[int, int], list[str]] = {}
    for name in ds["head_class"].values:
        member = ds["member"].sel(head_class=name).transpose("layer", "head").values
        for layer, head in np.argwhere(member.astype(bool)).tolist():
            if name != "other":
                classes.setdefault((layer, head), []).append(str(name))
    unit = str(one["metric_unit"].values)
    ablations = tuple(str(name) for name in ds["ablation"].values)
    return Heads(metric, unit, ablations, layers, heads, values, pos, classes)


def _header(ds: xr.Dataset, model: str, metrics: Sequence[str]) -> str:
    n_heads = ds.sizes["layer"] * ds.sizes["head"]
    facts = [
        ("model", esc(model)),
        ("pairs", count(ds.sizes["pair"])),
        ("heads", count(n_heads)),
        ("of some class", count(len(heads_of(ds, metrics[0]).classes))),
    ]
    names = " and ".join(f"<code>{esc(metric)}</code>" for metric in metrics)
    view = choose_views(ds, ())[0]
    reason = str(ds.attrs.get("task_classes", "measured"))
    notice = (
        ""
        if reason == "measured"
        else f'<p class="notice">Classes by what heads do on the task were not measured: '
        f"{esc(reason)}.</p>"
    )
    where = (
        "at every position at once"
        if ds.attrs.get("positions") == "all"
        else "at one position at a time"
    )
    return (
        f'<header><h1>What do the heads of <span class="name">{esc(model)}</span> do, and does it '
        "matter how they are taken away?</h1>"
        f'<p class="lead">The <b>base</b> run reads the clean prompt. One head at a time is '
        f"ablated: its output z is replaced {where}, in several ways, and {names} is read again. "
        "The change is the head's effect under that ablation. Heads are classed by where they "
        "look and what they write, and the ablations are compared class by class.</p>"
        f"{fact_list(facts)}{notice}{question.prompts(ds, metrics[0], view)}</header>"
    )


def _maps(found: Heads, means: Mapping[str, Any]) -> str:
    means_text = {name: question.behind_means(one) for name, one in means.items()}
    unit = f" {esc(found.unit)}" if found.unit else ""
    drawn = "".join(
        f"<figure><h3>{esc(name)}</h3>{_map(found, i)}"
        f"<figcaption>z becomes {esc(ABLATIONS.get(name, name))}.{means_text.get(name, '')}"
        "</figcaption></figure>"
        for i, name in enumerate(found.ablations)
    )
    where = "" if found.pos is None else " Each cell shows the position of its largest effect."
    return (
        "<p>Each cell is one head: layers upwards, heads across; its colour is the mean effect "
        f'over pairs. <b class="red">Red</b>: without the head <code>{esc(found.metric)}</code> '
        f'falls. <b class="blue">Blue</b>: it rises. Colours end at ±{number(found.limit)}{unit} '
        "in all maps, so they can be compared, and go with the square root. A head with an outline "
        f"is of some class; grey was not run.{where} Point at a cell for its numbers.</p>"
        f'<div class="heads">{drawn}</div>'
    )


def _map(found: Heads, ablation: int) -> str:
    n_layers, n_heads = len(found.layers), len(found.heads)
    # with few heads, cells are wider than high, so that the map is not narrow
    width = _SIZE * max(1.0, min(3.0, 14 / n_heads))
    cells = []
    for i, layer in enumerate(found.layers):
        y = _TOP + (n_layers - 1 - i) * _SIZE
        for j, head in enumerate(found.heads):
            value = found.effect[ablation, i, j]
            edge = ' stroke="#1c2126" stroke-width="1.2"' if (layer, head) in found.classes else ""
            cells.append(
                f'<rect x="{_LEFT + j * width + 0.5:.1f}" y="{y + 0.5:.1f}" '
                f'width="{width - 1:.1f}" height="{_SIZE - 1}" '
                f'fill="{colour_of(value, found.limit)}"{edge}>'
                f"<title>{esc(_tooltip(found, ablation, i, j))}</title></rect>"
            )
        if layer % 5 == 0 or n_layers < 10:
            cells.append(
                f'<text x="{_LEFT - 6}" y="{y + _SIZE - 3}" text-anchor="end">{layer}</text>'
            )
    bottom = _TOP + n_layers * _SIZE
    for j, head in enumerate(found.heads):
        if n_heads <= 12 or head % 4 == 0:
            x = _LEFT + (j + 0.5) * width
            cells.append(f'<text x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">{head}</text>')
    label = f"Effect of {found.ablations[ablation]} ablation of each head"
    return (
        f'<svg viewBox="0 0 {_LEFT + n_heads * width + 4:.0f} {bottom + 18}" role="img" '
        f'aria-label="{esc(label)}">{"".join(cells)}</svg>'
    )


def _tooltip(found: Heads, ablation: int, i: int, j: int) -> str:
    layer, head = found.layers[i], found.heads[j]
    lines = [f"a{layer}.h{head}, {found.ablations[ablation]}"]
    value = found.effect[ablation, i, j]
    if math.isfinite(value):
        lines.append(f"effect {number(value, sign=True)} {found.unit}".rstrip())
    else:
        lines.append("not run")
    if found.pos is not None:
        lines.append(f"at {found.pos[ablation, i, j]}")
    lines += [class_name(name) for name in found.classes.get((layer, head), [])]
    return "\n".join(lines)


def _classes(ds: xr.Dataset, found: Heads) -> str:
    thresholds = attributes(ds).get("thresholds", {})
    rows = []
    strength = found.effect[found.ablations.index(_REFERENCE)]
    for name in ds["head_class"].values:
        if name == "other":
            continue
        members = [at for at, names in found.classes.items() if name in names]
        members.sort(key=lambda at: -abs(strength[at]))
        listed = ", ".join(f"a{layer}.h{head}" for layer, head in members[:N_LISTED])
        if len(members) > N_LISTED:
            listed += f" and {len(members) - N_LISTED} more"
        rule = ", ".join(_rule(name, key, thresholds[key]) for key in RULES.get(name, ()))
        rows.append(
            f'<tr><th scope="row">{esc(class_name(name))}</th>{numbers(len(members))}'
            f'<td class="wide">{esc(listed) or "none"}</td>'
            f'<td class="wide">{esc(CLASSES.get(name, "heads of your own choice"))}</td>'
            f"<td>{esc(rule)}</td></tr>"
        )
    texts = ("class", "which", "what they do", "counts from")
    gap = ds.attrs.get("gap")
    shares = (
        ""
        if gap is None
        else f" Shares are of the gap between the clean and the corrupted logit difference, "
        f"{number(float(gap))} logits."
    )
    return (
        "<p>Induction, previous-token and duplicate-token heads are known by their attention on "
        "random words said twice (TransformerLens's <code>detect_head</code>, attention to the "
        "first position left out). The others are measured on this task, by patching single paths "
        f"with the corrupted prompt's values.{shares} A head may be of several classes; the ones "
        "that resample moves most come first.</p>"
        + table((texts[0], "heads", *texts[1:]), rows, texts)
    )


def _rule(head_class: str, threshold: str, value: float) -> str:
    against = head_class == "negative" and threshold == "direct"
    bound = f"≤ {number(-value)}" if against else f"≥ {number(value)}"
    return f"{threshold.replace('_', ' ')} {bound}"


def _table(ds: xr.Dataset, metric: int) -> str:
    one = ds.isel(metric=metric)
    names = [str(name) for name in ds["ablation"].values]
    others = [name for name in names if name != _REFERENCE]
    if not others:
        return ""
    unit = esc(str(one["metric_unit"].values))
    rows = []
    classes = [str(name) for name in ds["table_class"].values]
    for c in sorted(classes, key=lambda name: name not in _WHOLE):
        row = one.sel(table_class=c)
        n = row["n_heads"].sel(ablation=_REFERENCE).item()
        if not n:
            continue
        mean_effect = float(row["mean_effect"].sel(ablation=_REFERENCE))
        cells = [int(n), number(mean_effect, sign=True)]
        for name in others:
            cell = row.sel(ablation=name)
            n_other = int(cell["n_heads"])
            if not n_other:
                cells.append("&ndash;")
                continue
            rank = number(float(cell["rank_correlation"]))
            counts = f", {n_other} of {n}" if n_other < n else ""
            cells.append(
                f"{number(float(cell['disagreement']))} <small>rank {rank}{counts}</small>"
            )
        kind = ' class="total"' if c in _WHOLE else ""
        label = _WHOLE.get(c) or class_name(c)
        rows.append(f'<tr{kind}><th scope="row">{esc(label)}</th>{numbers(*cells)}</tr>')
    return (
        "<p>For each class the mean over its heads of |effect under it &minus; effect under "
        f"resample|{f', in {unit}' if unit else ''}, and the rank correlation of the two. "
        "Beside it the mean effect under resample, against which a difference is large or small. "
        "Where the rank correlation is near 0, the two ablations name other heads as important; "
        "it needs three heads. Optimal ablation is run for a few heads only: compare it with the "
        "others in the row of heads that have a constant.</p>"
        + table(("class", "heads", "resample effect", *others), rows, ("class",))
    )


def _scatter(found: Heads) -> str:
    reference = found.ablations.index(_REFERENCE)
    kinds = list(dict.fromkeys(name for names in found.classes.values() for name in names))
    colours = {name: _COLOURS[k % len(_COLOURS)] for k, name in enumerate(kinds)}
    key = "".join(
        f'<span><i class="dot" style="background:{colour}"></i>{esc(class_name(name))}</span>'
        for name, colour in colours.items()
    )
    drawn = []
    for i, name in enumerate(found.ablations):
        if i != reference:
            drawn.append(
                f"<figure><h3>{esc(name)}</h3>{_points(found, i, reference, colours)}</figure>"
            )
    if not drawn:
        return ""
    return (
        "<p>Each point is one head: its effect under resample across, under the other ablation "
        "upwards, both on one scale. On the diagonal the two agree; a point on the level line is a "
        "head that the other ablation says does nothing. A head of several classes has the colour "
        f'of the first.</p><p class="key">{key}</p><div class="heads">{"".join(drawn)}</div>'
    )


def _points(found: Heads, ablation: int, reference: int, colours: dict[str, str]) -> str:
    side, margin = 280, 24
    x, y = found.effect[reference], found.effect[ablation]
    # points without a class first, so that classed heads are drawn over them
    order = sorted(np.ndindex(x.shape), key=lambda at: (found.layers[at[0]], found.heads[at[1]]))
    order.sort(key=lambda at: (found.layers[at[0]], found.heads[at[1]]) in found.classes)

    def place(value: float) -> float:
        return margin + (value / found.limit + 1) / 2 * (side - 2 * margin)

    low, high, middle = margin, side - margin, side / 2
    shapes = [
        f'<path d="M{low} {middle}H{high}M{middle} {low}V{high}" stroke="#d9dee3"/>',
        f'<path d="M{low} {high}L{high} {low}" stroke="#7c8894" stroke-dasharray="3 3"/>',
        f'<text x="{high}" y="{middle + 13}" text-anchor="end">resample</text>',
        f'<text x="{middle + 4}" y="{low + 9}">{esc(found.ablations[ablation])}</text>',
    ]
    for i, j in order:
        if not math.isfinite(x[i, j] + y[i, j]):
            continue
        names = found.classes.get((found.layers[i], found.heads[j]), [])
        colour, radius = (colours[names[0]], 4) if names else ("#9aa4ad", 2.5)
        tooltip = (
            f"{_tooltip(found, ablation, i, j)}\nunder resample {number(float(x[i, j]), sign=True)}"
        )
        shapes.append(
            f'<circle cx="{place(x[i, j]):.1f}" cy="{side - place(y[i, j]):.1f}" r="{radius}" '
            f'fill="{colour}" fill-opacity=".8"><title>{esc(tooltip)}</title></circle>'
        )
    label = f"Effects under {found.ablations[ablation]} against effects under resample"
    return (
        f'<svg viewBox="0 0 {side} {side}" role="img" aria-label="{esc(label)}">'
        f"{''.join(shapes)}</svg>"
    )


def _single(ds: xr.Dataset, found: Heads) -> str:
    strength = np.abs(found.effect[found.ablations.index(_REFERENCE)])
    order = np.argsort(-np.nan_to_num(strength, nan=-1), axis=None, kind="stable")[:N_HEADS]
    measured = "direct" in ds
    names = [*found.ablations, *([_IO, _S2, _DIRECT, _HELD, _QUERIES] if measured else [])]
    columns: list[NDArray[np.float64]] = list(found.effect)
    if measured:
        looks = ds["attention"].mean("pair").transpose("place", "layer", "head").values
        columns += [looks[0], looks[1]]
        for name in ("direct", "direct_without_movers", "through_queries"):
            columns.append(ds[name].mean("pair", skipna=False).transpose("layer", "head").values)
    rows = []
    for i, j in zip(*np.unravel_index(order, strength.shape), strict=True):
        at = (found.layers[i], found.heads[j])
        classes = ", ".join(class_name(name) for name in found.classes.get(at, []))
        cells = (
            number(float(column[i, j]), sign=name not in (_IO, _S2))
            for name, column in zip(names, columns, strict=True)
        )
        rows.append(
            f'<tr><th scope="row">a{at[0]}.h{at[1]}</th>{numbers(*cells)}'
            f"<td>{esc(classes)}</td></tr>"
        )
    more = (
        " Then shares of the end's attention, what the head gives to the logit difference by its "
        "direct path to the logits, the same with the name movers held at their means, and what "
        "it gives through the name movers' queries (&ndash; where not measured)."
        if measured
        else ""
    )
    return (
        f"<p>The {plural(len(rows), 'head')} with the largest effect under resample: the effect "
        f"of every ablation on <code>{esc(found.metric)}</code>.{more}</p>"
        + table(("head", *names, "class"), rows, ("head", "class"))
    )


_IO, _S2, _DIRECT = "end→IO", "end→S2", "direct"
_HELD, _QUERIES = "direct, movers held", "via queries"


def _optimal(ds: xr.Dataset) -> str:
    if "optimal_loss" not in ds:
        return ""
    losses = ds["ablated"].sel(metric="kl_base").mean("pair", skipna=False)
    losses = losses.transpose("ablation", "layer", "head")
    trained = ds["optimal_loss"].transpose("training", "layer", "head").values
    has_constant = np.argwhere(np.isfinite(trained[1])).tolist()
    has_constant.sort(key=lambda at: -trained[(0, *at)])
    names = [str(name) for name in ds["ablation"].values]
    rows = []
    for i, j in has_constant:
        cells = numbers(*map(number, (*losses.values[:, i, j], *trained[:, i, j])))
        layer, head = int(ds["layer"].values[i]), int(ds["head"].values[j])
        rows.append(f'<tr><th scope="row">a{layer}.h{head}</th>{cells}</tr>')
    settings = attributes(ds)["optimal"]
    n_prompts = min(int(settings["prompts"]), ds.sizes["pair"])
    return (
        "<p>KL divergence of the ablated model's predictions from the original's on the clean "
        "prompts, in nats, mean over pairs. Optimal ablation puts in the constant for which it is "
        f"least: trained by {settings['steps']} steps of Adam on the first "
        f"{plural(n_prompts, 'prompt')}, from the mean. What remains is what no constant can "
        "that was met could replace.</p>"
        + table(("head", *names, "training: mean", "training: end"), rows, ("head",))
    )
