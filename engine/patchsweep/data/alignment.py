"""Alignment of two prompts: which token of one stands where a token of the other stands.

Prompts of one length are aligned position by position. Prompts of unequal lengths are aligned in
their common beginning by position, and behind it by the distance from the end:

    The  nurse  who   spoke  lost     the  keys          0 1 2 3 4 5 6
    The  nurse  lost  the    keys                        0 1 - - 2 3 4
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

END = "end"  # the one way of aligning
NONE = -1  # in the place of a position: no token


def partners(tokens: Sequence[Hashable], others: Sequence[Hashable]) -> NDArray[np.int64]:
    """Return, for each of `tokens`, the position of its partner in `others`; `NONE`: there is none.

    Tokens of the common beginning are partners of themselves: by causality a model computes the
    same there in both prompts.
    """
    position = np.arange(len(tokens))
    shift = len(others) - len(tokens)
    if not shift:
        return position
    shared = n_shared(tokens, others)
    shifted = np.where(position + shift < shared, NONE, position + shift)
    return np.where(position < shared, position, shifted)


def n_shared(tokens: Sequence[Hashable], others: Sequence[Hashable]) -> int:
    """Return how many tokens come before the first difference."""
    pairs = enumerate(zip(tokens, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(others)))
