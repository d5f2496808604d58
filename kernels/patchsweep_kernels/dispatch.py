"""Dispatch: the Triton kernel runs on a GPU, the torch reference elsewhere."""

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


# Arguments that differ from call to call. Triton would compile a variant whenever one of them is 1
# or a multiple of 16, and each stops a sweep for seconds. None of them is multiplied into the
# address of a vector, so specialising them gains nothing.
_COUNTS = (
    "n_tokens",
    "n_targets",
    "n_rows",
    "n_pairs",
    "n_parts",
    "first_row",
    "length",
    "blocks_per_part",
    "window",
)


def jit(kernel: Callable[..., Any]) -> Any:
    """Return `kernel` compiled by `triton.jit`; without Triton, which launches none, `kernel`."""
    if triton is None:
        return kernel
    code = kernel.__code__
    arguments = code.co_varnames[: code.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in _COUNTS if name in arguments])


def use_triton(tensor: Tensor) -> bool:
    """Whether a Triton kernel handles `tensor`; every dispatch on the device asks here.

    The kernels accumulate in fp32, so the references handle fp64.
    """
    on_device = triton is not None and (tensor.is_cuda or INTERPRETED)
    return on_device and tensor.dtype != torch.float64


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of `tensor` current: Triton launches there, wherever the arguments are."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU; for other devices that of an A100."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 8, 0
    return torch.cuda.get_device_capability(device)


def processors_of(device: torch.device) -> int:
    """Return the number of a GPU's multiprocessors; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def dot_settings(dtype: torch.dtype) -> dict[str, Any]:
    """Return the constants UPCAST and PRECISION with which a kernel multiplies tiles of `dtype`.

    16-bit tiles go to the matrix units as they are. The interpreter multiplies them wrongly, so it
    gets fp32 tiles, which hold the same values. fp32 tiles are multiplied in fp32, on NVIDIA as
    three TF32 products, because plain fp32 products would spill registers.
    """
    ieee = INTERPRETED or torch.version.hip is not None
    return {
        "UPCAST": dtype == torch.float32 or INTERPRETED,
        "PRECISION": "ieee" if ieee else "tf32x3",
    }


def next_power_of_2(n: int) -> int:
    """Return the smallest power of two that is at least `n`; Triton's tiles have such sides."""
    return 1 << max(0, n - 1).bit_length()


def check_alike(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """Raise unless all named tensors share one device and one floating-point dtype.

    Raises:
        ValueError: a tensor differs; the text names it.
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


def check_shapes(*expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
    """Raise unless each named tensor has its shape.

    Raises:
        ValueError: a shape differs; the text names the tensor.
    """
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_indices(name: str, indices: Tensor, limit: int) -> None:
    """Raise unless `indices` is int64 and within 0 .. limit-1.

    Checking a table on a GPU waits for the GPU; checking one on the CPU does not.

    Raises:
        ValueError: the dtype is wrong or a value is out of range; the text names the table.
    """
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {indices.dtype}")
    if indices.numel():
        low, high = torch.stack(indices.aminmax()).tolist()
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds {low if low < 0 else high}, outside 0..{limit - 1}")
