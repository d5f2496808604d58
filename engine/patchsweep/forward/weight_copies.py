"""Copies of offloaded weights to a GPU, in a stream of their own, beside what the GPU computes.

A copy from ordinary memory waits for the GPU, so weights go through pinned memory: two buffers
that take turns, of which one is filled while the other one is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# a weight begins at a multiple of so many bytes: buffers are viewed in every dtype
_ALIGNED = 256


class WeightCopies:
    """Sends weights to one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = None  # made when the first weights go
        self._buffers: list[tuple[Tensor, Any]] = []  # and their events; the next to fill first

    def send(self, weights: Sequence[tuple[Tensor, torch.dtype]]) -> list[Tensor]:
        """Return tensors on the GPU to which `weights`, of the CPU, are copied and cast.

        Each comes with the dtype that it is cast to. The host waits for no kernel, only until its
        buffer, which the copies before the last ones read, is free. See `await_on_device`.
        """
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        places, total = [], 0
        for weight, _ in weights:
            places.append(total)
            total += -(-weight.numel() * weight.element_size() // _ALIGNED) * _ALIGNED
        buffer, copied = self._turn(total)
        there = []
        with torch.cuda.stream(self._stream):
            for place, (weight, dtype) in zip(places, weights, strict=True):
                n_bytes = weight.numel() * weight.element_size()
                pinned = buffer[place : place + n_bytes].view(weight.dtype).view(weight.shape)
                pinned.copy_(weight)
                there.append(pinned.to(self.device, non_blocking=True).to(dtype))
            copied.record(self._stream)
        self._buffers.append((buffer, copied))
        return there

    def await_on_device(self, there: Sequence[Tensor]) -> None:
        """Make what the GPU computes from now on wait for all copies; the host does not wait."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._stream)
        for tensor in there:
            tensor.record_stream(current)  # its memory is not used again before this work is done

    def _turn(self, n_bytes: int) -> tuple[Tensor, Any]:
        """Return a buffer that no copy reads any more, and its event."""
        if len(self._buffers) < 2:
            return self._pinned(n_bytes), torch.cuda.Event()
        buffer, copied = self._buffers.pop(0)
        copied.synchronize()
        return buffer if len(buffer) >= n_bytes else self._pinned(n_bytes), copied

    @staticmethod
    def _pinned(n_bytes: int) -> Tensor:
        return torch.empty(n_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)
