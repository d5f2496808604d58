"""Logits of a few answer tokens, computed directly from the final residual.

    logit_a = cap(scale * (w_u[a] . norm(x) + bias_a))

A logit difference needs two rows of the unembedding. The norm runs in the same pass, so neither a
`[row, d_vocab]` tensor nor the normalised residual is written to memory.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchsweep_kernels.checks import check_indices
from patchsweep_kernels.dispatch import device_of, jit, next_power_of_2, tl, use_triton
from patchsweep_kernels.unembedding import FinalNorm, Unembedding


@torch.no_grad()
def answer_logits(
    resid: Float[Tensor, "row d"],
    unembedding: Unembedding,
    tokens: Int[Tensor, "row answer"],
    *,
    norm: FinalNorm | None = None,
    checked: bool = False,
) -> Float[Tensor, "row answer"]:
    """Return fp32 logits of `tokens[r]` for the final residual `resid[r]` (fp64 for fp64).

    `norm` is applied first; None: `resid` is normalised already. Norm and products are fp32 for
    any dtype of the inputs. `tokens` is int64; keep it on the CPU, where checking it does not wait
    for the GPU, or say that it is `checked`.

    Raises:
        ValueError: devices, dtypes or shapes do not fit, or a token is outside the vocabulary.
    """
    unembedding.check("resid", resid)
    if norm is not None:
        norm.check(resid)
    if tokens.dim() != 2 or len(tokens) != len(resid):
        raise ValueError(f"tokens must be [{len(resid)}, answer], got {tuple(tokens.shape)}")
    if not checked:
        check_indices("tokens", tokens, unembedding.d_vocab)
    tokens = tokens.to(resid.device)
    compute = _triton if use_triton(resid) else _reference
    return compute(resid, unembedding, tokens, norm)


def _reference(
    resid: Tensor, unembedding: Unembedding, tokens: Tensor, norm: FinalNorm | None
) -> Tensor:
    dtype = torch.promote_types(resid.dtype, torch.float32)
    final = resid.to(dtype) if norm is None else norm(resid)
    columns = unembedding.w_u[tokens].to(dtype)  # [row, answer, d]
    product = torch.einsum("rd,rad->ra", final, columns)
    bias = None if unembedding.bias is None else unembedding.bias[tokens]
    return unembedding.finish(product, bias)


def _triton(
    resid: Tensor, unembedding: Unembedding, tokens: Tensor, norm: FinalNorm | None
) -> Tensor:
    n_rows, d = resid.shape
    tokens = tokens.contiguous()
    logits = torch.empty(tokens.shape, dtype=torch.float32, device=resid.device)
    if not logits.numel():
        return logits
    block = next_power_of_2(d)
    weight = None if norm is None else norm.weight
    shift = None if norm is None else norm.bias
    with device_of(resid):
        _answer_kernel[(n_rows,)](
            resid,
            resid if weight is None else weight.contiguous(),
            resid if shift is None else shift.contiguous(),
            unembedding.w_u,
            resid if unembedding.bias is None else unembedding.bias.contiguous(),
            tokens,
            logits,
            d,
            resid.stride(0),
            unembedding.w_u.stride(0),
            0.0 if norm is None else float(norm.eps),
            0.0 if norm is None else float(norm.offset),
            float(unembedding.scale),
            float(unembedding.softcap or 0.0),
            NORM=0 if norm is None else 1 + (norm.kind == "layer"),
            HAS_WEIGHT=weight is not None,
            HAS_SHIFT=shift is not None,
            HAS_BIAS=unembedding.bias is not None,
            HAS_CAP=unembedding.softcap is not None,
            N_ANSWERS=tokens.shape[1],
            BLOCK=block,
            num_warps=min(16, max(1, block // 512)),
        )
    return logits


# Grid (row,). A program owns one row: it reads the residual once, keeps it in registers, and
# normalises it in fp32. Then it reads each answer token's row of w_u and sums the product.
@jit
@no_type_check
def _answer_kernel(
    resid,
    weight,
    shift,
    w_u,
    bias,
    tokens,
    logits,
    d,
    stride_row,
    stride_vocab,
    eps,
    offset,
    scale,
    cap,
    NORM: tl.constexpr,  # 0 none, 1 RMS, 2 layer norm
    HAS_WEIGHT: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    N_ANSWERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    element = tl.arange(0, BLOCK)
    real = element < d
    x = tl.load(resid + row * stride_row + element, mask=real, other=0.0).to(tl.float32)
    if NORM == 2:
        x = tl.where(real, x - tl.sum(x, 0) / d, 0.0)
    if NORM > 0:
        x = x / tl.sqrt(tl.sum(x * x, 0) / d + eps)
        if HAS_WEIGHT:
            x = x * (tl.load(weight + element, mask=real, other=0.0).to(tl.float32) + offset)
        if HAS_SHIFT:
            x = x + tl.load(shift + element, mask=real, other=0.0).to(tl.float32)
    for answer in range(N_ANSWERS):
        token = tl.load(tokens + row * N_ANSWERS + answer).to(tl.int64)
        column = tl.load(w_u + token * stride_vocab + element, mask=real, other=0.0)
        logit = tl.sum(x * column.to(tl.float32), 0)
        if HAS_BIAS:
            logit += tl.load(bias + token).to(tl.float32)
        logit = logit * scale
        if HAS_CAP:
            # tanh(y) = 2 * sigmoid(2y) - 1
            logit = cap * (2.0 / (1.0 + tl.exp(-2.0 * logit / cap)) - 1.0)
        tl.store(logits + row * N_ANSWERS + answer, logit)
