"""Shared-prefix attention: packed rows read a common prefix and their own tokens.

For token i of a row that starts at position `start`,

    out_i = sum_j softmax_j(score_ij) v_j,    score_ij = scale * q_i . k_j,

where key j runs over positions 0 .. start-1 of the prefix of the row's pair, then over tokens
0 .. i of the row itself. The prefix is stored once per pair; no row holds a copy of it.
"""

from __future__ import annotations

from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels import attention_torch, split
from patchsweep_kernels.checks import check_alike, check_shapes
from patchsweep_kernels.dispatch import (
    capability_of,
    device_of,
    dot_settings,
    jit,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)
from patchsweep_kernels.rows import Group, Rows

__all__ = ["Group", "Rows", "prefix_attention"]


def prefix_attention(
    q: Float[Tensor, "token head d"],
    k: Float[Tensor, "token kv_head d"],
    v: Float[Tensor, "token kv_head d_v"],
    prefix_k: Float[Tensor, "pair kv_head pos d"],
    prefix_v: Float[Tensor, "pair kv_head pos d_v"],
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "token head d_v"]:
    """Return the attention output of every packed token, in the dtype of `q`, without gradient.

    Token i of row r stands at position `start[r] + i` and sees prefix positions 0 .. start[r]-1 of
    its pair and tokens 0 .. i of its row. Head h reads key head `h // (head / kv_head)`. Scores,
    softmax and sums are in fp32 (fp64 for fp64 inputs). `q`, `k` and `v` may be strided views.

    `window`: a query sees at most that many keys, itself included (Hugging Face's
    `sliding_window`). `softcap`: scores become `softcap * tanh(score / softcap)`. `sinks`: one
    logit per head that joins the softmax and has value 0 (gpt-oss).

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a head size is above 256, or `rows` reach
            past the tokens or the prefix.
    """
    n_tokens, n_heads, d = q.shape
    kv_heads, d_v = v.shape[1:]
    if n_tokens != rows.n_tokens:
        raise ValueError(f"rows.offsets ends at {rows.n_tokens}, but q has {n_tokens} tokens")
    n_pairs, _, n_pos, _ = prefix_k.shape
    check_settings(q, n_heads, kv_heads, d, d_v, window, softcap, sinks)
    check_shapes(
        ("k", k, (n_tokens, kv_heads, d)),
        ("v", v, (n_tokens, kv_heads, d_v)),
        ("prefix_k", prefix_k, (n_pairs, kv_heads, n_pos, d)),
        ("prefix_v", prefix_v, (n_pairs, kv_heads, n_pos, d_v)),
    )
    check_alike(("q", q), ("k", k), ("v", v), ("prefix_k", prefix_k), ("prefix_v", prefix_v))
    if rows.n_pairs > n_pairs:
        raise ValueError(f"rows.pair goes up to {rows.n_pairs - 1}, prefix_k has {n_pairs} pairs")
    if rows.deepest > n_pos:
        raise ValueError(f"rows.start goes up to {rows.deepest}, prefix_k has {n_pos} positions")
    if window is not None and rows.deepest + rows.longest <= window:
        window = None
    compute = _triton if use_triton(q) else attention_torch.attend
    return compute(q, k, v, prefix_k, prefix_v, rows, scale, window, softcap, sinks)


