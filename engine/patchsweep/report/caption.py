"""The caption of a map: its strongest cells in one sentence, and the meaning of its colours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchsweep.data.show import count, esc, number, percent, plural, token_html
from patchsweep.report.axes import DIM_WORDS, Axes
from patchsweep.report.views import View
from patchsweep.results import accessor as summary

_NAMED = 4  # most cells, or places, to list one by one


def seen(
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


def reading(
    quantity: str, metric: str, limit: float, n_beyond: int, unrun: float, *, gap: bool
) -> str:
    """Return HTML on the meaning of the colours; `unrun` is the share of grey cells.

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
        text += f" Grey: not run ({percent(unrun)})."
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
