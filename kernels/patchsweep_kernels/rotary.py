"""Rotary embeddings of queries and keys in one pass: the model's own takes five for each.

    y = x * cos + (-second half of x, first half of x) * sin

over the first elements of a head, as many as `cos` has; the others are copied. Products and sum are
fp32; 16-bit results are rounded after each, as in Hugging Face's modules.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.checks import check_alike
from patchsweep_kernels.dispatch import device_of, jit, next_power_of_2, tl, triton, use_triton


@torch.no_grad()
def rotate(
    q: Float[Tensor, "batch head token d"],
    k: Float[Tensor, "batch kv_head token d"],
    cos: Float[Tensor, "table token rotated"],
    sin: Float[Tensor, "table token rotated"],
) -> tuple[Float[Tensor, "batch head token d"], Float[Tensor, "batch kv_head token d"]]:
    """Return `q` and `k` rotated, in their dtype; a table for one prompt serves all.

    Raises:
        ValueError: devices, dtypes or shapes do not fit.
    """
    check_alike(("q", q), ("k", k), ("cos", cos), ("sin", sin))
    n, _, n_tokens, d = q.shape
    if k.shape != (n, k.shape[1], n_tokens, d):
        raise ValueError(f"k must be [{n}, head, {n_tokens}, {d}], got {tuple(k.shape)}")
    rotated = cos.shape[-1]
    if rotated > d or rotated % 2 or cos.shape != sin.shape or cos.shape[1] != n_tokens:
        raise ValueError(
            f"cos and sin must be [prompt, {n_tokens}, an even number up to {d}], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.shape[0] not in (1, n):
        raise ValueError(f"cos and sin hold {cos.shape[0]} prompts for {n}")
    compute = _triton if use_triton(q) else _reference
    return compute(q, k, cos, sin)


def _reference(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotated(q, cos, sin), _rotated(k, cos, sin)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n = cos.shape[-1]
    first, second = x[..., : n // 2], x[..., n // 2 : n]
    turned = torch.cat((-second, first), dim=-1)
    return torch.cat((x[..., :n] * cos + turned * sin, x[..., n:]), dim=-1)


def _triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    sin = sin if sin.stride() == cos.stride() else sin.contiguous()
    cos = cos if sin.stride() == cos.stride() else cos.contiguous()
    n, n_heads, n_tokens, d = q.shape
    kv_heads, rotated = k.shape[1], cos.shape[-1]
    # heads of a token side by side, as attention reads them
    out_q, out_k = (
        torch.empty(n, n_tokens, h, d, dtype=q.dtype, device=q.device).transpose(1, 2)
        for h in (n_heads, kv_heads)
    )
    block_half = next_power_of_2(rotated // 2)
    block_tokens = max(1, 1024 // block_half)
    if n * n_tokens:
        with device_of(q):
            _rotary_kernel[(triton.cdiv(n * n_tokens, block_tokens), n_heads + kv_heads)](
                q,
                k,
                cos,
                sin,
                out_q,
                out_k,
                n * n_tokens,
                n_tokens,
                n_heads,
                d,
                rotated // 2,
                *q.stride()[:3],
                *k.stride()[:3],
                0 if len(cos) == 1 else cos.stride(0),
                cos.stride(1),
                *out_q.stride()[:3],
                *out_k.stride()[:3],
                HAS_REST=rotated < d,
                BLOCK_TOKENS=block_tokens,
                BLOCK_HALF=block_half,
                BLOCK_REST=next_power_of_2(max(1, d - rotated)),
                num_warps=4,
            )
    return out_q, out_k


# Grid (prompt token / BLOCK_TOKENS, head + kv_head). A program owns a block of tokens of one head
# of the queries, or of the keys: it reads both halves and stores both.
@jit
@no_type_check
def _rotary_kernel(
    q,
    k,
    cos,
    sin,
    out_q,
    out_k,
    n_rows,
    length,
    n_heads,
    d,
    half,
    q_prompt,
    q_head,
    q_token,
    k_prompt,
    k_head,
    k_token,
    t_prompt,
    t_token,
    oq_prompt,
    oq_head,
    oq_token,
    ok_prompt,
    ok_head,
    ok_token,
    HAS_REST: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    prompt, token = row // length, row % length
    head = tl.program_id(1).to(tl.int64)
    if head < n_heads:
        at = q + prompt * q_prompt + head * q_head + token * q_token
        to = out_q + prompt * oq_prompt + head * oq_head + token * oq_token
    else:
        at = k + prompt * k_prompt + (head - n_heads) * k_head + token * k_token
        to = out_k + prompt * ok_prompt + (head - n_heads) * ok_head + token * ok_token
    element = tl.arange(0, BLOCK_HALF)
    real = row < n_rows
    tile = real[:, None] & (element < half)[None, :]
    table = (prompt * t_prompt + token * t_token)[:, None] + element[None, :]
    first = tl.load(at[:, None] + element[None, :], mask=tile, other=0.0).to(tl.float32)
    second = tl.load(at[:, None] + half + element[None, :], mask=tile, other=0.0).to(tl.float32)
    cos_first = tl.load(cos + table, mask=tile, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + half + table, mask=tile, other=0.0).to(tl.float32)
    sin_first = tl.load(sin + table, mask=tile, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + half + table, mask=tile, other=0.0).to(tl.float32)
    kind = out_q.dtype.element_ty
    low = (first * cos_first).to(kind).to(tl.float32)
    low -= (second * sin_first).to(kind).to(tl.float32)
    high = (second * cos_second).to(kind).to(tl.float32)
    high += (first * sin_second).to(kind).to(tl.float32)
    tl.store(to[:, None] + element[None, :], low.to(kind), mask=tile)
    tl.store(to[:, None] + half + element[None, :], high.to(kind), mask=tile)
    if HAS_REST:
        rest = 2 * half + tl.arange(0, BLOCK_REST)
        tile = real[:, None] & (rest < d)[None, :]
        tl.store(
            to[:, None] + rest[None, :],
            tl.load(at[:, None] + rest[None, :], mask=tile, other=0.0),
            mask=tile,
        )
