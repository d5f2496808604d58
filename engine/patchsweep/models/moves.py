"""Copies to a GPU and back, for which the host does not wait: many index tables in one; results.

A copy from ordinary memory to a GPU waits until the GPU has done all work before it; one from
pinned memory waits for nothing. The host launches work on a GPU and goes on. It has to wait before
it reads a result, and should have launched more work by then, or the GPU is idle while it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from patchsweep_kernels.rows import Rows
from torch import Tensor

T = TypeVar("T")

# a table begins at a multiple of so many entries: kernels read aligned tables faster, and would be
# compiled again for one that is not
_ALIGNED = 16


@dataclass(eq=False)
class Moves:
    """Tables that go to one device in one copy."""

    _tables: dict[int, Tensor] = field(default_factory=dict)  # id -> the table on the CPU
    _there: dict[int, Tensor] = field(default_factory=dict)  # id -> the table on the device

    def add(self, *tables: Any) -> None:
        """Take int64 `tables` along, each once: tensors, or what holds them, see `there`."""
        self._tables.update((id(x), x) for table in tables for x in _tensors_in(table))

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

    def there(self, tables: T) -> T:
        """Return tables that were taken along on the device.

        They are tensors, or dataclasses, mappings and lists of such. `Rows` stay on the CPU.
        """
        moved: Any = tables
        if isinstance(tables, Tensor):
            moved = self._there[id(tables)]
        elif isinstance(tables, Mapping):
            moved = {key: self.there(x) for key, x in tables.items()}
        elif isinstance(tables, list | tuple):
            moved = type(tables)(map(self.there, tables))
        elif _has_tables(tables):
            moved = replace(moved, **{key: self.there(x) for key, x in vars(tables).items()})
        return moved


def _has_tables(x: Any) -> bool:
    return is_dataclass(x) and not isinstance(x, Rows)


def _tensors_in(tables: Any) -> Iterator[Tensor]:
    if isinstance(tables, Tensor):
        yield tables
        return
    parts: Iterable[Any] = vars(tables).values() if _has_tables(tables) else ()
    if isinstance(tables, Mapping):
        parts = tables.values()
    elif isinstance(tables, list | tuple):
        parts = tables
    for part in parts:
        yield from _tensors_in(part)


def move_together(tables: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Return int64 `tables` of the CPU on `device`, in one copy that waits for nothing."""
    tables = list(tables)
    moves = Moves()
    moves.add(tables)
    moves.start(device)
    return moves.there(tables)


def sent(x: Tensor, device: torch.device) -> Tensor:
    """Return `x`, of the CPU and any dtype, on `device`, by a copy that waits for nothing."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def on_cpu(array: Any) -> Tensor:
    """Return a NumPy array as a CPU tensor."""
    return torch.from_numpy(np.ascontiguousarray(array))


@dataclass(frozen=True)
class Arriving(Generic[T]):
    """A result that may still be on its way."""

    read: Callable[[], T]  # waits for it, and returns it
    ready: bool  # `read` waits for nothing


def on_its_way(x: Tensor) -> Arriving[Tensor]:
    """Start to copy `x` to the CPU; from a GPU into pinned memory, and the host does not wait."""
    if x.device.type != "cuda":
        here = x.cpu()
        return Arriving(lambda: here, ready=True)
    pinned = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    copied: Any = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(x.device))

    def read() -> Tensor:
        copied.synchronize()
        return pinned

    return Arriving(read, ready=False)
