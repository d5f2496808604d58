"""One site as numbers to draw: cells, colour range, caption, for each metric and view."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep import summary
from patchsweep.report.html import count, esc, number, percent, plural, token_html
from patchsweep.report.views import View

MAX_UNITS = 128
"""Above this many heads or neurons the map shows positions instead of them."""

MAX_CELLS = 150_000
"""Above this many cells per view only the strongest along the hidden axis is in the page."""

USUAL = 0.99
"""The colour range ends at twice this quantile of the sizes shown, or at the largest."""

_NAMED = 4  # cells that a caption lists one by one


@dataclass(frozen=True)
class Axes:
    """How the dims of a site are laid out on paper: rows by columns, and one that is hidden."""

    rows: str | None  # "layer", or None for the embedding
    columns: str | None  # "pos", a unit such as "head", or None
    hidden: str | None  # reduced to its largest |effect|, or chosen in the page
    n_cells: int  # of one metric and view, hidden axis included

    @property
    def full(self) -> bool:
        """Whether the page holds the cells along the hidden axis too."""
        return self.hidden == "pos" and self.n_cells <= MAX_CELLS


@dataclass(frozen=True)
class Frame:
    """One site through one metric and one view."""

    metric: str
    view: View
    quantity: str  # what the colours show: "recovered", or "effect" where the gap is too small
    limit: float  # colours run from -limit to +limit
    caption: str  # HTML
    cells: dict[str, object]  # the numbers, as the page's script reads them


@dataclass(frozen=True)
class Figure:
    """One site's map in the page."""

    site: str  # variable of the Dataset
    title: str
    note: str  # what the layout hides, in words; may be empty
    payload: dict[str, object]  # for the page's script, frames apart
    frames: tuple[Frame, ...]


def draw_site(ds: xr.Dataset, site: str, views: tuple[View, ...]) -> Figure:
    """The map of `site`, for every metric of `ds` and every view."""
    small = [n for n, a in ds.data_vars.items() if set(a.dims) <= {"metric", "pair"}]
    ds = ds[list(dict.fromkeys([*small, site]))].load()
    values, flags = summary.value(ds, site), summary.small_gaps(ds)
    axes = _axes(values)
    labels = {d: values[d].values.tolist() for d in (axes.rows, axes.columns, axes.hidden) if d}
    means = (
        values.mean("pair"),
        summary.effect_mean(ds, site),
        summary.recovered_mean(ds, site),
    )
    frames = []
    for metric in (str(m) for m in ds["metric"].values):
        base, source = (ds[n].sel(metric=metric) for n in ("base_metric", "source_metric"))
        gaps = source - base
        for view in views:
            if view.pair is None:
                grids = [_grid(a.sel(metric=metric), axes) for a in means]
                ends = float(base.mean()), float(source.mean())
                weak = not abs(float(gaps.mean())) >= summary.SMALL_GAP * float(abs(gaps).median())
                weak = weak or float(gaps.mean()) == 0
            else:
                value = _grid(values.sel(metric=metric, pair=view.pair), axes)
                ends = float(base.sel(pair=view.pair)), float(source.sel(pair=view.pair))
                whole = ends[1] - ends[0]
                grids = [value, value - ends[0], (value - ends[0]) / (whole or math.nan)]
                weak = bool(flags.sel(metric=metric, pair=view.pair))
            frames.append(_frame(metric, view, axes, labels, grids, ends, weak))
    title, note = _words(ds, site, axes)
    payload: dict[str, object] = {
        "site": site,
        "rows": axes.rows,
        "columns": axes.columns,
        "hidden": axes.hidden,
        "full": axes.full,
        "labels": labels,
    }
    return Figure(site, title, note, payload, tuple(frames))


