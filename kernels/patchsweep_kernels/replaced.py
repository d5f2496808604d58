"""Attention over a base run's keys and values in which a row has replaced some positions.

The rows of an adaptive batch run only some tokens of a prompt. For query i of row r at position t,

    out_i = sum_j softmax_j(score_ij) v_j,    score_ij = scale * q_i . k_j,

where j runs over positions 0 .. t. Key and value are those of row r's own token where the row has
replaced position j, else the base run's, which are stored once per pair.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels import replaced_torch
from patchsweep_kernels.attention import absorb, check_settings, launch_settings, load_keys
from patchsweep_kernels.checks import check_alike, check_shapes
from patchsweep_kernels.dispatch import device_of, jit, tl, triton, use_triton
from patchsweep_kernels.tokens import Tokens


def replaced_attention(
    q: Float[Tensor, "query head d"],
    query: Tokens,
    k: Float[Tensor, "token kv_head d"],
    v: Float[Tensor, "token kv_head d_v"],
    replaced: Tokens,
    base_k: Float[Tensor, "pair kv_head pos d"],
    base_v: Float[Tensor, "pair kv_head pos d_v"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "query head d_v"]:
    """Return the attention output of `q`, in its dtype, without gradient.

    Query i sees positions 0 .. `query.pos[i]` of its pair: where `replaced` holds the position for
    its row, the key and value of that token, else the base run's. `window`, `softcap` and `sinks`
    as in `prefix_attention`. What `query` and `replaced` hold is not checked: that would wait for
    the device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a head size is above 256.
    """
    n_heads, d = q.shape[1:]
    kv_heads, d_v = v.shape[1:]
    n_pairs, _, length, _ = base_k.shape
    check_settings(q, n_heads, kv_heads, d, d_v, window, softcap, sinks)
    check_shapes(
        ("query.row", query.row, (len(q),)),
        ("replaced.row", replaced.row, (len(k),)),
        ("k", k, (len(k), kv_heads, d)),
        ("v", v, (len(k), kv_heads, d_v)),
        ("base_k", base_k, (n_pairs, kv_heads, length, d)),
        ("base_v", base_v, (n_pairs, kv_heads, length, d_v)),
    )
    check_alike(("q", q), ("k", k), ("v", v), ("base_k", base_k), ("base_v", base_v))
    compute = _triton if use_triton(q) else replaced_torch.attend
    return compute(q, query, k, v, replaced, base_k, base_v, scale, window, softcap, sinks)


@torch.no_grad()
def _triton(
    q: Tensor,
    query: Tokens,
    k: Tensor,
    v: Tensor,
    replaced: Tokens,
    base_k: Tensor,
    base_v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    q, k, v, base_k, base_v = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, base_k, base_v)
    )
    n_tokens, n_heads, d = q.shape
    kv_heads, d_v = v.shape[1:]
    out = torch.empty(n_tokens, n_heads, d_v, dtype=q.dtype, device=q.device)
    if not n_tokens:
        return out
    share = n_heads // kv_heads
    settings = launch_settings(share, d, d_v, q.dtype, q.device)
    # at most 32 keys: which of them a row has replaced is kept in 32 bits; fewer where wide fp32
    # heads leave few registers
    settings["BLOCK_KEYS"] = 16 if q.dtype == torch.float32 and max(d, d_v) > 128 else 32
    head_blocks = triton.cdiv(share, settings["BLOCK_HEADS"])
    query_row, replaced_row = query.row.contiguous(), replaced.row.contiguous()
    with device_of(q):
        _replaced_kernel[(triton.cdiv(n_tokens, settings["BLOCK_TOKENS"]), kv_heads * head_blocks)](
            q,
            k,
            v,
            base_k,
            base_v,
            q if sinks is None else sinks.contiguous(),
            out,
            query.pos.contiguous(),
            query.pair.contiguous(),
            torch.searchsorted(replaced_row, query_row),
            torch.searchsorted(replaced_row, query_row, right=True),
            replaced.pos.contiguous(),
            n_tokens,
            share,
            head_blocks,
            d,
            d_v,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *base_k.stride()[:3],
            *base_v.stride()[:3],
            *out.stride()[:2],
            float(scale),
            float(softcap or 0.0),
            window or 0,
            HAS_CAP=softcap is not None,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            **settings,
        )
    return out


# Grid (query tokens / BLOCK_TOKENS, kv_head * head_blocks). A program owns adjacent query tokens,
# of any rows and pairs, and the query heads of one key head, or a block of these heads if one tile
# cannot hold them all; its query axis is token by head.
# For each pair among its queries it loops over the base run's keys, up to the last position that a
# query of the pair sees. In each tile every query finds the keys that its row has replaced, one bit
# a key, from the positions of its row's tokens, `own_first` to `own_stop`. The program masks these
# keys, other pairs' queries, later positions and keys outside the window. Then it loops over the
# replaced tokens from its first row's to its last row's, leaves out tiles without a token of its
# queries' rows, and masks tokens of other rows. Running maximum, sum and output are fp32. A value
# that is not finite may spread to the block's other tokens, where its weight is 0.
@jit
@no_type_check
def _replaced_kernel(
    q,
    k,
    v,
    base_k,
    base_v,
    sinks,
    out,
    query_pos,
    query_pair,
    own_first,
    own_stop,
    replaced_pos,
    n_tokens,
    share,
    head_blocks,
    d,
    d_v,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    bk_pair,
    bk_head,
    bk_pos,
    bv_pair,
    bv_head,
    bv_pos,
    out_token,
    out_head,
    scale,
    cap,
    window,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NONE: tl.constexpr = 1 << 62
    kv_head = (tl.program_id(1) // head_blocks).to(tl.int64)
    query = tl.arange(0, BLOCK_QUERIES)
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + query // BLOCK_HEADS
    head_in_share = (tl.program_id(1) % head_blocks) * BLOCK_HEADS + query % BLOCK_HEADS
    head = kv_head * share + head_in_share
    real = (query < BLOCK_TOKENS * BLOCK_HEADS) & (token < n_tokens) & (head_in_share < share)
    position = tl.load(query_pos + token, mask=real, other=-1).to(tl.int32)
    pair = tl.load(query_pair + token, mask=real, other=NONE)
    # The replaced tokens of the block's rows, and each query's own among them.
    first = tl.load(own_first + token, mask=real, other=NONE)
    stop = tl.load(own_stop + token, mask=real, other=0)
    lowest = tl.min(first, 0)
    n_own = (tl.max(stop, 0) - lowest).to(tl.int32)
    first = tl.where(real, first - lowest, 0).to(tl.int32)
    stop = tl.where(real, stop - lowest, 0).to(tl.int32)
    longest = tl.max(stop - first, 0)

    element = tl.arange(0, BLOCK_D)
    element_v = tl.arange(0, BLOCK_DV)
    in_d = element < d
    in_dv = element_v < d_v
    at = (token * q_token + head * q_head)[:, None] + element[None, :]
    x = tl.load(q + at, mask=real[:, None] & in_d[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)

    top = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_QUERIES,), tl.float32)
    if HAS_SINKS:
        # The sink is a key with value 0 that every query sees.
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
        mass += 1.0
    total = tl.zeros((BLOCK_QUERIES, BLOCK_DV), tl.float32)

    step = tl.arange(0, BLOCK_KEYS)
    here = tl.min(pair, 0)
    while here < NONE:
        mine = pair == here
        highest = tl.max(tl.where(mine, position, -1), 0) + 1
        low = highest * 0
        if HAS_WINDOW:
            low = tl.maximum(tl.min(tl.where(mine, position, highest), 0) - window + 1, 0)
        keys = base_k + here * bk_pair + kv_head * bk_head
        values = base_v + here * bv_pair + kv_head * bv_head
        for at_key in range(low, highest, BLOCK_KEYS):
            taken = tl.zeros((BLOCK_QUERIES,), tl.int32)
            for at_own in range(0, longest, BLOCK_KEYS):
                own = first[:, None] + at_own + step[None, :]
                p = tl.load(replaced_pos + lowest + own, mask=own < stop[:, None], other=-1)
                p = p.to(tl.int32) - at_key
                inside = (p >= 0) & (p < BLOCK_KEYS)
                taken += tl.sum(tl.where(inside, 1 << tl.where(inside, p, 0), 0), 1)
            j = at_key + step
            there = j < highest
            far = j.to(tl.int64)
            key, value = load_keys(
                keys, values, far, there, bk_pos, bv_pos, d, d_v, BLOCK_D, BLOCK_DV, UPCAST
            )
            seen = mine[:, None] & (j[None, :] <= position[:, None])
            seen = seen & (((taken[:, None] >> step[None, :]) & 1) == 0)
            if HAS_WINDOW:
                seen = seen & (position[:, None] - j[None, :] < window)
            top, mass, total = absorb(
                x, key, value, seen, top, mass, total, scale, cap, HAS_CAP, PRECISION
            )
        here = tl.min(tl.where(pair > here, pair, NONE), 0)

    keys = k + kv_head * k_head
    values = v + kv_head * v_head
    for at_own in range(0, n_own, BLOCK_KEYS):
        own = at_own + step
        seen = (own[None, :] >= first[:, None]) & (own[None, :] < stop[:, None])
        if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
            there = own < n_own
            far = lowest + own
            p = tl.load(replaced_pos + far, mask=there, other=0).to(tl.int32)
            key, value = load_keys(
                keys, values, far, there, k_token, v_token, d, d_v, BLOCK_D, BLOCK_DV, UPCAST
            )
            seen = seen & (p[None, :] <= position[:, None])
            if HAS_WINDOW:
                seen = seen & (position[:, None] - p[None, :] < window)
            top, mass, total = absorb(
                x, key, value, seen, top, mass, total, scale, cap, HAS_CAP, PRECISION
            )

    # Every real query saw its own position, so its mass is positive; padding is not stored.
    total = total / tl.where(real, mass, 1.0)[:, None]
    at = (token * out_token + head * out_head)[:, None] + element_v[None, :]
    mask = real[:, None] & in_dv[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
