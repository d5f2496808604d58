"""Attribution patching's product: the change of an activation times the metric's gradient.

    out = sum over d of (source - base) * grad

One number per leading index (token, or token and head): to first order, the change of the metric
when `source` replaces `base` there.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.checks import check_alike
from patchsweep_kernels.dispatch import device_of, jit, next_power_of_2, tl, triton, use_triton

# Elements of the CPU path's temporaries (4 MB in fp32, about a core's cache).
_CHUNK = 1 << 20


@torch.no_grad()
def attribution_dot(
    source: Float[Tensor, "*index d"],
    base: Float[Tensor, "*index d"],
    grad: Float[Tensor, "*index d"],
) -> Float[Tensor, "*index"]:
    """Return the sum over d of `(source - base) * grad`, in fp32 for any dtype (fp64 for fp64).

    Differences and products are fp32 too, so bf16 inputs are not rounded further. Inputs whose
    leading axes cannot be viewed as one are copied.

    Raises:
        ValueError: the inputs differ in shape, device or dtype.
    """
    check_alike(("source", source), ("base", base), ("grad", grad))
    for name, tensor in (("base", base), ("grad", grad)):
        if tensor.shape != source.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, source {tuple(source.shape)}"
            )
    if source.dim() == 0:
        raise ValueError("source must have the axis d to sum over, got a scalar")
    d = source.shape[-1]
    flat = [x.reshape(-1, d) if x.numel() else x.flatten(0, -2) for x in (source, base, grad)]
    dtype = torch.promote_types(source.dtype, torch.float32)
    out = torch.zeros(source.shape[:-1].numel(), dtype=dtype, device=source.device)
    if source.numel():
        compute = _triton if use_triton(source) else _reference
        compute(flat[0], flat[1], flat[2], out)
    return out.view(source.shape[:-1])


def _reference(source: Tensor, base: Tensor, grad: Tensor, out: Tensor) -> None:
    step = max(1, _CHUNK // source.shape[1])
    for first in range(0, len(source), step):
        part = slice(first, first + step)
        change = source[part].to(out.dtype) - base[part].to(out.dtype)
        torch.sum(change.mul_(grad[part].to(out.dtype)), -1, out=out[part])


def _triton(source: Tensor, base: Tensor, grad: Tensor, out: Tensor) -> None:
    n_rows, d = source.shape
    source, base, grad = (x if x.stride(1) == 1 else x.contiguous() for x in (source, base, grad))
    block_d = min(1024, next_power_of_2(d))
    # Short vectors share a program, so that each program moves some kilobytes.
    block_rows = min(max(1, 2048 // block_d), next_power_of_2(n_rows))
    with device_of(source):
        _dot_kernel[(triton.cdiv(n_rows, block_rows),)](
            source,
            base,
            grad,
            out,
            n_rows,
            d,
            source.stride(0),
            base.stride(0),
            grad.stride(0),
            BLOCK_ROWS=block_rows,
            BLOCK_D=block_d,
            num_warps=4,
        )


# Grid (rows / BLOCK_ROWS,). A program owns some rows: it walks along d in tiles of BLOCK_D, reads
# each element of the three inputs once, and keeps an fp32 tile of partial sums until the end.
@jit
@no_type_check
def _dot_kernel(
    source,
    base,
    grad,
    out,
    n_rows,
    d,
    stride_source,
    stride_base,
    stride_grad,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < n_rows
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for first in range(0, d, BLOCK_D):
        element = first + tl.arange(0, BLOCK_D)
        tile = real[:, None] & (element < d)[None, :]
        s = tl.load(source + (row * stride_source)[:, None] + element, mask=tile, other=0.0)
        b = tl.load(base + (row * stride_base)[:, None] + element, mask=tile, other=0.0)
        g = tl.load(grad + (row * stride_grad)[:, None] + element, mask=tile, other=0.0)
        total += (s.to(tl.float32) - b.to(tl.float32)) * g.to(tl.float32)
    tl.store(out + row, tl.sum(total, 1), mask=real)