def colour_limit(shown: np.ndarray) -> tuple[float, int]:
    """(limit, number of cells beyond it), so that one huge cell does not bleach the others.

    The limit is the largest size, or twice the `USUAL` quantile of the sizes that are not zero
    where that is less, rounded up to two digits; 1 when there is nothing to show.
    """
    size = np.abs(shown[np.isfinite(shown) & (shown != 0)])
    if not size.size:
        return 1.0, 0
    usual = float(np.quantile(size, USUAL, method="lower"))
    limit = min(float(size.max()), 2 * usual)
    step = 10.0 ** (math.floor(math.log10(limit)) - 1)
    limit = math.ceil(round(limit / step, 6)) * step
    return limit, int((size > limit).sum())


def _axes(values: xr.DataArray) -> Axes:
    unit = summary.unit_dim(values)
    rows = "layer" if "layer" in values.dims else None
    has_pos = "pos" in values.dims
    n_cells = math.prod(n for d, n in values.sizes.items() if d not in ("metric", "pair"))
    if unit and has_pos:
        few = values.sizes[unit] <= MAX_UNITS
        columns, hidden = (unit, "pos") if few else ("pos", unit)
        return Axes(rows, columns, hidden, n_cells)
    return Axes(rows, unit or ("pos" if has_pos else None), None, n_cells)


def _grid(array: xr.DataArray, axes: Axes) -> np.ndarray:
    """[row, column, hidden] in float32, an absent axis having length 1."""
    dims = [d for d in (axes.rows, axes.columns, axes.hidden) if d]
    shape = [array.sizes[d] if d else 1 for d in (axes.rows, axes.columns, axes.hidden)]
    return array.transpose(*dims).values.astype(np.float32).reshape(shape)


def _frame(
    metric: str,
    view: View,
    axes: Axes,
    labels: dict[str, list[int]],
    grids: list[np.ndarray],
    ends: tuple[float, float],
    weak: bool,
) -> Frame:
    """`grids`: value, effect, recovered, each [row, column, hidden]; `ends`: base, source."""
    strength = np.nan_to_num(np.abs(grids[1]), nan=-1.0)
    at = strength.argmax(axis=2)[..., None]
    flat = [np.take_along_axis(g, at, axis=2)[..., 0] for g in grids]
    quantity = "effect" if weak else "recovered"
    limit, n_beyond = colour_limit(flat[1 if weak else 2])
    names = ("value", "effect", "recovered")
    # a single pair's effect and fraction follow from its value and the two ends
    kept = names if view.pair is None else names[:1]
    source = grids if axes.full else [g[..., None] for g in flat]
    cells: dict[str, object] = {
        "quantity": quantity,
        "limit": limit,
        "base": ends[0] if math.isfinite(ends[0]) else None,
        "source": ends[1] if math.isfinite(ends[1]) else None,
        **{
            name: _pack(grid, "<f4")
            for name, grid in zip(names, source, strict=True)
            if name in kept
        },
    }
    if axes.hidden:
        cells["at"] = _pack(at, "<u2")
    caption = _seen(view, axes, labels, flat, at[..., 0], ends) + _reading(
        quantity, metric, limit, n_beyond, _unrun(flat[0], axes, view)
    )
    return Frame(metric, view, quantity, limit, caption, cells)


