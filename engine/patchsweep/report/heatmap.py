"""The data of one site's map: cells, colour range and caption for each metric and view."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, percent, plural, token_html
from patchsweep.report.axes import DIM_WORDS, Axes, folded, lay_out, strongest
from patchsweep.report.html import pack
from patchsweep.report.views import View
from patchsweep.results import accessor as summary

USUAL = 0.99  # beyond the natural scale, colours end at twice this quantile of the sizes shown
NATURAL = 1.5  # recovered fractions up to this size never count as outliers


_NAMED = 4  # most cells, or places, that a caption lists one by one


@dataclass(frozen=True)
class Frame:
    """The map of one site for one metric and one view."""

    caption: str  # HTML
    cells: dict[str, object]  # for the page's script: packed numbers, "quantity", "limit"


@dataclass(frozen=True)
class Figure:
    """One site's map in the page."""

    site: str  # variable of the Dataset
    title: str
    note: str  # text on what the layout hides; may be empty
    payload: dict[str, object]  # for the page's script, without the frames
    frames: dict[str, Frame]  # by metric and view, see `frame_key`


def frame_key(metric: str, view: View) -> str:
    """Return the name of a metric and a view in the page."""
    return f"{metric}|{view.key}"


def draw_site(ds: xr.Dataset, site: str, views: tuple[View, ...]) -> Figure:
    """Return the map of `site` for every metric of `ds` and every view."""
    small = [n for n, a in ds.data_vars.items() if set(a.dims) <= {"metric", "pair"}]
    ds = ds[list(dict.fromkeys([*small, site]))].load()
    values, flags = summary.value(ds, site), summary.small_gaps(ds)
    axes = lay_out(values)
    means = (
        values.mean("pair"),
        summary.effect_mean(ds, site),
        summary.recovered_mean(ds, site),
    )
    frames = {}
    unaligned = "align" in ds.attrs and not summary.missing(ds, site)[0]
    grey = "no position of the source prompt corresponds" if unaligned else "not run"
    for metric in (str(m) for m in ds["metric"].values):
        base, source = (ds[n].sel(metric=metric) for n in ("base_metric", "source_metric"))
        gaps = source - base
        # without a source run, the base metric itself is the natural size of an effect
        natural = float(abs(gaps if gaps.notnull().any() else base).median())
        for view in views:
            if view.pair is None:
                grids = [axes.grid(a.sel(metric=metric)) for a in means]
                ends = float(base.mean()), float(source.mean())
                weak = not abs(float(gaps.mean())) >= summary.SMALL_GAP * float(abs(gaps).median())
                weak = weak or float(gaps.mean()) == 0
            else:
                value = axes.grid(values.sel(metric=metric, pair=view.pair))
                ends = float(base.sel(pair=view.pair)), float(source.sel(pair=view.pair))
                gap = ends[1] - ends[0]
                grids = [value, value - ends[0], (value - ends[0]) / (gap or math.nan)]
                weak = bool(flags.sel(metric=metric, pair=view.pair))
            frame = _frame(metric, view, axes, grids, ends, weak, natural, grey)
            frames[frame_key(metric, view)] = frame
    title, note = _words(ds, site, axes)
    payload: dict[str, object] = {
        "site": site,
        "rows": axes.rows,
        "columns": axes.columns,
        "hidden": axes.hidden,
        "full": axes.full,
        "labels": axes.labels,
    }
    return Figure(site, title, note, payload, frames)


def colour_limit(shown: np.ndarray, natural: float = NATURAL) -> tuple[float, int]:
    """Return (colour limit, number of cells beyond), so that one huge cell does not fade the rest.

    The limit is the largest |cell| up to `natural`; beyond that it is at most twice the `USUAL`
    quantile of the nonzero sizes. It is rounded up to two digits; 1 if no cell is nonzero.
    """
    size = np.abs(shown[np.isfinite(shown) & (shown != 0)])
    if not size.size:
        return 1.0, 0
    usual = float(np.quantile(size, USUAL, method="lower"))
    limit = min(float(size.max()), max(natural, 2 * usual))
    step = 10.0 ** (math.floor(math.log10(limit)) - 1)
    limit = math.ceil(round(limit / step, 6)) * step
    return limit, int((size > limit).sum())


