"""How much attention's output changes, for tokens that do not run, when keys and values change.

Queries are the base run's. With its log-sum-exp L_t and its output z_t, and a over the replaced
positions of a row that position t sees,

    w = exp(scale * q_t . k_new[a] - L_t),    w0 = exp(scale * q_t . k_base[a] - L_t),
    Z = 1 + sum_a (w - w0),
    Z (z_new - z)_t = sum_a w (v_new[a] - v_base[a]) + (w - w0) (v_base[a] - z_t):

O(1) per replaced position and head. No vector of a change is made. Its product with a gradient g_t
needs g_t . v_new[a], g_t . v_base[a] and g_t . z_t; its norm is bounded by the triangle inequality
from |v_new[a] - v_base[a]| and |v_base[a] - z_t|.
"""

from __future__ import annotations

from typing import no_type_check

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels import replaced_torch
from patchsweep_kernels.attention import check_settings
from patchsweep_kernels.base_attention import BaseTables, base_tables
from patchsweep_kernels.checks import check_alike, check_shapes
from patchsweep_kernels.dispatch import device_of, dot_settings, jit, tl, triton, use_triton
from patchsweep_kernels.tokens import Tokens

# elements of the sums by key head that one launch leaves: 64 MB
_BUDGET = 1 << 24
# of the kernel of changes: the largest that spill almost no registers, by compiling them
_TILES = {
    "BLOCK_POS": 64,
    "BLOCK_ROWS": 16,
    "BLOCK_OWN": 16,
    "BLOCK_D": 16,
    "num_warps": 4,
    "num_stages": 1,
}


