"""Packed rows: the tokens of each row in a packed batch, and the prefix that it reads."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Group(NamedTuple):
    """Adjacent rows that read the same prefix positions and have the same length."""

    token: int  # first packed token
    n_rows: int
    n_tokens: int  # tokens per row
    pair: int
    start: int  # prefix positions 0 .. start-1 are read


class Blocks(NamedTuple):
    """Blocks of adjacent tokens of one pair, padded to one shape, and the keys they read."""

    query: Int[Tensor, "block query"]  # packed token
    # index into all prefix positions (pairs 0 .. n_pairs-1 with `Rows.deepest` each), followed by
    # all packed tokens
    key: Int[Tensor, "block key"]
    mask: Float[Tensor, "block 1 query key"]  # 0 where the query sees the key, else minus infinity
    place: Int[Tensor, " token"] | None  # flat query of each packed token; None: token i is query i


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a packed batch: their tokens, and the prefix that each may read.

    `offsets` is what FlashAttention calls cu_seqlens.
    """

    offsets: Int[Tensor, " row_plus_1"]  # int64, CPU; row r owns tokens offsets[r]:offsets[r+1]
    pair: Int[Tensor, " row"]  # int64, CPU; pair whose prefix the row reads
    start: Int[Tensor, " row"]  # int64, CPU; position of the row's first token: reads [0, start)

    def __post_init__(self) -> None:
        for name in ("offsets", "pair", "start"):
            table: Tensor = getattr(self, name)
            if table.device.type != "cpu" or table.dtype != torch.int64 or table.dim() != 1:
                raise ValueError(
                    f"rows.{name} must be a one-axis int64 tensor on the CPU, "
                    f"got {table.dtype} {tuple(table.shape)} on {table.device}"
                )
        n_rows = len(self.offsets) - 1
        if n_rows < 1:
            raise ValueError("rows.offsets must hold the bounds of at least one row")
        if len(self.pair) != n_rows or len(self.start) != n_rows:
            raise ValueError(
                f"rows.pair and rows.start must have one entry for each of the {n_rows} rows of "
                f"rows.offsets, got {len(self.pair)} and {len(self.start)}"
            )
        if int(self.offsets[0]) != 0 or int(self._lengths.min()) < 1:
            raise ValueError("rows.offsets must begin at 0 and grow: no row is empty or overlaps")
        if int(self.pair.min()) < 0:
            raise ValueError(f"rows.pair holds {int(self.pair.min())}; pairs count from 0")
        if int(self.start.min()) < 0:
            raise ValueError(f"rows.start holds {int(self.start.min())}; positions count from 0")

    @cached_property
    def n_tokens(self) -> int:
        """Number of packed tokens in all rows."""
        return int(self.offsets[-1])

    @cached_property
    def n_pairs(self) -> int:
        """Fewest pairs that a prefix table must hold."""
        return int(self.pair.max()) + 1

    @cached_property
    def longest(self) -> int:
        """Number of tokens in the longest row."""
        return int(self._lengths.max())

    @cached_property
    def deepest(self) -> int:
        """Fewest prefix positions that a prefix table must hold."""
        return int(self.start.max())

    @cached_property
    def reach(self) -> int:
        """Most keys that the last token of a row sees."""
        return int((self.start + self._lengths).max())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Runs of adjacent rows with equal pair, start and length, in packed order."""
        first = torch.cat((self._turns.new_ones(1), self._turns))
        rows = first.nonzero().flatten()
        counts = torch.diff(rows, append=rows.new_tensor([len(first)]))
        lengths = self._lengths[rows]
        columns = (self.offsets[rows], counts, lengths, self.pair[rows], self.start[rows])
        return tuple(itertools.starmap(Group, zip(*(c.tolist() for c in columns), strict=True)))

    @cached_property
    def n_groups(self) -> int:
        """Number of groups; ten times as fast as listing them."""
        return 1 + int(self._turns.sum())

    def token_table(self, device: torch.device) -> Int[Tensor, "2 token"]:
        """Return, per packed token, the first token of its row and the row's start."""
        if device not in self._on_device:
            table = torch.stack((self.offsets[:-1], self.start))
            table = table.repeat_interleave(self._lengths, 1, output_size=self.n_tokens)
            self._on_device[device] = table.to(device, non_blocking=True)
        return self._on_device[device]

    def block_table(self, size: int, device: torch.device) -> Int[Tensor, "block 6"]:
        """Return blocks of at most `size` adjacent tokens of one pair, which read one prefix.

        Columns: first token, past-last token, pair, first token of the first row, and the lowest
        and the highest start among the rows.
        """
        key = (size, device)
        if key not in self._on_device:
            token, stop, pair = self._cut(size)
            row_first, start = self.token_table(token.device)[:, token]
            columns = (token[:, 0], stop, pair, row_first[:, 0], *start.aminmax(dim=1))
            self._on_device[key] = torch.stack(columns, 1).to(device, non_blocking=True)
        return self._on_device[key]

    def keep_tables(
        self, size: int, tokens: Int[Tensor, "2 token"], blocks: Int[Tensor, "block 6"]
    ) -> None:
        """Keep `token_table` and `block_table(size)`, which were moved from the CPU to a device.

        The kernel then finds them there, and copies nothing.
        """
        self._on_device[tokens.device] = tokens
        self._on_device[size, blocks.device] = blocks

    def blocks(self, size: int, window: int | None, device: torch.device) -> Blocks:
        """Return the blocks of `block_table`, padded to one shape, with the keys that each reads.

        `window`: a query sees at most that many keys, itself included.
        """
        key = (size, window, device)
        if key not in self._blocks:
            query, keys, mask, place = self._make_blocks(size, window)
            self._blocks[key] = Blocks(
                query.to(device),
                keys.to(device),
                mask.to(device),
                None if place is None else place.to(device),
            )
        return self._blocks[key]

    def _make_blocks(self, size: int, window: int | None) -> Blocks:
        token, stop, pair = self._cut(min(size, self.n_tokens))
        row_first, start = self.token_table(token.device)[:, token]
        stop, own_first = stop.unsqueeze(1), row_first[:, :1]
        low: Tensor | int = 0  # first prefix position that a block reads
        if window is not None:
            low = (start.amin(1, keepdim=True) - window + 1).clamp_(min=0)

        # Columns of a block: prefix positions low .. highest start - 1, then packed tokens from the
        # first token of its first row to its last token, then padding that repeats the last token.
        n_prefix = start.amax(1, keepdim=True) - low
        to_column = n_prefix - own_first  # column of a packed token minus the token
        # SDPA takes up to twice as long if the number of keys is no multiple of 16.
        n_keys = -(-int((to_column + stop).max()) // 16) * 16
        column = torch.arange(n_keys, device="cpu")
        in_prefix = (pair * self.deepest).unsqueeze(1) + low + column
        in_packed = (column - to_column).minimum(stop - 1) + self.n_pairs * self.deepest
        key = torch.where(column < n_prefix, in_prefix, in_packed)

        narrow = column.int()  # twice as fast to compare

        def before(bound: Tensor) -> Tensor:
            return narrow < bound.int().unsqueeze(2)

        first_own, prefix = row_first, before(start - low)
        if window is not None:
            first_own = row_first.maximum(token - window + 1)
            prefix &= ~before(start - row_first + token - window + 1 - low)
        own = before(token + to_column + 1)
        own &= ~before(first_own + to_column)
        seen = prefix.logical_or_(own)
        mask = torch.where(seen, 0.0, -torch.inf).unsqueeze(1)

        flat, packed = token.flatten(), torch.arange(self.n_tokens, device="cpu")
        in_order = torch.equal(flat[: self.n_tokens], packed)
        place = None if in_order else torch.searchsorted(flat, packed)
        return Blocks(token, key, mask, place)

    def _cut(
        self, size: int
    ) -> tuple[Int[Tensor, "block token"], Int[Tensor, " block"], Int[Tensor, " block"]]:
        """Return blocks of at most `size` adjacent tokens of one pair: tokens, past-last, pair.

        A shorter block repeats its last token.
        """
        turns = (self.pair[1:] != self.pair[:-1]).nonzero().flatten() + 1
        bounds = [0, *self.offsets[turns].tolist(), self.n_tokens]
        spans = itertools.pairwise(bounds)
        first = torch.cat([torch.arange(low, high, size, device="cpu") for low, high in spans])
        stop = torch.cat((first[1:], self.offsets[-1:]))
        own = torch.arange(size, device="cpu")
        token = (first.unsqueeze(1) + own).minimum(stop.unsqueeze(1) - 1)
        return token, stop, self.pair[torch.searchsorted(self.offsets, first, right=True) - 1]

    @cached_property
    def _lengths(self) -> Int[Tensor, " row"]:
        return self.offsets.diff()

    @cached_property
    def _turns(self) -> Bool[Tensor, " row_less_1"]:
        """Whether each row but the first differs in pair, start or length from the previous one."""
        columns = (self.pair, self.start, self._lengths)
        pair, start, length = (column[1:] != column[:-1] for column in columns)
        return pair | start | length

    @cached_property
    def _on_device(self) -> dict[Any, Tensor]:
        """Tables for the kernels, cached for the life of these rows."""
        return {}

    @cached_property
    def _blocks(self) -> dict[Any, Blocks]:
        return {}