def _frame(
    metric: str,
    view: View,
    axes: Axes,
    grids: list[np.ndarray],
    ends: tuple[float, float],
    weak: bool,
    natural: float,
    grey: str,
) -> Frame:
    """Return the frame of one metric and view.

    `grids` are value, effect and recovered, each [row, column, hidden]; `ends` are the base and
    source metric. `weak`: the gap is too small for fractions, so the map shows effects, whose
    usual size is `natural`. `grey` says why a cell has no value.
    """
    at, flat = strongest(grids[1], grids)
    quantity = "effect" if weak else "recovered"
    if axes.rows and axes.columns:
        limit, n_beyond = colour_limit(flat[1 if weak else 2], natural if weak else NATURAL)
    else:
        limit, n_beyond = colour_limit(flat[1 if weak else 2], math.inf)  # bars show any size
    names = ("value", "effect", "recovered")
    # a single pair's effect and fraction follow from its value and the two ends
    needed = names if view.pair is None else names[:1]
    source = grids if axes.full else [g[..., None] for g in flat]
    cells: dict[str, object] = {
        "quantity": quantity,
        "limit": limit,
        "fold": folded(flat[1], view.first, view.n_pos) if axes.columns == "pos" else 0,
        "base": ends[0] if math.isfinite(ends[0]) else None,
        "source": ends[1] if math.isfinite(ends[1]) else None,
        **{
            name: pack(grid, "<f4")
            for name, grid in zip(names, source, strict=True)
            if name in needed
        },
    }
    if axes.hidden:
        cells["at"] = pack(at, "<u2")
    value, effect, fraction = flat
    caption_html = _seen(axes, view, value, effect, fraction, at) + _reading(
        quantity,
        metric,
        limit,
        n_beyond,
        _unrun(value, axes, view),
        grey,
        gap=math.isfinite(ends[1] - ends[0]),
    )
    return Frame(caption_html, cells)


def _unrun(value: np.ndarray, axes: Axes, view: View) -> float:
    """Return the share of drawn cells without a value, apart from padding positions."""
    drawn = value[:, view.first : view.n_pos] if axes.columns == "pos" else value
    return float(np.isnan(drawn).mean()) if drawn.size else 0.0


def _words(ds: xr.Dataset, site: str, axes: Axes) -> tuple[str, str]:
    """Return (title, note) of the map."""
    values = ds[site]
    estimated = summary.estimates(ds).get(site)
    plain, method = estimated or (site, "")
    title = summary.SITE_WORDS.get(plain, plain)
    notes = []
    if estimated:
        notes.append(f"Estimated by {esc(method)}, not run.")
    if axes.hidden == "pos":
        text = "Each cell shows the position at which its effect is largest"
        ending = ", or the chosen one, on the same colours." if axes.full else "."
        notes.append(text + ending)
    elif axes.hidden:
        notes.append(
            f"Each cell shows the one {esc(axes.hidden)}, of "
            f"{count(ds.sizes[axes.hidden])}, whose effect is largest."
        )
    if "pos" in values.coords and values["pos"].dtype.kind == "i" and (values["pos"] < 0).any():
        notes.append("Positions count from the end of each prompt.")
    if axes.columns != "pos" and axes.hidden != "pos":
        notes.append("Each patch covers all positions at once.")
    return title, " ".join(notes)


