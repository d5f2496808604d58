"""Which implementation runs: the Triton kernel on a GPU, the torch reference elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the references need no Triton
    triton = None
    tl = None

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run in Triton's interpreter, on CPU tensors, when that variable was set before import."""


# Arguments that differ from call to call. Triton compiles anew when an integer turns out to be 1
# or a multiple of 16, which would stop a sweep for seconds again and again; none of these is
# multiplied into the address of a vector, so nothing is lost.
_COUNTS = ("n_tokens", "n_targets", "n_rows", "blocks_per_part", "window")


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`, or the plain function where Triton is missing and nothing will launch it."""
    if triton is None:
        return kernel
    code = kernel.__code__
    named = code.co_varnames[: code.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in _COUNTS if name in named])


def use_triton(tensor: Tensor) -> bool:
    """Whether work on `tensor` goes to a Triton kernel. The one question about the device.

    The kernels accumulate in fp32, so fp64 stays with the references.
    """
    on_device = triton is not None and (tensor.is_cuda or INTERPRETED)
    return on_device and tensor.dtype != torch.float64


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch there: Triton launches on the current GPU, wherever its arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def dot_settings(dtype: torch.dtype) -> dict[str, Any]:
    """How a kernel multiplies tiles of `dtype`: the constants UPCAST and PRECISION.

    16-bit tiles go to the matrix units as they are; the interpreter's products of them are wrong,
    so there they become fp32, which holds them exactly. fp32 tiles are multiplied in fp32, on
    NVIDIA as three TF32 products: plain fp32 products would fill registers until they spill.
    """
    ieee = INTERPRETED or torch.version.hip is not None
    return {
        "UPCAST": dtype == torch.float32 or INTERPRETED,
        "PRECISION": "ieee" if ieee else "tf32x3",
    }


def next_power_of_2(n: int) -> int:
    """Smallest power of two that is at least `n`; Triton's tiles have such sides."""
    return 1 << max(0, n - 1).bit_length()


def check_alike(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """Raise unless all named tensors share one device and one floating-point dtype.

    Raises:
        ValueError: names the tensor that differs.
    """
    name, tensor = first
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    for other_name, other in others:
        if other is None:
            continue
        if other.device != tensor.device:
            raise ValueError(f"{other_name} is on {other.device}, {name} on {tensor.device}")
        if other.dtype != tensor.dtype:
            raise ValueError(f"{other_name} is {other.dtype}, {name} is {tensor.dtype}")


def check_indices(name: str, indices: Tensor, limit: int) -> None:
    """Raise unless `indices` is int64 and within 0 .. limit-1.

    Tables on the CPU are checked for free; a table on a GPU is waited for.

    Raises:
        ValueError: names the table and the value that is out of range.
    """
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {indices.dtype}")
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds {low if low < 0 else high}, outside 0..{limit - 1}")
