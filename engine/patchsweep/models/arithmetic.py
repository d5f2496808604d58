"""Full fp32 arithmetic for fp32 tensors, whatever settings the process has.

A call or an environment variable can make torch multiply fp32 tensors in TF32 or bf16, on a GPU
and on CPUs with bf16 products. fp32 values then have 16-bit errors, in packed batches and in the
bridge alike, so that comparing the two does not show them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
BF16_BIT = 0x10000  # the lowest bit of an fp32 number that bf16 keeps
FULL = "ieee"  # torch's name for full fp32 products
_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _Settings:
    """The process's arithmetic settings, which threads share: the first holder changes them, the
    last one restores them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._before: list[tuple[Any, str, Any]] = []

    def hold(self) -> None:
        with self._lock:
            self._n_users += 1
            if self._n_users == 1:
                self._before = [(owner, name, getattr(owner, name)) for owner, name in _switches()]
                self._dtype = torch.get_default_dtype()
                for owner, name in _switches():
                    setattr(owner, name, FULL if name == "fp32_precision" else False)
                torch.set_default_dtype(torch.float32)

    def release(self) -> None:
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0:
                torch.set_default_dtype(self._dtype)
                for owner, name, value in self._before:
                    setattr(owner, name, value)


_settings = _Settings()


@contextmanager
def full_arithmetic() -> Iterator[None]:
    """Compute products of fp32 tensors and sums of 16-bit products in fp32, with autocast off and
    fp32 as the default dtype. Restores the previous settings at the end."""
    with ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        _settings.hold()
        stack.callback(_settings.release)
        yield


def autocast_devices() -> list[str]:
    """Return the device types for which autocast is on."""
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


def _switches() -> Iterator[tuple[Any, str]]:
    """Yield (owner, attribute) of each torch setting that allows less exact products."""
    cuda = torch.backends.cuda.matmul
    yield cuda, "allow_bf16_reduced_precision_reduction"
    yield cuda, "allow_fp16_reduced_precision_reduction"
    if hasattr(cuda, "fp32_precision"):
        yield cuda, "fp32_precision"
        yield torch.backends.mkldnn.matmul, "fp32_precision"  # type: ignore[attr-defined]
        yield torch.backends.cudnn.conv, "fp32_precision"  # type: ignore[attr-defined]
    else:  # before torch 2.9
        yield cuda, "allow_tf32"
        yield torch.backends.cudnn, "allow_tf32"


def last_bit_turned(x: Tensor) -> Tensor:
    """Return `x` with one bit of each number flipped: the lowest bit of its 16-bit form."""
    if x.dtype in SIXTEEN_BITS:
        return (x.contiguous().view(torch.int16) ^ 1).view(x.dtype)
    return (x.float().contiguous().view(torch.int32) ^ BF16_BIT).view(torch.float32).to(x)
