"""False discoveries: p-values adjusted for the number of cells, and control levels of placebos."""

from __future__ import annotations

import numpy as np
import xarray as xr

from patchsweep.arguments import number
from patchsweep.errors import StoreError
from patchsweep.results.accessor import effect, effect_mean, p_value
from patchsweep.results.resampling import benjamini_hochberg, tested_q

__all__ = ["benjamini_hochberg", "control_level", "q_value"]


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
    adjusted = [tested_q(*one) for one in zip(p.values, dead.values, strict=True)]
    return p.copy(data=np.array(adjusted)).rename("q_value")


def control_level(placebo: xr.Dataset, site: str, level: float = 0.95) -> xr.DataArray:
    """Return the control level [metric]: that quantile of a placebo's |mean effect| over cells.

    A placebo is a sweep whose donor tells nothing of the pair: another pair's run
    (`intervention="shuffle"`), or noise of the same size (`spec.placebo.norm_matched_noise`).
    Cells that are exactly 0 (dead) do not count. An effect below the level is no larger than what
    such a donor does.

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
