"""Copies of index tables to a GPU: many tables in one copy, for which the host does not wait.

A copy from ordinary memory to a GPU waits until the GPU has done all work before it; one from
pinned memory waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

# a table begins at a multiple of so many entries: kernels read aligned tables faster, and would be
# compiled again for one that is not
_ALIGNED = 16


@dataclass(eq=False)
class Moves:
    """Tables that go to one device in one copy."""

    _tables: dict[int, Tensor] = field(default_factory=dict)  # id -> the table on the CPU
    _there: dict[int, Tensor] = field(default_factory=dict)  # id -> the table on the device

    def add(self, *tables: Tensor) -> None:
        """Take int64 `tables` along, each once."""
        self._tables.update((id(table), table) for table in tables)

    def start(self, device: torch.device) -> None:
        """Copy all tables to `device`; the host does not wait for it."""
        tables = self._tables
        if device.type == "cpu":
            self._there = tables
            return
        places, total = [], 0
        for table in tables.values():
            places.append(total)
            total += -(-table.numel() // _ALIGNED) * _ALIGNED
        pinned = device.type == "cuda"
        buffer = torch.empty(total, dtype=torch.int64, device="cpu", pin_memory=pinned)
        for place, table in zip(places, tables.values(), strict=True):
            buffer[place : place + table.numel()] = table.flatten()
        there = buffer.to(device, non_blocking=True)
        self._there = {
            key: there[place : place + table.numel()].view(table.shape)
            for place, (key, table) in zip(places, tables.items(), strict=True)
        }

    def __getitem__(self, table: Tensor) -> Tensor:
        """Return a table that was taken along, on the device."""
        return self._there[id(table)]


def move_together(tables: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Return int64 `tables` of the CPU on `device`, in one copy that waits for nothing."""
    tables = list(tables)
    moves = Moves()
    moves.add(*tables)
    moves.start(device)
    return [moves[table] for table in tables]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return `x`, of the CPU and any dtype, on `device`, by a copy that waits for nothing."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def on_cpu(array: Any) -> Tensor:
    """Return a NumPy array as a CPU tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))
