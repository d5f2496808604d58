"""Decoder of shard files: the subset of Zarr v3 sharding that this package writes.

zarr reads these files too, but takes a millisecond per file of any size, and a large run has a
hundred thousand files. This decoder takes a few microseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numcodecs.zstd import decompress  # type: ignore[import-untyped]

_EMPTY = 2**64 - 1  # offset and length of a missing inner chunk
_CHECKSUM_BYTES = 4  # CRC-32C after the index


@dataclass(frozen=True)
class ShardForm:
    """The shapes of a shard and of its inner chunks."""

    shape: tuple[int, ...]  # cells along each axis
    inner: tuple[int, ...] | None  # cells of an inner chunk; None: one chunk, no index

    def decode(self, data: bytes) -> np.ndarray:
        """Return the shard's values, float32; NaN where an inner chunk is missing.

        Raises:
            ValueError: `data` is not a shard of this form.
        """
        if self.inner is None:
            return _chunk(data, self.shape)
        n_inner = tuple(n // m for n, m in zip(self.shape, self.inner, strict=True))
        size = 16 * math.prod(n_inner)
        index_at = len(data) - size - _CHECKSUM_BYTES
        if index_at < 0:
            raise ValueError(f"{len(data)} bytes are too few for a shard")
        index = np.frombuffer(data, "<u8", 2 * math.prod(n_inner), index_at).reshape(-1, 2)
        if len(index) == 1 and index[0, 0] != _EMPTY:
            return _chunk(_slice(data, *index[0].tolist()), self.shape)
        values = np.full(self.shape, np.nan, np.float32)
        for place, (start, length) in zip(np.ndindex(n_inner), index.tolist(), strict=True):
            if start != _EMPTY:
                where = tuple(
                    slice(i * m, (i + 1) * m) for i, m in zip(place, self.inner, strict=True)
                )
                values[where] = _chunk(_slice(data, start, length), self.inner)
        return values


def _slice(data: bytes, start: int, length: int) -> bytes:
    if start + length > len(data):
        raise ValueError(f"an inner chunk ends at byte {start + length} of {len(data)}")
    return data[start : start + length]


def _chunk(data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    values = np.full(shape, np.nan, np.dtype("<f4"))
    try:
        decompress(data, values)  # the fixed buffer bounds the memory that `data` can claim
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"zstd: {error}") from error
    return values
