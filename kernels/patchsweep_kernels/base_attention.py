"""The base run's attention: log-sum-exp, output, and products of the output with gradients.

On a GPU alone: `attention_change` needs these tables for its kernel. Its reference makes its own.
"""

from __future__ import annotations

from typing import NamedTuple, no_type_check

import torch
from torch import Tensor

from patchsweep_kernels.attention import absorb, launch_settings, load_keys
from patchsweep_kernels.dispatch import device_of, jit, tl, triton


class BaseTables(NamedTuple):
    """Tables of the base run's attention, fp32."""

    log_sum: Tensor  # [pair, head, pos]
    z: Tensor  # [pair, head, pos, d_v]
    square: Tensor  # [pair, head, pos] z . z
    along: Tensor  # [metric, pair, head, pos] gradient . z


def base_tables(
    base_q: Tensor,
    base_k: Tensor,
    base_v: Tensor,
    grad_z: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> BaseTables:
    """Return the tables of the base run's attention; settings as in `attention_change`."""
    n_pairs, n_heads, length, d = base_q.shape
    kv_heads, d_v = base_v.shape[1], base_v.shape[3]
    share = n_heads // kv_heads
    new = base_q.new_empty(0, dtype=torch.float32).new_empty
    tables = BaseTables(
        new(n_pairs, n_heads, length),
        new(n_pairs, n_heads, length, d_v),
        new(n_pairs, n_heads, length),
        new(len(grad_z), n_pairs, n_heads, length),
    )
    settings = launch_settings(share, d, d_v, base_q.dtype, base_q.device)
    head_blocks = triton.cdiv(share, settings["BLOCK_HEADS"])
    grid = (triton.cdiv(length, settings["BLOCK_TOKENS"]), kv_heads * head_blocks, n_pairs)
    with device_of(base_q):
        _base_kernel[grid](
            base_q,
            base_k,
            base_v,
            grad_z,
            base_q if sinks is None else sinks.contiguous(),
            *tables,
            length,
            len(grad_z),
            share,
            head_blocks,
            d,
            d_v,
            *base_q.stride()[:3],
            *base_k.stride()[:3],
            *base_v.stride()[:3],
            *grad_z.stride()[:4],
            float(scale),
            float(softcap or 0.0),
            window or 0,
            HAS_CAP=softcap is not None,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            **settings,
        )
    return tables


# Grid (positions / BLOCK_TOKENS, kv_head * head_blocks, pair). Causal attention of the base run,
# with the tiles and the online softmax of `prefix_attention`: a program owns a block of positions
# and the query heads of one key head, or a block of these heads. It stores log-sum-exp and output,
# and the output's products with itself and with each metric's gradient, in fp32.
@jit
@no_type_check
def _base_kernel(
    base_q,
    base_k,
    base_v,
    grad_z,
    sinks,
    log_sum,
    z,
    square,
    along,
    length,
    n_metrics,
    share,
    head_blocks,
    d,
    d_v,
    q_pair,
    q_head,
    q_pos,
    k_pair,
    k_head,
    k_pos,
    v_pair,
    v_head,
    v_pos,
    g_metric,
    g_pair,
    g_head,
    g_pos,
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
    pair = tl.program_id(2).to(tl.int64)
    kv_heads = tl.num_programs(1) // head_blocks
    kv_head = (tl.program_id(1) // head_blocks).to(tl.int64)
    query = tl.arange(0, BLOCK_QUERIES)
    first = tl.program_id(0) * BLOCK_TOKENS
    position = first + query // BLOCK_HEADS
    head_in_share = (tl.program_id(1) % head_blocks) * BLOCK_HEADS + query % BLOCK_HEADS
    head = kv_head * share + head_in_share
    real = (query < BLOCK_TOKENS * BLOCK_HEADS) & (position < length) & (head_in_share < share)
    far = position.to(tl.int64)

    element = tl.arange(0, BLOCK_D)
    element_v = tl.arange(0, BLOCK_DV)
    in_d = element < d
    in_dv = element_v < d_v
    at = (pair * q_pair + far * q_pos + head * q_head)[:, None] + element[None, :]
    x = tl.load(base_q + at, mask=real[:, None] & in_d[None, :], other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    top = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_QUERIES,), tl.float32)
    if HAS_SINKS:
        top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32)
        mass += 1.0
    total = tl.zeros((BLOCK_QUERIES, BLOCK_DV), tl.float32)

    low = first * 0
    if HAS_WINDOW:
        low = tl.maximum(first - window + 1, 0)
    highest = tl.minimum(first + BLOCK_TOKENS, length)
    keys = base_k + pair * k_pair + kv_head * k_head
    values = base_v + pair * v_pair + kv_head * v_head
    for at_key in range(low, highest, BLOCK_KEYS):
        j = at_key + tl.arange(0, BLOCK_KEYS)
        there = j < highest
        far_key = j.to(tl.int64)
        key, value = load_keys(
            keys, values, far_key, there, k_pos, v_pos, d, d_v, BLOCK_D, BLOCK_DV, UPCAST
        )
        seen = real[:, None] & (j[None, :] <= position[:, None])
        if HAS_WINDOW:
            seen = seen & (position[:, None] - j[None, :] < window)
        top, mass, total = absorb(
            x, key, value, seen, top, mass, total, scale, cap, HAS_CAP, PRECISION
        )

    mass = tl.where(real, mass, 1.0)
    total = total / mass[:, None]
    place = (pair * kv_heads * share + head) * length + position
    tl.store(log_sum + place, top + tl.log(mass), mask=real)
    tl.store(square + place, tl.sum(total * total, 1), mask=real)
    tile = real[:, None] & in_dv[None, :]
    tl.store(z + (place * d_v)[:, None] + element_v[None, :], total, mask=tile)
    at = (pair * g_pair + far * g_pos + head * g_head)[:, None] + element_v[None, :]
    for metric in range(n_metrics):
        far_metric = tl.full((), metric, tl.int64)
        g = tl.load(grad_z + far_metric * g_metric + at, mask=tile, other=0.0).to(tl.float32)
        to = along + far_metric * tl.num_programs(2) * kv_heads * share * length + place
        tl.store(to, tl.sum(total * g, 1), mask=real)
