"""Intervals and p-values over pairs: bootstraps, sign flips, adjustment for many cells."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

_FLOATS_PER_BLOCK = 1 << 23  # 32 MiB of resampled effects at a time
# of sign flips, as in transformer_lens: pairs whose patterns are all tried; patterns drawn at a
# time; what counts as a tie
_ALL_SIGNS, _DRAWN, _TIE = 12, 256, 100 * np.finfo(np.float64).eps


def bootstrap(
    effects: np.ndarray, *, confidence: float = 0.95, n_resamples: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Return (low, high) [cell] of the mean over axis 0 of `effects` [pair, cell], NaN left out."""
    import torch  # a local import, so that reading a store does not load torch
    from transformer_lens.utilities.statistics import bootstrap_ci

    low, high = np.full((2, effects.shape[1]), np.nan)
    for cells, present in _same_pairs(effects, 256):
        bounds = bootstrap_ci(
            torch.from_numpy(present), dim=0, confidence=confidence, n_resamples=n_resamples
        )
        low[cells], high[cells] = (b.numpy() for b in bounds)
    return low, high


def sign_flip(effects: np.ndarray, *, n_permutations: int = 1000) -> np.ndarray:
    """Return the two-sided sign-flip p-value of the mean over axis 0 of `effects` [pair, cell].

    As `transformer_lens.utilities.statistics.sign_flip_permutation_pvalue`, as one matrix product.
    """
    p = np.full(effects.shape[1], np.nan)
    for cells, present in _same_pairs(effects, 1000):
        n = len(present)
        exact = n <= _ALL_SIGNS
        signs = _signs(n, None if exact else n_permutations)
        observed = np.abs(present.mean(axis=0))
        null = np.abs(signs @ (present / n))
        hits = np.count_nonzero(null >= observed * (1 - _TIE), axis=0)
        p[cells] = hits / len(signs) if exact else (hits + 1.0) / (len(signs) + 1.0)
    return p


@lru_cache(maxsize=4)
def _signs(n_pairs: int, n_permutations: int | None) -> np.ndarray:
    """Return patterns of signs [pattern, pair]: all of them, or so many of those drawn there."""
    if n_permutations is None:
        return np.array(list(product((1.0, -1.0), repeat=n_pairs)))
    import torch
    from transformer_lens.utilities.statistics import derive_generator

    drawn, generator = [], derive_generator(0)
    for first in range(0, n_permutations, _DRAWN):
        count = min(_DRAWN, n_permutations - first)
        drawn.append(torch.randint(0, 2, (count, n_pairs), generator=generator))
    return torch.cat(drawn).double().numpy() * 2 - 1


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


def tested_q(p: NDArray[np.floating], dead: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the adjusted p-values of the cells that are not `dead`; 1 for those, if `p` is known.

    A cell whose effect is exactly 0 in every pair is known to do nothing, and is not tested.
    """
    adjusted = benjamini_hochberg(np.where(dead, np.nan, p))
    return np.where(dead & ~np.isnan(p), 1.0, adjusted)


def _same_pairs(effects: np.ndarray, draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (cells, effects [pair, cell]) of cells that ran in the same pairs, for those pairs.

    Cells that ran in fewer than two pairs are left out. Blocks are small enough that `draws`
    resamples of one fit `_FLOATS_PER_BLOCK`.
    """
    ran = np.isfinite(effects)
    patterns, group = np.unique(ran, axis=1, return_inverse=True)
    for index, pairs in enumerate(patterns.T):
        if pairs.sum() < 2:
            continue
        cells = np.flatnonzero(group.ravel() == index)
        n_blocks = -(-len(cells) * int(pairs.sum()) * draws // _FLOATS_PER_BLOCK)
        for block in np.array_split(cells, max(1, min(n_blocks, len(cells)))):
            yield block, effects[np.ix_(pairs, block)]