def _seen(
    axes: Axes,
    view: View,
    value: np.ndarray,
    effect: np.ndarray,
    fraction: np.ndarray,
    at: np.ndarray,
) -> str:
    """Return HTML on the strongest cell and the places of cells at least half as strong.

    `value`, `effect`, `fraction` and `at` (index along the hidden axis) are [row, column].
    """
    size = np.nan_to_num(np.abs(effect), nan=0.0)
    if np.isnan(effect).all():
        return "<strong>Nothing of this site has run yet.</strong>"
    if not size.max() > 0:
        return "<strong>No patch of this site changes the metric.</strong>"
    order = np.argsort(-size, axis=None, kind="stable")
    strong = order[size.ravel()[order] >= size.max() / 2]
    top, *others = (divmod(int(cell), size.shape[1]) for cell in strong)
    # value - effect is the base metric over the pairs in which this cell ran
    start, end = float(value[top] - effect[top]), float(value[top])
    part = f", {number(float(fraction[top]))} of the gap" if np.isfinite(fraction[top]) else ""
    text = (
        f"Strongest: {_cell(axes, view, top, at)}, where the patch moves the metric from "
        f"{number(start)} to {number(end)}{part}"
    )
    if not others:
        text += "; no other cell is half as strong"
    elif len(others) <= _NAMED:
        listed = ", ".join(_cell(axes, view, cell, at) for cell in others)
        text += f"; at least half as strong: {listed}"
    else:
        text += f"; {count(len(others))} more cells are at least half as strong"
        text += _where(axes, view, others, at)
    return f"<strong>{text}.</strong>"


def _reading(
    quantity: str, metric: str, limit: float, n_beyond: int, unrun: float, grey: str, *, gap: bool
) -> str:
    """Return HTML on the meaning of the colours; `unrun` is the share of `grey` cells.

    `gap`: there is a source run, so the map shows effects because source is too close to base.
    """
    what = "recovered fraction" if quantity == "recovered" else f"effect on {esc(metric)}"
    text = f" Colours: {what}, from {number(-limit)} to {number(limit, sign=True)}"
    if n_beyond:
        text += f"; {plural(n_beyond, 'cell')} beyond that in the end colour"
    text += "."
    if quantity == "effect" and gap:
        text += " Base and source differ too little here for a recovered fraction to mean much."
    if unrun:
        text += f" Grey: {grey} ({percent(unrun)})."
    return text


def _where(axes: Axes, view: View, cells: Sequence[tuple[int, int]], at: np.ndarray) -> str:
    """Return ", all at positions 11 ␣Mary and 16 ␣to", or "" if the cells have many places."""
    dim = "pos" if "pos" in (axes.columns, axes.hidden) else axes.columns
    if dim is None:
        return ""
    indices = sorted({c[1] if dim == axes.columns else int(at[c]) for c in cells})
    if len(indices) > _NAMED:
        return ""
    places = [_place(axes, view, dim, i) for i in indices]
    if len(places) == 1:
        return f", all at {DIM_WORDS[dim]} {places[0]}"
    return f", all at {DIM_WORDS[dim]}s {', '.join(places[:-1])} and {places[-1]}"


def _cell(axes: Axes, view: View, cell: tuple[int, int], at: np.ndarray) -> str:
    """Return text such as "a28.h8 at position 16 ␣to", or "layer 3 at position 11"."""
    index = {axes.rows: cell[0], axes.columns: cell[1], axes.hidden: int(at[cell])}
    parts = [
        f"{DIM_WORDS[d]} {_place(axes, view, d, index[d])}"
        for d in ("layer", *summary.UNIT_DIMS)
        if d in index
    ]
    unit = next((d for d in ("head", "kv_head") if d in index), None)
    if unit is not None and "layer" in index:  # the names of graphs and edges
        layer, head = (_place(axes, view, d, index[d]) for d in ("layer", unit))
        parts = [f"a{layer}.{'h' if unit == 'head' else 'kv'}{head}"]
    if "pos" in index:
        parts += ["at"] * bool(parts) + [f"position {_place(axes, view, 'pos', index['pos'])}"]
    return " ".join(parts) or "the one patch"


def _place(axes: Axes, view: View, dim: str, index: int) -> str:
    """Return "28" for a layer or head, "16 ␣to" for a position."""
    label = esc(axes.labels[dim][index])
    if dim != "pos" or not view.base_tokens[index]:
        return label
    return f"{label} {token_html(view.base_tokens[index])}"
