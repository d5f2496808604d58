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
