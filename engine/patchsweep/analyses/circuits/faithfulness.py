"""Faithfulness: the share of a metric that a circuit keeps, and when it is undefined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# largest rounding error of a metric, as a share of it; a run's own measured error counts if larger
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
LOW_PRECISION_ROUNDING = 1e-2

Floats = NDArray[np.floating]


def undefined(
    names: Sequence[str], empty: Floats, base: Floats, whole: Floats, dtype: torch.dtype
) -> dict[str, str]:
    """Return metric -> reason for metrics without faithfulness; all arrays are [metric, pair].

    Ablating everything must change the mean over pairs by more than rounding, or faithfulness
    would be a ratio of rounding errors. `whole` is the run with nothing ablated, which differs
    from `base` only by rounding.
    """
    reasons = {}
    share = ROUNDING.get(dtype, LOW_PRECISION_ROUNDING)
    for name, none, all_, again in zip(names, empty, base, whole, strict=True):
        span = float(all_.mean(dtype=np.float64) - none.mean(dtype=np.float64))
        size = max(float(np.abs(all_).max()), float(np.abs(none).max()))
        rounding = max(share * size, float(np.abs(again - all_).max()))
        if not abs(span) > rounding:
            reasons[name] = (
                f"m(clean) - m(empty) is {span:.2g}, within rounding ({rounding:.2g}) of 0: with "
                f"everything ablated {name} is what it is in the whole model"
            )
    return reasons


def fraction(
    names: Sequence[str],
    values: Floats,
    empty: Floats,
    base: Floats,
    without: Mapping[str, str],
) -> NDArray[np.float64]:
    """Return fractions [metric, size] of `values` [metric, pair, size]; 0 as empty, 1 as base.

    It is a ratio of means over pairs, so that pairs with a small difference do not get a large
    weight. NaN for the metrics in `without`.
    """
    m, none, all_ = (x.mean(axis=1, dtype=np.float64) for x in (values, empty, base))
    known = np.array([name not in without for name in names])[:, None]
    span = np.where(known, (all_ - none)[:, None], 1)
    return np.where(known, (m - none[:, None]) / span, np.nan)