def _pack(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")


def _unrun(value: np.ndarray, axes: Axes, view: View) -> float:
    """Share of the drawn cells that have not run, positions past the prompt's end apart."""
    drawn = value[:, : view.n_pos] if axes.columns == "pos" else value
    return float(np.isnan(drawn).mean()) if drawn.size else 0.0


def _seen(
    view: View,
    axes: Axes,
    labels: dict[str, list[int]],
    flat: list[np.ndarray],
    at: np.ndarray,
    ends: tuple[float, float],
) -> str:
    """One sentence: the strongest cell, and where the cells of its order of size are."""
    value, effect, fraction = flat
    size = np.nan_to_num(np.abs(effect), nan=0.0)
    if np.isnan(effect).all():
        return "<strong>Nothing of this site has run yet.</strong>"
    if not size.max() > 0:
        return "<strong>No patch of this site changes the metric.</strong>"
    top = np.unravel_index(size.argmax(), size.shape)
    part = f", {number(float(fraction[top]))} of the gap" if np.isfinite(fraction[top]) else ""
    moved = f"from {number(ends[0])} to {number(float(value[top]))}{part}"
    rest = np.argwhere(size >= size.max() / 2)
    rest = rest[np.argsort(-size[tuple(rest.T)], kind="stable")]
    others = [cell for cell in rest.tolist() if tuple(cell) != tuple(int(i) for i in top)]
    text = (
        f"Strongest: {_name(top, at, axes, labels, view)}, where the patch moves the metric {moved}"
    )
    if not others:
        text += "; no other cell is half as strong"
    elif len(others) <= _NAMED:
        listed = ", ".join(_name(cell, at, axes, labels, view) for cell in others)
        text += f"; at least half as strong: {listed}"
    else:
        where = "pos" if "pos" in (axes.columns, axes.hidden) else axes.columns
        text += f"; {count(len(others))} more cells are at least half as strong"
        if where:
            column = [c[1] if where == axes.columns else int(at[tuple(c)]) for c in others]
            at_most = list(dict.fromkeys(column))
            if len(at_most) <= _NAMED:
                listed = ", ".join(_place(where, i, labels, view) for i in at_most)
                text += f", all at {listed}"
    return f"<strong>{text}.</strong>"


def _name(
    cell: tuple[int, ...] | list[int],
    at: np.ndarray,
    axes: Axes,
    labels: dict[str, list[int]],
    view: View,
) -> str:
    row, column = int(cell[0]), int(cell[1])
    index = {axes.rows: row, axes.columns: column, axes.hidden: int(at[row, column])}
    parts = [_place(d, index[d], labels, view) for d in ("layer", *summary.UNIT_DIMS) if d in index]
    if "pos" in index:
        parts += ["at"] * bool(parts) + [_place("pos", index["pos"], labels, view)]
    return " ".join(parts) or "the one patch"


def _place(dim: str, index: int, labels: dict[str, list[int]], view: View) -> str:
    label = labels[dim][index]
    if dim != "pos":
        return f"{esc(dim.replace('kv_', 'key '))} {label}"
    token = view.base_tokens[index] if index < len(view.base_tokens) else ""
    return f"position {label}" + (f" {token_html(token)}" if token else "")


def _reading(quantity: str, metric: str, limit: float, n_beyond: int, unrun: float) -> str:
    """How the colours are to be read."""
    what = "recovered fraction" if quantity == "recovered" else f"effect on {esc(metric)}"
    text = f" Colours: {what}, from {number(-limit, sign=True)} to {number(limit, sign=True)}"
    if n_beyond:
        text += f"; {plural(n_beyond, 'cell')} beyond that in the end colour"
    text += "."
    if quantity == "effect":
        text += " Base and source differ too little here for a recovered fraction to mean much."
    if unrun:
        text += f" Grey: not run ({percent(unrun)})."
    return text


def _words(ds: xr.Dataset, site: str, axes: Axes) -> tuple[str, str]:
    """(title, note) of the map."""
    estimated = summary.estimates(ds).get(site)
    plain, method = estimated or (site, "")
    title = summary.SITE_WORDS.get(plain, plain)
    notes = []
    if estimated:
        notes.append(f"Estimated by {esc(method)}, not run.")
    if axes.hidden == "pos":
        notes.append("Each cell shows the position at which its effect is largest.")
        if not axes.full:
            notes[-1] += " The others are in the store."
    elif axes.hidden:
        notes.append(
            f"Each cell shows the one {esc(axes.hidden)}, of "
            f"{count(ds.sizes[axes.hidden])}, whose effect is largest."
        )
    if axes.columns != "pos" and axes.hidden != "pos":
        notes.append("Each patch covers all positions at once.")
    return title, " ".join(notes)