def attention_change(
    base_q: Float[Tensor, "pair head pos d"],
    base_k: Float[Tensor, "pair kv_head pos d"],
    base_v: Float[Tensor, "pair kv_head pos d_v"],
    grad_z: Float[Tensor, "metric pair head pos d_v"],
    k: Float[Tensor, "token kv_head d"],
    v: Float[Tensor, "token kv_head d_v"],
    replaced: Tokens,
    n_rows: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> tuple[Float[Tensor, "metric row pos"], Float[Tensor, "row pos"]]:
    """Return how the attention output of base queries changes with the replaced keys and values.

    The first result is the change times `grad_z`, summed over heads: to first order, the change of
    each metric. The second is an upper bound of the change's norm over all heads, relative to the
    output's. Both are 0 where a token sees no replaced position. fp32, or fp64 for fp64 inputs.
    Rows of `replaced` are 0 .. n_rows-1, which is not checked: that would wait for the device.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a head size is above 256.
    """
    n_pairs, n_heads, length, d = base_q.shape
    kv_heads, d_v = v.shape[1:]
    check_settings(base_q, n_heads, kv_heads, d, d_v, window, softcap, sinks)
    check_shapes(
        ("replaced.row", replaced.row, (len(k),)),
        ("k", k, (len(k), kv_heads, d)),
        ("v", v, (len(k), kv_heads, d_v)),
        ("base_k", base_k, (n_pairs, kv_heads, length, d)),
        ("base_v", base_v, (n_pairs, kv_heads, length, d_v)),
        ("grad_z", grad_z, (len(grad_z), n_pairs, n_heads, length, d_v)),
    )
    base = (("base_k", base_k), ("base_v", base_v))
    check_alike(("base_q", base_q), ("k", k), ("v", v), *base)
    compute = _triton if use_triton(base_q) else replaced_torch.change_of_output
    arguments = (base_q, base_k, base_v, grad_z, k, v, replaced, n_rows)
    return compute(*arguments, scale, window, softcap, sinks)


@torch.no_grad()
def _triton(
    base_q: Tensor,
    base_k: Tensor,
    base_v: Tensor,
    grad_z: Tensor,
    k: Tensor,
    v: Tensor,
    replaced: Tokens,
    n_rows: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    base_q, base_k, base_v, grad_z, k, v = (
        x if x.stride(-1) == 1 else x.contiguous() for x in (base_q, base_k, base_v, grad_z, k, v)
    )
    n_metrics, length, kv_heads = len(grad_z), base_q.shape[2], k.shape[1]
    if not n_rows:
        new = base_q.new_zeros(n_metrics + 1, 0, length, dtype=torch.float32)
        return new[:-1], new[-1]
    tables = base_tables(base_q, base_k, base_v, grad_z, scale, window, softcap, sinks)
    norm = tables.square.sum(1).sqrt_().clamp_(min=1e-30)
    row = torch.arange(n_rows + 1, device=k.device)
    offsets = torch.searchsorted(replaced.row.contiguous(), row)
    inputs = (base_q, base_k, base_v, grad_z, k, v, replaced, offsets, tables, norm)
    most = max(1, _BUDGET // (kv_heads * (n_metrics + 1) * length))
    parts = [
        _change(*inputs, first, min(most, n_rows - first), scale, window, softcap).sum(0)
        for first in range(0, n_rows, most)
    ]
    sums = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return sums[:-1], sums[-1].sqrt_()


def _change(
    base_q: Tensor,
    base_k: Tensor,
    base_v: Tensor,
    grad_z: Tensor,
    k: Tensor,
    v: Tensor,
    replaced: Tokens,
    offsets: Tensor,
    tables: BaseTables,
    norm: Tensor,
    first_row: int,
    n_rows: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return `[kv_head, metric + 1, row, pos]` of `n_rows` rows: effects, and squares of the bound.

    `offsets` holds the first token of each row; `norm` is that of z over all heads, `[pair, pos]`.
    """
    n_heads, length, d = base_q.shape[1:]
    kv_heads, d_v = v.shape[1:]
    n_metrics = len(grad_z)
    out = tables.z.new_empty(kv_heads, n_metrics + 1, n_rows, length)
    blocks = triton.cdiv(length, _TILES["BLOCK_POS"]) * triton.cdiv(n_rows, _TILES["BLOCK_ROWS"])
    with device_of(base_q):
        _change_kernel[(blocks, kv_heads, n_metrics)](
            base_q,
            base_k,
            base_v,
            grad_z,
            k,
            v,
            tables.log_sum,
            tables.z,
            tables.square,
            tables.along,
            norm,
            offsets,
            replaced.pos.contiguous(),
            replaced.pair.contiguous(),
            out,
            first_row,
            n_rows,
            length,
            len(base_q),
            n_heads // kv_heads,
            d,
            d_v,
            *base_q.stride()[:3],
            *base_k.stride()[:3],
            *base_v.stride()[:3],
            *grad_z.stride()[:4],
            *k.stride()[:2],
            *v.stride()[:2],
            float(scale),
            float(softcap or 0.0),
            window or 0,
            LARGEST=replaced_torch.LARGEST,
            HAS_CAP=softcap is not None,
            HAS_WINDOW=window is not None,
            PRECISION=dot_settings(torch.float32)["PRECISION"],
            **_TILES,
        )
    return out


@jit
@no_type_check
def _weight(product, log_sum, seen, scale, cap, LARGEST: tl.constexpr, HAS_CAP: tl.constexpr):
    """Return softmax weights for products of queries and keys, with the base run's log-sum-exp."""
    score = product * scale
    if HAS_CAP:
        # tanh(y) = 2 * sigmoid(2y) - 1
        score = cap * (2.0 / (1.0 + tl.exp(-2.0 * score / cap)) - 1.0)
    score = tl.minimum(score - log_sum[:, None], LARGEST)
    return tl.where(seen, tl.exp(score), 0.0)


# Grid (row blocks * position blocks, kv_head, metric). A program owns BLOCK_ROWS adjacent rows,
# BLOCK_POS positions and the query heads of one key head. For each pair of its rows and each query
# head it loops over the rows' replaced tokens, adjacent in `k` and `v`, and leaves out tiles that
# none of its positions sees. Products of the base run's queries, gradients and outputs with old and
# new keys and values are summed along d in tiles of BLOCK_D, which keeps registers free. What a
# token adds to Z, to the effect and to the bound is a tile [pos, token]; a product with
# [token, row], 1 where the token is of the row, sums it by row.
# Heads are summed in order, in fp32. Sums by key head are left in `out`: without atomics, results
# do not depend on the order in which programs run. Programs of metric 0 store the bound, which has
# no metric. A value that is not finite may spread to the block's other rows.
@jit
@no_type_check
def _change_kernel(
    base_q,
    base_k,
    base_v,
    grad_z,
    k,
    v,
    log_sum,
    z,
    square,
    along,
    norm,
    offsets,
    replaced_pos,
    replaced_pair,
    out,
    first_row,
    n_rows,
    length,
    n_pairs,
    share,
    d,
    d_v,
    q_pair,
    q_head,
    q_pos,
    bk_pair,
    bk_head,
    bk_pos,
    bv_pair,
    bv_head,
    bv_pos,
    g_metric,
    g_pair,
    g_head,
    g_pos,
    k_token,
    k_head,
    v_token,
    v_head,
    scale,
    cap,
    window,
    LARGEST: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK_POS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NONE: tl.constexpr = 1 << 62
    kv_head = tl.program_id(1).to(tl.int64)
    kv_heads = tl.num_programs(1)
    metric = tl.program_id(2).to(tl.int64)
    n_metrics = tl.num_programs(2)
    pos_blocks = tl.cdiv(length, BLOCK_POS)
    row = (tl.program_id(0) // pos_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there_row = row < n_rows
    t_first = (tl.program_id(0) % pos_blocks) * BLOCK_POS
    t = t_first + tl.arange(0, BLOCK_POS)
    there_t = t < length
    far = t.to(tl.int64)

    row_first = tl.load(offsets + first_row + row, mask=there_row, other=0)
    row_stop = tl.load(offsets + first_row + row + 1, mask=there_row, other=0)
    lowest = tl.min(tl.where(there_row, row_first, NONE), 0)
    n_own = (tl.max(row_stop, 0) - lowest).to(tl.int32)
    row_first = tl.where(there_row, row_first - lowest, 0).to(tl.int32)
    row_stop = tl.where(there_row, row_stop - lowest, 0).to(tl.int32)
    row_pair = tl.load(replaced_pair + lowest + row_first, mask=row_first < row_stop, other=NONE)

    element = tl.arange(0, BLOCK_D)
    step = tl.arange(0, BLOCK_OWN)
    effect = tl.zeros((BLOCK_POS, BLOCK_ROWS), tl.float32)
    size = tl.zeros((BLOCK_POS, BLOCK_ROWS), tl.float32)
    here = tl.min(row_pair, 0)
    while here < NONE:
        scale_of = tl.load(norm + here * length + far, mask=there_t, other=1.0)
        for head_in_share in range(share):
            head = kv_head * share + head_in_share
            queries = base_q + here * q_pair + head * q_head
            gradients = grad_z + metric * g_metric + here * g_pair + head * g_head
            place = (here * kv_heads * share + head) * length + far
            at_metric = metric * n_pairs * kv_heads * share * length
            along_z = tl.load(along + at_metric + place, mask=there_t, other=0.0)
            square_z = tl.load(square + place, mask=there_t, other=0.0)
            logs = tl.load(log_sum + place, mask=there_t, other=0.0)

            mass = tl.zeros((BLOCK_POS, BLOCK_ROWS), tl.float32)
            gain = tl.zeros((BLOCK_POS, BLOCK_ROWS), tl.float32)
            bound = tl.zeros((BLOCK_POS, BLOCK_ROWS), tl.float32)
            for at_own in range(0, n_own, BLOCK_OWN):
                own = at_own + step
                token = lowest + own
                of_pair = tl.load(replaced_pair + token, mask=own < n_own, other=-1) == here
                p = tl.load(replaced_pos + token, mask=of_pair, other=0)
                seen = of_pair[None, :] & (p[None, :] <= t[:, None])
                if HAS_WINDOW:
                    seen = seen & (t[:, None] - p[None, :] < window)
                if tl.max(tl.max(seen.to(tl.int32), 1), 0) > 0:
                    new = tl.zeros((BLOCK_POS, BLOCK_OWN), tl.float32)
                    old = tl.zeros((BLOCK_POS, BLOCK_OWN), tl.float32)
                    at_new = k + (token * k_token + kv_head * k_head)[None, :]
                    at_old = base_k + (here * bk_pair + kv_head * bk_head + p * bk_pos)[None, :]
                    for low in range(0, d, BLOCK_D):
                        e = low + element
                        mask = there_t[:, None] & (e < d)[None, :]
                        x = tl.load(queries + (far * q_pos)[:, None] + e[None, :], mask, 0.0)
                        x = x.to(tl.float32)
                        mask_k = (e < d)[:, None] & of_pair[None, :]
                        key = tl.load(at_new + e[:, None], mask_k, 0.0).to(tl.float32)
                        new = tl.dot(x, key, new, input_precision=PRECISION)
                        key = tl.load(at_old + e[:, None], mask_k, 0.0).to(tl.float32)
                        old = tl.dot(x, key, old, input_precision=PRECISION)
                    new = _weight(new, logs, seen, scale, cap, LARGEST, HAS_CAP)
                    gained = new - _weight(old, logs, seen, scale, cap, LARGEST, HAS_CAP)

                    added = tl.zeros((BLOCK_POS, BLOCK_OWN), tl.float32) - along_z[:, None]
                    changed = tl.zeros((BLOCK_POS, BLOCK_OWN), tl.float32)
                    inner = tl.zeros((BLOCK_POS, BLOCK_OWN), tl.float32)
                    square_v = tl.zeros((BLOCK_OWN,), tl.float32)
                    square_change = tl.zeros((BLOCK_OWN,), tl.float32)
                    at_new = v + (token * v_token + kv_head * v_head)[None, :]
                    at_old = base_v + (here * bv_pair + kv_head * bv_head + p * bv_pos)[None, :]
                    for low in range(0, d_v, BLOCK_D):
                        e = low + element
                        mask = there_t[:, None] & (e < d_v)[None, :]
                        g = tl.load(gradients + (far * g_pos)[:, None] + e[None, :], mask, 0.0)
                        g = g.to(tl.float32)
                        old_z = tl.load(z + (place * d_v)[:, None] + e[None, :], mask, 0.0)
                        mask_v = (e < d_v)[:, None] & of_pair[None, :]
                        value = tl.load(at_old + e[:, None], mask_v, 0.0).to(tl.float32)
                        added = tl.dot(g, value, added, input_precision=PRECISION)
                        inner = tl.dot(old_z, value, inner, input_precision=PRECISION)
                        square_v += tl.sum(value * value, 0)
                        value = tl.load(at_new + e[:, None], mask_v, 0.0).to(tl.float32) - value
                        changed = tl.dot(g, value, changed, input_precision=PRECISION)
                        square_change += tl.sum(value * value, 0)
                    added = gained * added + new * changed
                    # |v_base - z|
                    distance = square_v[None, :] + square_z[:, None] - 2.0 * inner
                    distance = tl.sqrt(tl.maximum(distance, 0.0))
                    most = new * tl.sqrt(square_change)[None, :] + tl.abs(gained) * distance

                    of_row = (own[:, None] >= row_first[None, :]) & (
                        own[:, None] < row_stop[None, :]
                    )
                    of_row = of_row.to(tl.float32)
                    mass = tl.dot(gained, of_row, mass, input_precision=PRECISION)
                    gain = tl.dot(added, of_row, gain, input_precision=PRECISION)
                    bound = tl.dot(most, of_row, bound, input_precision=PRECISION)
            mass = tl.maximum(mass + 1.0, 1e-6)
            effect += gain / mass
            bound = bound / mass / scale_of[:, None]
            size += bound * bound
        here = tl.min(tl.where(row_pair > here, row_pair, NONE), 0)

    # [kv_head, metric + 1, row, pos]
    tile = there_t[:, None] & there_row[None, :]
    slot = kv_head * (n_metrics + 1) * n_rows
    at = ((slot + metric * n_rows + row) * length)[None, :] + far[:, None]
    tl.store(out + at, effect, mask=tile)
    at = ((slot + n_metrics.to(tl.int64) * n_rows + row) * length)[None, :] + far[:, None]
    tl.store(out + at, size, mask=tile & (metric == 0))
