"""Arithmetic: fp32 products in full fp32, whatever the process has set for its own.

torch can be told, by a call or an environment variable, to multiply fp32 tensors in TF32 or bf16:
on a GPU, and on CPUs that multiply in bf16. Then values in fp32 have the errors of 16 bits, in the
packed batches and in the bridge alike, so that comparing the two shows nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
BF16_BIT = 0x10000  # the last bit that bf16 has of a number in fp32
FULL = "ieee"  # torch's name of fp32 products that are fp32
_DEVICES = ("cpu", "cuda", "mps", "xpu")


class _Settings:
    """The settings of the process, changed by the first who holds them and restored by the last:
    threads share them."""

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
    """Products of fp32 tensors are fp32, sums of 16-bit products too, and nothing is cast by
    autocast; new tensors are fp32. What was set before is set again at the end."""
    with ExitStack() as stack:
        for device in autocast_devices():
            stack.enter_context(torch.autocast(device, enabled=False))
        _settings.hold()
        stack.callback(_settings.release)
        yield


def autocast_devices() -> list[str]:
    """The kinds of device for which the caller has autocast on."""
    return [device for device in _DEVICES if torch.is_autocast_enabled(device)]


def _switches() -> Iterator[tuple[Any, str]]:
    """Settings of torch that let products be less exact than their tensors."""
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
    """`x` with the last bit of each number turned: the last that 16 bits have of it."""
    if x.dtype in SIXTEEN_BITS:
        return (x.contiguous().view(torch.int16) ^ 1).view(x.dtype)
    return (x.float().contiguous().view(torch.int32) ^ BF16_BIT).view(torch.float32).to(x)
