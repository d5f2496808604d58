"""Packed rows: which tokens belong together, and which prefix they read."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Group(NamedTuple):
    """Adjacent rows that read the same prefix positions and are equally long."""

    token: int  # first packed token
    n_rows: int
    n_tokens: int  # tokens per row
    pair: int
    start: int  # prefix positions 0 .. start-1 are read


@dataclass(frozen=True, eq=False)
class Rows:
    """Which tokens of a packed batch belong together, and what they may read."""

    offsets: Int[Tensor, " row_plus_1"]  # int64, CPU; row r owns tokens offsets[r]:offsets[r+1]
    pair: Int[Tensor, " row"]  # int64, CPU; which shared prefix the row reads
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
        if int(self.offsets[0]) != 0 or int(self.offsets.diff().min()) < 1:
            raise ValueError("rows.offsets must begin at 0 and grow: no row is empty or overlaps")
        if int(self.pair.min()) < 0:
            raise ValueError(f"rows.pair holds {int(self.pair.min())}; pairs count from 0")
        if int(self.start.min()) < 0:
            raise ValueError(f"rows.start holds {int(self.start.min())}; positions count from 0")

    @cached_property
    def n_tokens(self) -> int:
        """Packed tokens of all rows."""
        return int(self.offsets[-1])

    @cached_property
    def n_pairs(self) -> int:
        """Pairs that a prefix table must hold at least."""
        return int(self.pair.max()) + 1

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.offsets.diff().max())

    @cached_property
    def deepest(self) -> int:
        """Prefix positions that a prefix table must hold at least."""
        return int(self.start.max())

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Runs of adjacent rows with equal pair, start and length, in packed order."""
        lengths = self.offsets.diff()
        keys = torch.stack((self.pair, self.start, lengths))
        first = torch.ones(len(lengths), dtype=torch.bool)
        first[1:] = (keys[:, 1:] != keys[:, :-1]).any(0)
        rows = first.nonzero().flatten()
        counts = torch.diff(rows, append=rows.new_tensor([len(lengths)]))
        columns = (self.offsets[rows], counts, lengths[rows], self.pair[rows], self.start[rows])
        return tuple(itertools.starmap(Group, zip(*(c.tolist() for c in columns), strict=True)))

    def token_table(self, device: torch.device) -> Int[Tensor, "2 token"]:
        """For each packed token: the first token of its row, and the row's start."""
        if device not in self._on_device:
            lengths = self.offsets.diff()
            table = torch.stack((self.offsets[:-1], self.start)).repeat_interleave(lengths, 1)
            self._on_device[device] = table.to(device, non_blocking=True)
        return self._on_device[device]

    def block_table(self, size: int, device: torch.device) -> Int[Tensor, "block 6"]:
        """Blocks of at most `size` adjacent tokens of one pair, which read one prefix together.

        Columns: first token, past-last token, pair, first token of the first row, and the lowest
        and the highest start among the rows.
        """
        key = (size, device)
        if key not in self._on_device:
            lengths = self.offsets.diff()
            turns = (self.pair[1:] != self.pair[:-1]).nonzero().flatten() + 1
            bounds = self.offsets[torch.cat((turns.new_zeros(1), turns, turns.new_tensor([-1])))]
            spans = itertools.pairwise(bounds.tolist())
            first = torch.cat([torch.arange(low, high, size) for low, high in spans])
            stop = torch.cat((first[1:], bounds[-1:]))
            row = torch.arange(len(lengths)).repeat_interleave(lengths)
            block = torch.arange(len(first)).repeat_interleave(stop - first)
            start = self.start[row]
            lowest = torch.full_like(first, self.deepest).scatter_reduce(0, block, start, "amin")
            highest = torch.zeros_like(first).scatter_reduce(0, block, start, "amax")
            columns = (first, stop, self.pair[row[first]], self.offsets[row[first]])
            table = torch.stack((*columns, lowest, highest), 1)
            self._on_device[key] = table.to(device, non_blocking=True)
        return self._on_device[key]

    @cached_property
    def _on_device(self) -> dict[Any, Tensor]:
        """Tables for the kernel, made once and kept while the rows stay the same."""
        return {}
