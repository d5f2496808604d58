"""Measures of agreement between exact effects and their estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]

# lower ends of the calibration's bins, as fractions of the largest exact effect
BINS = (0.0, 0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class CalibrationBin:
    """Cells whose exact |effect| lies in one range."""

    low: float
    high: float
    n_cells: int
    exact: float  # mean |exact effect|
    estimate: float  # mean |estimate|
    sign_agreement: float  # share of cells with the same sign


def pearson(exact: Floats, estimate: Floats) -> float:
    """Pearson correlation; NaN where either side is constant."""
    if len(exact) < 3 or not np.ptp(exact) or not np.ptp(estimate):
        return math.nan
    return float(np.corrcoef(exact, estimate)[0, 1])


def spearman(exact: Floats, estimate: Floats) -> float:
    """Rank correlation; NaN where either side is constant."""
    return pearson(stats.rankdata(exact), stats.rankdata(estimate))


def kendall(exact: Floats, estimate: Floats) -> float:
    """Kendall's tau-b; NaN where either side is constant."""
    if len(exact) < 3 or not np.ptp(exact) or not np.ptp(estimate):
        return math.nan
    return float(stats.kendalltau(exact, estimate).statistic)


def slope(exact: Floats, estimate: Floats) -> float:
    """Slope of estimate on exact through the origin; NaN if all exact effects are zero."""
    size = float(exact @ exact)
    return float(exact @ estimate) / size if size else math.nan


def sign_agreement(exact: Floats, estimate: Floats) -> float:
    """Share of cells with the same sign, without cells whose exact effect is zero."""
    known = exact != 0
    return float((np.sign(exact) == np.sign(estimate))[known].mean()) if known.any() else math.nan


def recall(exact: Floats, estimate: Floats, k: int) -> float:
    """Share of the `k` largest exact effects among the `2 k` largest estimates."""
    return len(_top(exact, k) & _top(estimate, 2 * k)) / k if len(exact) >= k else math.nan


def precision(exact: Floats, estimate: Floats, k: int) -> float:
    """Share of the `k` largest estimates that are among the `k` largest exact effects."""
    return len(_top(exact, k) & _top(estimate, k)) / k if len(exact) >= k else math.nan


def _top(values: Floats, k: int) -> set[int]:
    return set(np.argsort(-np.abs(values), kind="stable")[:k].tolist())


def calibration(exact: Floats, estimate: Floats) -> tuple[CalibrationBin, ...]:
    """Return estimates binned by |exact effect| as fractions of the largest; smallest first."""
    sizes = np.abs(exact)
    largest = float(sizes.max(initial=0.0))
    bins = []
    for low, high in zip(BINS, (*BINS[1:], math.inf), strict=True):
        inside = (sizes >= low * largest) & (sizes < high * largest)
        if inside.any() and largest:
            bins.append(
                CalibrationBin(
                    low=low * largest,
                    high=min(high, 1.0) * largest,
                    n_cells=int(inside.sum()),
                    exact=float(sizes[inside].mean()),
                    estimate=float(np.abs(estimate[inside]).mean()),
                    sign_agreement=sign_agreement(exact[inside], estimate[inside]),
                )
            )
    return tuple(bins)
