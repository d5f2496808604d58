"""False discoveries: p-values adjusted for the number of cells, and control levels of placebos."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.arguments import number
from patchsweep.errors import StoreError
from patchsweep.results.accessor import effect, effect_mean, p_value


def benjamini_hochberg(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the adjusted p-values of `p`, in its shape; NaN stays NaN and does not count.

    The adjusted value of the i-th smallest of n is the least p_(j) * n / j of all j >= i. Rejecting
    every cell at or below q keeps the expected share of false discoveries among the rejected below
    q, if cells are independent or positively dependent (Benjamini and Hochberg 1995).
    """
    flat = np.asarray(p, dtype=np.float64).ravel()
    known = np.flatnonzero(~np.isnan(flat))
    order = known[np.argsort(flat[known], kind="stable")]
    n = len(order)
    scaled = flat[order] * n / np.arange(1, n + 1)
    adjusted = np.full(flat.shape, np.nan)
    adjusted[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return adjusted.reshape(np.shape(p))


def q_value(ds: xr.Dataset, site: str, n_permutations: int = 1000) -> xr.DataArray:
    """Return per cell the sign-flip p-value adjusted for all cells of the site and metric.

    See `benjamini_hochberg` and `patchsweep.summary.p_value`. Cells whose effect is exactly 0 in
    every pair are known to do nothing, are not tested, and get 1. With few pairs p-values are
    coarse: n pairs that agree give 2^(1 - n) at best, so that 5 pairs never pass 0.05.

    Raises:
        SiteError, PlanError: as `p_value`.
    """
    p = p_value(ds, site, n_permutations)
    dead = (effect(ds, site).fillna(0) == 0).all("pair").transpose(*p.dims)
    q = xr.zeros_like(p).rename("q_value")
    for i in range(p.sizes["metric"]):
        tested = np.where(dead.values[i], np.nan, p.values[i])
        adjusted = benjamini_hochberg(tested)
        q.values[i] = np.where(dead.values[i] & ~np.isnan(p.values[i]), 1.0, adjusted)
    return q


def control_level(placebo: xr.Dataset, site: str, level: float = 0.95) -> xr.DataArray:
    """Return the control level [metric]: that quantile of a placebo's |mean effect| over cells.

    A placebo is a sweep whose donor tells nothing of the pair: another pair's run
    (`intervention="shuffle"`), or noise of the same size (`patchsweep.norm_matched_noise`). Cells
    that are exactly 0 (dead) do not count. An effect below the level is no larger than what such
    a donor does.

    Raises:
        StoreError: every cell of the placebo is 0.
        SiteError, PlanError: the site is not in the Dataset, or `level` is out of range.
    """
    number("level", level, above=0, below=1)
    size = abs(effect_mean(placebo, site))
    live = size.where(size > 0)
    if not bool(live.notnull().any()):
        raise StoreError(
            f"the placebo does nothing at {site}, so it gives no level; check its pairs"
        )
    dims = [dim for dim in live.dims if dim != "metric"]
    return live.quantile(level, dims, skipna=True).drop_vars("quantile").rename("control")
