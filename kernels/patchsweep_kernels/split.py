"""Attention of few rows over a long prefix: programs share a prefix, and a merge adds them up.

Part p of the keys gives, for each query, the average of its values under its own softmax, and the
logarithm of its softmax's sum:

    lse_p = log sum_j exp(score_j),    out_p = sum_j exp(score_j - lse_p) v_j,

and the average over all keys is their sum with weights that add up to 1,

    out = sum_p exp(lse_p - lse) out_p,    lse = log sum_p exp(lse_p).

A part without a key that the query may see has lse_p = -inf and so weight 0. This is the split of
FlashDecoding (Dao et al., 2023).
"""

from __future__ import annotations

from typing import no_type_check

from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.dispatch import device_of, jit, next_power_of_2, processors_of, tl, triton

# Fewest keys of a part: some tiles, so that a part takes longer than its share of the merge. An
# assumption, not a measurement.
PART_KEYS = 256
_MERGE_ROWS = 8


def n_parts(n_programs: int, n_keys: int, q: Tensor) -> int:
    """Return into how many parts `n_keys` keys are split; 1 where programs fill the device of `q`.

    `n_programs`: of the launch without a split.
    """
    return max(1, min(processors_of(q.device) // max(1, n_programs), n_keys // PART_KEYS))


def merge(
    parts: Float[Tensor, "part token head d_v"],
    lse: Float[Tensor, "part token head"],
    out: Float[Tensor, "token head d_v"],
) -> None:
    """Write the average over all parts into `out`; `parts` and `lse` are contiguous and fp32."""
    n_tokens, n_heads, d_v = out.shape
    with device_of(out):
        _merge_kernel[(triton.cdiv(n_tokens * n_heads, _MERGE_ROWS),)](
            parts,
            lse,
            out,
            n_tokens * n_heads,
            len(parts),
            n_heads,
            d_v,
            *out.stride()[:2],
            BLOCK_ROWS=_MERGE_ROWS,
            BLOCK_DV=max(16, next_power_of_2(d_v)),
        )


# Grid (blocks of rows). A row is one head of one token; a program owns BLOCK_ROWS of them. It adds
# part after part to running sums, which it scales down whenever a part's lse exceeds all before.
@jit
@no_type_check
def _merge_kernel(
    parts,
    lse,
    out,
    n_rows,
    n_parts,
    n_heads,
    d_v,
    out_token,
    out_head,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    real = row < n_rows
    element = tl.arange(0, BLOCK_DV)
    mask = real[:, None] & (element < d_v)[None, :]
    top = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DV), tl.float32)
    at = row
    for _ in range(n_parts):
        size = tl.load(lse + at, mask=real, other=float("-inf"))
        part = tl.load(parts + (at * d_v)[:, None] + element[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, size)
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp(top - safe)
        weight = tl.exp(size - safe)
        total = total * shrink[:, None] + part * weight[:, None]
        mass = mass * shrink + weight
        top = new_top
        at += n_rows
    total = total / tl.where(real, mass, 1.0)[:, None]
    place = (row // n_heads * out_token + row % n_heads * out_head)[:, None] + element[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