def check_settings(
    q: Tensor,
    n_heads: int,
    kv_heads: int,
    d: int,
    d_v: int,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Raise a ValueError if attention of `q` cannot have these heads or settings."""
    if n_heads % kv_heads:
        raise ValueError(f"q has {n_heads} heads, which is no multiple of the {kv_heads} of v")
    if max(d, d_v) > 256:
        raise ValueError(f"head sizes go up to 256, q has {d} and v has {d_v}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if sinks is not None:
        check_shapes(("sinks", sinks, (n_heads,)))
        if sinks.device != q.device:
            raise ValueError(f"sinks is on {sinks.device}, q on {q.device}")


@torch.no_grad()
def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    rows: Rows,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    q, k, v, prefix_k, prefix_v = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v, prefix_k, prefix_v)
    )
    n_tokens, n_heads, d = q.shape
    kv_heads, d_v = v.shape[1:]
    out = torch.empty(n_tokens, n_heads, d_v, dtype=q.dtype, device=q.device)
    share = n_heads // kv_heads
    settings = launch_settings(share, d, d_v, q.dtype, q.device)
    blocks = rows.block_table(settings["BLOCK_TOKENS"], q.device)
    head_blocks = triton.cdiv(share, settings["BLOCK_HEADS"])
    grid = (len(blocks), kv_heads * head_blocks)
    n_keys = rows.deepest if window is None else min(rows.deepest, window)
    n_parts = split.n_parts(grid[0] * grid[1], n_keys, q)
    target = lse = out
    if n_parts > 1:
        lse = out.new_empty(n_parts, n_tokens, n_heads, dtype=torch.float32)
        target = lse.new_empty(*lse.shape, d_v)
    with device_of(q):
        _prefix_kernel[(*grid, n_parts)](
            q,
            k,
            v,
            prefix_k,
            prefix_v,
            q if sinks is None else sinks.contiguous(),
            target,
            lse,
            blocks,
            rows.token_table(q.device),
            n_tokens,
            n_parts,
            share,
            head_blocks,
            d,
            d_v,
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *prefix_k.stride()[:3],
            *prefix_v.stride()[:3],
            *target.stride()[-3:-1],
            n_heads,
            float(scale),
            float(softcap or 0.0),
            window or 0,
            HAS_CAP=softcap is not None,
            HAS_WINDOW=window is not None,
            HAS_SINKS=sinks is not None,
            SPLIT=n_parts > 1,
            **settings,
        )
    if n_parts > 1:
        split.merge(target, lse, out)
    return out


def block_tokens(share: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device) -> int:
    """Return the `size` of the `Rows.block_table` that the kernel reads for such heads."""
    size: int = launch_settings(share, d, d_v, dtype, device)["BLOCK_TOKENS"]
    return size


def launch_settings(
    share: int, d: int, d_v: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Return the kernel's tile sizes for `share` query heads per key head and these head sizes.

    Query i of a tile is head `i % share` of token `i // share`, so no query is lost but those after
    the tile's last whole token.
    """
    width = max(16, next_power_of_2(max(d, d_v)))
    queries, keys, warps, stages = _tile(width, dtype, capability_of(device))
    heads = min(queries, share)
    return {
        "BLOCK_TOKENS": queries // heads,
        "BLOCK_HEADS": heads,
        "BLOCK_QUERIES": queries,
        "BLOCK_KEYS": keys,
        "BLOCK_D": max(16, next_power_of_2(d)),
        "BLOCK_DV": max(16, next_power_of_2(d_v)),
        "num_warps": warps,
        "num_stages": stages,
        **dot_settings(dtype),
    }


def _tile(width: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return queries, keys, warps and stages for heads of `width`, a power of two.

    The largest tiles whose sums stay in registers, by compiling them: docs/design/kernels.md.
    """
    if dtype == torch.float32:
        queries, keys = (32, 32) if width <= 64 else (16, 32)
        return queries, keys, 4, 1 if width == 256 else 2
    # On these a warp group multiplies 64 queries at once; smaller tiles take the slower
    # instructions. Others have less shared memory.
    if capability[0] in (9, 10):
        return (128, 64, 8, 3) if width <= 128 else (64, 32, 8, 2)
    if width <= 64:
        return 64, 64, 4, 2
    return (64, 32, 4, 2) if width == 128 else (32, 32, 8, 2)


@jit
@no_type_check
def load_keys(
    keys,
    values,
    at,
    there,
    stride_k,
    stride_v,
    d,
    d_v,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the keys [d, j] and values [j, d_v] of places `at` (int64), 0 where not `there`."""
    element = tl.arange(0, BLOCK_D)
    element_v = tl.arange(0, BLOCK_DV)
    mask_k = (element < d)[:, None] & there[None, :]
    key = tl.load(keys + (at * stride_k)[None, :] + element[:, None], mask=mask_k, other=0.0)
    mask_v = there[:, None] & (element_v < d_v)[None, :]
    value = tl.load(values + (at * stride_v)[:, None] + element_v[None, :], mask=mask_v, other=0.0)
    if UPCAST:
        key = key.to(tl.float32)
        value = value.to(tl.float32)
    return key, value


@jit
@no_type_check
def absorb(
    query,
    key,
    value,
    seen,
    top,
    mass,
    total,
    scale,
    cap,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """Return the online softmax's running sums after adding `key` [d, j] and `value` [j, d_v].

    `seen` is read if `MASKED`; else every query sees every key.
    """
    score = tl.dot(query, key, input_precision=PRECISION) * scale
    if HAS_CAP:
        # tanh(y) = 2 * sigmoid(2y) - 1
        score = cap * (2.0 / (1.0 + tl.exp(-2.0 * score / cap)) - 1.0)
    if MASKED:
        score = tl.where(seen, score, float("-inf"))
    new_top = tl.maximum(top, tl.max(score, 1))
    safe = new_top
    if MASKED:
        # A query that has seen no key yet has top -inf; -inf minus -inf would be NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp(score - safe[:, None])
    shrink = tl.exp(top - safe)
    total = total * shrink[:, None]
    total = tl.dot(weight.to(value.dtype), value, total, input_precision=PRECISION)
    return new_top, mass * shrink + tl.sum(weight, 1), total


# Grid (blocks, kv_head * head_blocks, parts). A program owns a block of adjacent packed tokens of
# one pair and the query heads of one key head, or a block of these heads if one tile cannot hold
# them all. Its query axis is token by head, so each key that it loads serves all of them.
# It loops over the pair's prefix up to the highest start in the block, then over the packed keys
# from the block's first row to its last token. Whole tiles below the lowest start need no mask
# where there is no window. Elsewhere it masks keys that a query may not see: prefix positions from
# its own start on, other rows, later tokens, keys outside the window. Running
# maximum, sum and output are fp32. A value that is not finite may spread to the block's other
# tokens, where its weight is 0. If SPLIT, a program owns a part of the block's prefix, the last one
# the packed keys too, and writes what `split` merges.
@jit
@no_type_check
def _prefix_kernel(
    q,
    k,
    v,
    prefix_k,
    prefix_v,
    sinks,
    out,
    lse,
    blocks,
    tokens,
    n_tokens,
    n_parts,
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
    pk_pair,
    pk_head,
    pk_pos,
    pv_pair,
    pv_head,
    pv_pos,
    out_token,
    out_head,
    n_heads,
    scale,
    cap,
    window,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = blocks + tl.program_id(0).to(tl.int64) * 6
    kv_head = (tl.program_id(1) // head_blocks).to(tl.int64)
    first = tl.load(block)
    stop = tl.load(block + 1)
    pair = tl.load(block + 2)
    own_first = tl.load(block + 3)
    lowest = tl.load(block + 4)
    highest = tl.load(block + 5)

    query = tl.arange(0, BLOCK_QUERIES)
    token = first + query // BLOCK_HEADS
    head_in_share = (tl.program_id(1) % head_blocks) * BLOCK_HEADS + query % BLOCK_HEADS
    head = kv_head * share + head_in_share
    real = (token < stop) & (head_in_share < share)
    row_first = tl.load(tokens + token, mask=real, other=0)
    start = tl.load(tokens + n_tokens + token, mask=real, other=0)
    position = start + token - row_first

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
        if SPLIT:  # of the first part
            top = tl.where(tl.program_id(2) == 0, top, float("-inf"))
            mass = tl.where(tl.program_id(2) == 0, mass, 0.0)
    total = tl.zeros((BLOCK_QUERIES, BLOCK_DV), tl.float32)

    low = lowest * 0
    if HAS_WINDOW:
        low = tl.maximum(lowest - window + 1, 0)
    if SPLIT:
        part = tl.program_id(2)
        n_tiles = tl.cdiv(highest - low, BLOCK_KEYS)
        n_keys = tl.cdiv(n_tiles, n_parts) * BLOCK_KEYS
        low += part * n_keys
        highest = tl.minimum(highest, low + n_keys)
        # the last part has the fewest keys of the prefix
        own_first = tl.where(part == n_parts - 1, own_first, stop)
    keys = prefix_k + pair * pk_pair + kv_head * pk_head
    values = prefix_v + pair * pv_pair + kv_head * pv_head
    everyone = low
    if not HAS_WINDOW:
        everyone = lowest // BLOCK_KEYS * BLOCK_KEYS
        if SPLIT:
            everyone = tl.maximum(low, tl.minimum(everyone, highest))
        for at_key in range(low, everyone, BLOCK_KEYS):
            j = at_key + tl.arange(0, BLOCK_KEYS).to(tl.int64)
            there = j >= 0
            key, value = load_keys(
                keys, values, j, there, pk_pos, pv_pos, d, d_v, BLOCK_D, BLOCK_DV, UPCAST
            )
            top, mass, total = absorb(
                x, key, value, there, top, mass, total, scale, cap, HAS_CAP, PRECISION, False
            )
    for at_key in range(everyone, highest, BLOCK_KEYS):
        j = at_key + tl.arange(0, BLOCK_KEYS).to(tl.int64)
        there = j < highest
        key, value = load_keys(
            keys, values, j, there, pk_pos, pv_pos, d, d_v, BLOCK_D, BLOCK_DV, UPCAST
        )
        seen = j[None, :] < start[:, None]
        if HAS_WINDOW:
            seen = seen & (position[:, None] - j[None, :] < window)
        top, mass, total = absorb(
            x, key, value, seen, top, mass, total, scale, cap, HAS_CAP, PRECISION
        )

    keys = k + kv_head * k_head
    values = v + kv_head * v_head
    for at_key in range(own_first, stop, BLOCK_KEYS):
        j = at_key + tl.arange(0, BLOCK_KEYS).to(tl.int64)
        there = j < stop
        key, value = load_keys(
            keys, values, j, there, k_token, v_token, d, d_v, BLOCK_D, BLOCK_DV, UPCAST
        )
        seen = (j[None, :] >= row_first[:, None]) & (j[None, :] <= token[:, None])
        if HAS_WINDOW:
            seen = seen & (token[:, None] - j[None, :] < window)
        top, mass, total = absorb(
            x, key, value, seen, top, mass, total, scale, cap, HAS_CAP, PRECISION
        )

    at = (token * out_token + head * out_head)[:, None] + element_v[None, :]
    mask = real[:, None] & in_dv[None, :]
    if SPLIT:
        part = tl.program_id(2).to(tl.int64)
        seen_any = mass > 0.0
        size = tl.where(seen_any, top + tl.log(tl.where(seen_any, mass, 1.0)), float("-inf"))
        tl.store(lse + part * n_tokens * n_heads + token * n_heads + head, size, mask=real)
        total = total / tl.where(seen_any, mass, 1.0)[:, None]
        tl.store(out + part * n_tokens * out_token + at, total, mask=mask)
    else:
        # Every real query saw itself, so its mass is positive; padding queries are not stored.
        total = total / tl.where(real, mass, 1.0)[:, None]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
