"""Packed tokens: the row, the position and the pair of each token in an adaptive batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tokens:
    """Packed tokens, sorted by row and position; rows are sorted by pair."""

    row: Int[Tensor, " token"]
    pos: Int[Tensor, " token"]
    pair: Int[Tensor, " token"]  # row in the tables of the base run

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(pair, first token, past-last token) of each pair; waits for the device."""
        pairs, counts = self.pair.unique_consecutive(return_counts=True)
        spans, first = [], 0
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            spans.append((pair, first, first + count))
            first += count
        return spans

    def at(self, index: Tensor | slice) -> Tokens:
        """Return the tokens at `index`, which keeps their order."""
        return Tokens(self.row[index], self.pos[index], self.pair[index])

    def parts(self, most: int) -> Iterator[tuple[int, int, int]]:
        """Yield (pair, first token, past-last token) of whole rows of one pair.

        A part has at most `most` tokens, unless one row alone has more. Waits for the device.
        """
        for pair, first, stop in self.spans:
            if stop - first <= most:
                yield pair, first, stop
                continue
            _, counts = self.row[first:stop].unique_consecutive(return_counts=True)
            low = high = first
            for count in counts.tolist():
                if high > low and high + count - low > most:
                    yield pair, low, high
                    low = high
                high += count
            yield pair, low, high
