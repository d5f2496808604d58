"""Results that a GPU may still compute: they come to the host by copies that nothing waits for.

The host launches work on a GPU and goes on. It has to wait before it reads a result, and should
have launched more work by then, or the GPU is idle while the host reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


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
