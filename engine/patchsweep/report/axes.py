"""The layout of a site's dims as rows, columns and one hidden axis of a map."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.results import accessor as summary

MAX_UNITS = 128  # above this many heads or neurons the map shows positions instead of them
# above this many cells per view only the strongest along the hidden axis is in the page
MAX_CELLS = 150_000
# of a prompt with more positions, the first ones, at which nothing changes, are one column
LONG = 40

DIM_WORDS = {
    "layer": "layer",
    "head": "head",
    "kv_head": "key head",
    "neuron": "neuron",
    "pos": "position",
}


def folded(effect: np.ndarray, first: int = 0, end: int | None = None) -> int:
    """Return how many columns from `first` on stand as one: all their effects are exactly 0.

    These are positions of a long prompt before the first token in which the prompts differ. 0 if
    there is one at most, or nothing else to draw. `effect` is [row, column]; the columns end
    before `end`.
    """
    zero = (effect[:, first:end] == 0).all(axis=0)
    if zero.all() or len(zero) <= LONG:
        return 0
    n = int(zero.argmin())
    return n if n > 1 else 0


@dataclass(frozen=True)
class Axes:
    """The rows, columns and hidden axis of a map; each a dim of the site, or None."""

    rows: str | None  # "layer", or None for the embedding
    columns: str | None  # "pos", a unit such as "head", or None
    hidden: str | None  # reduced to its largest |effect|, or selected in the page
    labels: dict[str, list[int | str]]  # coordinates of each dim in use

    @property
    def full(self) -> bool:
        """Whether the page also holds the cells along the hidden axis."""
        n_cells = math.prod(len(labels) for labels in self.labels.values())
        return self.hidden == "pos" and n_cells <= MAX_CELLS

    def grid(self, array: xr.DataArray) -> np.ndarray:
        """Return `array` as [row, column, hidden] float32; an absent axis has length 1."""
        order = (self.rows, self.columns, self.hidden)
        shape = [array.sizes[d] if d else 1 for d in order]
        values = array.transpose(*(d for d in order if d)).values
        return values.astype(np.float32).reshape(shape)


def strongest(
    effect: np.ndarray, grids: Iterable[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return where along the last axis |effect| is largest, and each of `grids` there.

    NaN, such as a position that a prompt does not have, is never the largest.
    """
    at = np.nan_to_num(np.abs(effect), nan=-1.0).argmax(axis=-1)
    return at, [np.take_along_axis(grid, at[..., None], axis=-1)[..., 0] for grid in grids]


def lay_out(values: xr.DataArray) -> Axes:
    """Return axes with layers as rows and heads or positions as columns; a third dim is hidden."""
    unit = summary.unit_dim(values)
    rows = "layer" if "layer" in values.dims else None
    pos = "pos" if "pos" in values.dims else None
    columns, hidden = unit or pos, None
    if unit and pos:
        columns, hidden = (unit, pos) if values.sizes[unit] <= MAX_UNITS else (pos, unit)
    labels = {d: values[d].values.tolist() for d in (rows, columns, hidden) if d}
    return Axes(rows, columns, hidden, labels)
