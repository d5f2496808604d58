"""Root-mean-square norm in one pass: the model's own takes five, or eight in 16 bits.

    y = w * x / sqrt(mean(x^2) + eps)

The norm is fp32. 16-bit results are rounded where Hugging Face's modules round: Llama's before the
product with the weight and after it, Gemma's after it alone, where w is 1 + weight.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.checks import check_alike, check_shapes
from patchsweep_kernels.dispatch import device_of, jit, next_power_of_2, tl, triton, use_triton


@torch.no_grad()
def rms_norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"],
    eps: float,
    *,
    offset: float = 0.0,
    rounds_first: bool = True,
) -> Float[Tensor, "... d"]:
    """Return `(weight + offset)` times the normalised `x`, in the dtype of both.

    `rounds_first`: the normalised `x` is rounded to its dtype before the product (Llama), else only
    the product is (Gemma, with `offset` 1).

    Raises:
        ValueError: devices, dtypes or shapes do not fit.
    """
    check_alike(("x", x), ("weight", weight))
    check_shapes(("weight", weight, (x.shape[-1],)))
    compute = _triton if use_triton(x) else _reference
    return compute(x, weight, eps, offset, rounds_first)


def _reference(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    normed = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    if rounds_first:
        normed = normed.to(x.dtype).to(dtype)
    return (normed * (weight.to(dtype) + offset)).to(x.dtype)


def _triton(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
    d = x.shape[-1]
    flat = x.reshape(-1, d)
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    block_d = next_power_of_2(d)
    # short rows share a program, so that each program moves some kilobytes
    block_rows = max(1, 2048 // block_d)
    if len(flat):
        with device_of(x):
            _norm_kernel[(triton.cdiv(len(flat), block_rows),)](
                flat,
                weight.contiguous(),
                out,
                len(flat),
                d,
                flat.stride(0),
                float(eps),
                float(offset),
                ROUNDS_FIRST=rounds_first,
                BLOCK_ROWS=block_rows,
                BLOCK_D=block_d,
                num_warps=min(16, max(4, block_d // 512)),
            )
    return out.view(x.shape)


# Grid (rows / BLOCK_ROWS,). A program owns a block of rows: it reads them once, keeps them in
# registers, sums their squares in fp32 and stores the normed rows.
@jit
@no_type_check
def _norm_kernel(
    x,
    weight,
    out,
    n_rows,
    d,
    stride,
    eps,
    offset,
    ROUNDS_FIRST: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    element = tl.arange(0, BLOCK_D)
    in_d = element < d
    tile = (row < n_rows)[:, None] & in_d[None, :]
    value = tl.load(x + (row * stride)[:, None] + element[None, :], mask=tile, other=0.0)
    value = value.to(tl.float32)
    w = tl.load(weight + element, mask=in_d, other=0.0).to(tl.float32) + offset
    square = tl.sum(value * value, 1) / d
    normed = value * tl.rsqrt(square + eps)[:, None]
    if ROUNDS_FIRST:
        normed = normed.to(out.dtype.element_ty).to(tl.float32)
    to = out + (row * d)[:, None] + element[None, :]
    tl.store(to, (normed * w[None, :]).to(out.dtype.element_ty), mask=tile)
