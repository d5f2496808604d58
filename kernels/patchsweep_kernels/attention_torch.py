"""Shared-prefix attention in plain torch, in two ways with the same result.

`in_groups` loops over groups of equal rows: few and large products, but about twenty torch
operations per group. `in_blocks` divides tokens into blocks of one shape, each with its own copy of
the keys it reads, and calls one fused attention: a few operations in total.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.rows import Rows

# Score elements that a group holds at once: 8 MB in fp32, about the size of caches. Fewer would
# fit caches better, but torch would start its threads more often, which is slow on a busy machine.
_SCORE_BUDGET = 1 << 21

# Key elements that blocks copy at once: 2 MB in fp32, and the same for values.
_KEY_BUDGET = 1 << 19
_COPIES_PER_GROUP = 180_000  # key elements whose copying costs as much as one group, see blocks_pay


@torch.no_grad()
def attend(
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
    """Compute `prefix_attention`; its arguments are checked already."""
    # fused attention supports neither soft-cap nor sinks
    if softcap is None and sinks is None and blocks_pay(rows, k.shape[1], k.shape[2], v.shape[2]):
        return in_blocks(q, k, v, prefix_k, prefix_v, rows, scale, window)
    return in_groups(q, k, v, prefix_k, prefix_v, rows, scale, window, softcap, sinks)


def blocks_pay(rows: Rows, kv_heads: int, d: int, d_v: int) -> bool:
    """Whether `in_blocks` is faster than `in_groups`, by an estimate of each one's extra work.

    `in_groups` repeats its operations for each group. `in_blocks` copies the keys and values of
    each block, and computes scores that it masks. On two cores a group costs as much as
    `_COPIES_PER_GROUP` copied key elements with the work that follows from them. Measured for rows
    sorted by start, this choice was within 15 % of the faster way: 1 to 1000 rows of 1 to 8 pairs,
    prompts of 13 to 250 tokens, 9/3, 14/2 and 12/12 heads of size 64. It assumes that a block reads
    a prompt's length of keys, so it is up to 30 % off where adjacent rows start far apart.
    """
    size = block_size(rows)
    copies = (rows.n_tokens // size + rows.n_pairs) * (rows.reach + size) * kv_heads * d
    return d == d_v and copies < (rows.n_groups - 1) * _COPIES_PER_GROUP


def block_size(rows: Rows) -> int:
    """Return the tokens per block, 24 to 39, chosen so that a block's keys fill a multiple of 16.

    Besides its own tokens, a block reads the prefix and the tokens that precede its first token in
    the same row: about as many keys as the last token of a row sees.
    """
    others = rows.reach + 2
    return -(-(others + 24) // 16) * 16 - others


def in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    rows: Rows,
    scale: float,
    window: int | None,
) -> Tensor:
    """Compute attention for blocks of adjacent tokens of any rows, by few fused attention calls.

    A value that is not finite may spread to the other tokens of its block.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    query, key, mask, place = rows.blocks(block_size(rows), window, q.device)
    n_blocks, n_keys = key.shape

    def table(prefix: Tensor, own: Tensor) -> Tensor:
        prefix = prefix[: rows.n_pairs, :, : rows.deepest].transpose(1, 2).flatten(0, 1)
        return torch.cat((prefix, own)).to(dtype)

    def by_block(x: Tensor, index: Tensor) -> Tensor:
        return x.index_select(0, index.flatten()).unflatten(0, (len(index), -1)).transpose(1, 2)

    q_all, k_all, v_all, mask = q.to(dtype), table(prefix_k, k), table(prefix_v, v), mask.to(dtype)
    step = max(1, _KEY_BUDGET // (n_keys * k_all[0].numel()))
    parts = [
        F.scaled_dot_product_attention(
            by_block(q_all, query[part : part + step]),
            by_block(k_all, key[part : part + step]),
            by_block(v_all, key[part : part + step]),
            attn_mask=mask[part : part + step],
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        ).transpose(1, 2)
        for part in range(0, n_blocks, step)
    ]
    z = (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(0, 1)
    z = z[: len(q)] if place is None else z.index_select(0, place)
    return z.to(q.dtype)


def in_groups(
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
    """Compute attention group by group.

    All rows of a group and the query heads of a key head form one query axis. So one matrix product
    covers the prefix, a second one the rows' own keys; one softmax covers both.
    """
    n_tokens, n_heads, d = q.shape
    kv_heads, d_v = v.shape[1:]
    share = n_heads // kv_heads  # query heads per key head
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty(n_tokens, kv_heads, share, d_v)
    out_kv, q_kv = out.transpose(0, 1), q.unflatten(1, (kv_heads, share)).transpose(0, 1)
    k_kv, v_kv = k.transpose(0, 1), v.transpose(0, 1)
    prefix_k, prefix_v = prefix_k.to(dtype).transpose(2, 3), prefix_v.to(dtype)
    unused = prefix_k.new_zeros(())  # baddbmm needs a summand even if beta is 0
    scratch = _Scratch(prefix_k)
    # Minus infinity where a key of the row comes later than the query.
    later = prefix_k.new_full((rows.longest, rows.longest), -torch.inf).triu_(1).unsqueeze(1)
    for token, group_rows, length, pair, start in rows.groups:
        near = window is None or start + length <= window  # every query sees all earlier positions
        hidden = later[:length, :, :length]
        if not near:
            hidden = _windowed(length, start, window or 0, later)
        # Prefix keys before `low` are outside the window of every query of the group.
        past = start if near else hidden.shape[2] - length
        low, n_keys = start - past, past + length
        # torch's softmax takes three times as long when its axis is no multiple of 16.
        width = -(-(n_keys + (sinks is not None)) // 16) * 16
        p_k, p_v = prefix_k[pair, :, :, low:start], prefix_v[pair, :, low:start]
        step = max(1, _SCORE_BUDGET // (n_heads * length * width))
        for row in range(0, group_rows, step):
            n_rows = min(step, group_rows - row)
            n, batch = n_rows * length, kv_heads * n_rows
            part = slice(token + row * length, token + row * length + n)
            q_part = scratch("q", kv_heads, n * share, d)
            q_part.view(kv_heads, n, share, d).copy_(q_kv[:, part])
            k_part = scratch("k", kv_heads, n, d).copy_(k_kv[:, part]).view(batch, length, d)
            v_part = scratch("v", kv_heads, n, d_v).copy_(v_kv[:, part]).view(batch, length, d_v)

            scores = scratch("scores", kv_heads, n * share, width)
            by_row = scores.view(batch, length, share, width)
            seen = scores[:, :, :past]
            torch.baddbmm(unused, q_part, p_k, beta=0, alpha=scale, out=seen)
            q_row = q_part.view(batch, length * share, d)
            own = torch.bmm(q_row, k_part.transpose(1, 2)).view(batch, length, share, length)
            if softcap is not None:
                seen.mul_(1 / softcap).tanh_().mul_(softcap)
                own.mul_(scale / softcap).tanh_().mul_(softcap / scale)
            torch.add(hidden[:, :, -length:], own, alpha=scale, out=by_row[..., past:n_keys])
            if not near:
                by_row[..., :past] += hidden[:, :, :past]
            if n_keys < width:
                scores[:, :, n_keys:] = -torch.inf
            if sinks is not None:
                by_head = scores.view(kv_heads, n, share, width)
                by_head[..., n_keys] = sinks.view(kv_heads, 1, share)
            torch.softmax(scores, -1, out=scores)
            result = scratch("out", kv_heads, n * share, d_v)
            torch.bmm(seen, p_v, out=result)
            own_weights = scores.view(batch, length * share, width)[:, :, past:n_keys]
            result.view(batch, length * share, d_v).baddbmm_(own_weights, v_part)
            out_kv[:, part] = result.view(kv_heads, n, share, d_v)
    return out.view(n_tokens, n_heads, d_v)


class _Scratch:
    """Memory that the parts reuse: fresh pages would cost as much as the matrix products."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._stores: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return an uninitialised tensor of `shape`; it overwrites the last one called `name`."""
        size = math.prod(shape)
        if name not in self._stores or len(self._stores[name]) < size:
            self._stores[name] = self._like.new_empty(size)
        return self._stores[name][:size].view(shape)


def _windowed(length: int, start: int, window: int, like: Tensor) -> Float[Tensor, "length 1 key"]:
    """Return an additive mask: 0 where a row's token sees a key, else minus infinity.

    Keys are those of the prefix, from the first that any token of the row sees, then the row's own.
    """
    low = min(start, max(0, start - window + 1))
    position = torch.arange(low, start + length, device=like.device)
    age = position[-length:, None] - position
    hidden = like.new_zeros(age.shape)
    return hidden.masked_fill_((age < 0) | (age >= window), -torch.inf).unsqueeze(1)
