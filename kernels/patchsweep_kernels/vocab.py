"""Vocabulary reductions of final residuals, without a `[row, d_vocab]` tensor.

With logits a = logits(base) and b = logits(patched), Z = log sum exp, p = exp(a - Z_a):

    log_z            Z_a
    target_log_prob  a_t - Z_a
    vocab_kl         KL(base || patched) = sum_v p_v (a_v - b_v) - Z_a + Z_b
    total_variation  1/2 sum_v |exp(a_v - Z_a) - exp(b_v - Z_b)|

Each block of the vocabulary is processed in turn: its logits are computed, added to running sums,
and dropped. Z grows by log-sum-exp, and the sum weighted with p is rescaled whenever Z grows. The
total variation needs Z first: the kernel computes the logits twice, the CPU keeps some rows'.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchsweep_kernels.answer_logits import answer_logits
from patchsweep_kernels.checks import check_indices
from patchsweep_kernels.dispatch import (
    device_of,
    dot_settings,
    jit,
    next_power_of_2,
    tl,
    triton,
    use_triton,
)
from patchsweep_kernels.unembedding import Unembedding

# Bytes of one block of logits on the CPU, which fit its cache, and rows that share a block.
_BLOCK_BYTES = 4 * 2**20
_BLOCK_ROWS = 4096
# Bytes of logits that the CPU keeps for total variation; computing them twice would cost more.
_KEPT_BYTES = 64 * 2**20

# Programs that fill a large GPU; the vocabulary is divided into parts to reach that number.
_PROGRAMS = 512

# The kernel's reductions, as its argument WHAT.
_LOG_Z, _KL, _DISTANCE = 0, 1, 2


@torch.no_grad()
def log_z(final: Float[Tensor, "row d"], unembedding: Unembedding) -> Float[Tensor, " row"]:
    """Return the log of the sum of exp(logit) over the vocabulary, in nats, fp32 (fp64 for fp64).

    `final` is the residual after the last norm.

    Raises:
        ValueError: `final` does not fit the unembedding in device, dtype or size.
    """
    unembedding.check("final", final)
    if use_triton(final):
        return _triton(final, None, unembedding, _LOG_Z)[0]
    parts = [_reference_log_z(part, unembedding) for part in final.split(_BLOCK_ROWS)]
    return torch.cat(parts)


@torch.no_grad()
def target_log_prob(
    final: Float[Tensor, "row d"],
    unembedding: Unembedding,
    tokens: Int[Tensor, "row target"],
) -> Float[Tensor, "row target"]:
    """Return log-probabilities of `tokens[r]` after `final[r]`, in nats (at most 0), in fp32.

    Raises:
        ValueError: as `log_z` and `answer_logits`.
    """
    return answer_logits(final, unembedding, tokens) - log_z(final, unembedding)[:, None]


@torch.no_grad()
def vocab_kl(
    base: Float[Tensor, "base_row d"],
    patched: Float[Tensor, "row d"],
    unembedding: Unembedding,
    *,
    base_row: Int[Tensor, " row"] | None = None,
    checked: bool = False,
) -> Float[Tensor, " row"]:
    """Return KL(base || patched) over the next token, in nats, in fp32 (fp64 for fp64).

    Both are residuals after the last norm. Row r of `patched` is compared with row `base_row[r]` of
    `base`; without `base_row`, with row r. Checking `base_row` on a GPU waits for it, unless it is
    said to be `checked`. Rounding may give about -1e-6 where both agree.

    Raises:
        ValueError: devices, dtypes or shapes do not fit, or `base_row` is out of range.
    """
    base_row = _check_two(base, patched, unembedding, base_row, checked)
    if use_triton(patched):
        return _triton(patched, _rows_of(base, base_row), unembedding, _KL)[0]
    kl = [
        _reference_kl(*_base_part(base, base_row, part), patched[part], unembedding)
        for part in _parts(len(patched), _BLOCK_ROWS)
    ]
    return torch.cat(kl) if kl else patched.new_zeros(0)


@torch.no_grad()
def total_variation(
    base: Float[Tensor, "base_row d"],
    patched: Float[Tensor, "row d"],
    unembedding: Unembedding,
    *,
    base_row: Int[Tensor, " row"] | None = None,
    checked: bool = False,
) -> Float[Tensor, " row"]:
    """Return half the summed absolute difference of both distributions: 0 equal, 1 disjoint.

    Symmetric. Arguments and errors are those of `vocab_kl`.
    """
    base_row = _check_two(base, patched, unembedding, base_row, checked)
    if use_triton(patched):
        base_z, patched_z = log_z(base, unembedding), log_z(patched, unembedding)
        z = torch.stack((patched_z, _rows_of(base_z, base_row)))
        return _triton(patched, _rows_of(base, base_row), unembedding, _DISTANCE, z)[0]
    kept_rows = max(1, _KEPT_BYTES // (4 * unembedding.d_vocab))
    half = [
        _reference_distance(*_base_part(base, base_row, part), patched[part], unembedding)
        for part in _parts(len(patched), min(_BLOCK_ROWS, kept_rows))
    ]
    return torch.cat(half) if half else patched.new_zeros(0)


def _check_two(
    base: Tensor,
    patched: Tensor,
    unembedding: Unembedding,
    base_row: Tensor | None,
    checked: bool,
) -> Tensor | None:
    """Check the arguments of `vocab_kl`; return `base_row` on the device of `patched`.

    Raises:
        ValueError: devices, dtypes or shapes do not fit, or `base_row` is out of range.
    """
    unembedding.check("base", base)
    unembedding.check("patched", patched)
    if base_row is None:
        if len(base) != len(patched):
            raise ValueError(
                f"base has {len(base)} rows, patched {len(patched)}; give base_row to pair them"
            )
        return None
    if base_row.shape != (len(patched),):
        raise ValueError(f"base_row must have {len(patched)} entries, got {tuple(base_row.shape)}")
    if not checked:
        check_indices("base_row", base_row, len(base))
    return base_row.to(patched.device)


def _rows_of(base: Tensor, base_row: Tensor | None) -> Tensor:
    return base if base_row is None else base[base_row]


def _parts(n_rows: int, size: int) -> Iterator[slice]:
    for first in range(0, n_rows, size):
        yield slice(first, min(first + size, n_rows))


def _base_part(base: Tensor, base_row: Tensor | None, part: slice) -> tuple[Tensor, Tensor | None]:
    """Return the base rows that the rows of `part` need, each once, and the index for each row."""
    if base_row is None:
        return base[part], None
    needed, index = base_row[part].unique(return_inverse=True)
    return base[needed], index


def _blocks(n_rows: int, unembedding: Unembedding, *finals: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield logits `[row, block]` of each of `finals`, one block of the vocabulary at a time."""
    size = max(64, _BLOCK_BYTES // (4 * max(1, n_rows)))
    dtype = torch.promote_types(finals[0].dtype, torch.float32)
    finals = tuple(final.to(dtype) for final in finals)
    for first in range(0, unembedding.d_vocab, size):
        w_u = unembedding.w_u[first : first + size].to(dtype).T
        bias = None if unembedding.bias is None else unembedding.bias[first : first + size]
        yield tuple(unembedding.finish(final @ w_u, bias) for final in finals)


def _nothing_yet(final: Tensor, value: float) -> Tensor:
    """Return initial running sums `[row]`. They are fp64, since many blocks are added up."""
    return torch.full((len(final),), value, dtype=torch.float64, device=final.device)


def _reference_log_z(final: Tensor, unembedding: Unembedding) -> Tensor:
    z = _nothing_yet(final, -torch.inf)
    for (logits,) in _blocks(len(final), unembedding, final):
        z = torch.logaddexp(z, logits.logsumexp(1).double())
    return z.to(torch.promote_types(final.dtype, torch.float32))


def _reference_kl(
    base: Tensor, index: Tensor | None, patched: Tensor, unembedding: Unembedding
) -> Tensor:
    z_a, z_b = _nothing_yet(base, -torch.inf), _nothing_yet(patched, -torch.inf)
    weighted = _nothing_yet(patched, 0.0)
    for a, b in _blocks(len(patched), unembedding, base, patched):
        z_b = torch.logaddexp(z_b, b.logsumexp(1).double())
        before, z_a = z_a, torch.logaddexp(z_a, a.logsumexp(1).double())
        p = (a - z_a[:, None].to(a.dtype)).exp_()
        rescale = (before - z_a).exp()
        term = (_rows_of(a, index) - b).mul_(_rows_of(p, index)).sum(1)
        weighted = weighted * _rows_of(rescale, index) + term.double()
    kl = weighted - _rows_of(z_a, index) + z_b
    return kl.to(torch.promote_types(patched.dtype, torch.float32))


def _reference_distance(
    base: Tensor, index: Tensor | None, patched: Tensor, unembedding: Unembedding
) -> Tensor:
    z_a, z_b = _nothing_yet(base, -torch.inf), _nothing_yet(patched, -torch.inf)
    kept = []
    for a, b in _blocks(len(patched), unembedding, base, patched):
        z_a = torch.logaddexp(z_a, a.logsumexp(1).double())
        z_b = torch.logaddexp(z_b, b.logsumexp(1).double())
        kept.append((a, b))
    total = _nothing_yet(patched, 0.0)
    for a, b in kept:
        p = a.sub_(z_a[:, None].to(a.dtype)).exp_()
        q = b.sub_(z_b[:, None].to(b.dtype)).exp_()
        total += q.sub_(_rows_of(p, index)).abs_().sum(1).double()
    return (total / 2).to(torch.promote_types(patched.dtype, torch.float32))


def _triton(
    final: Tensor,
    base: Tensor | None,
    unembedding: Unembedding,
    what: int,
    z: Tensor | None = None,
) -> tuple[Tensor, ...]:
    n_rows, d = final.shape
    if not n_rows:
        return (torch.zeros(0, device=final.device),)
    settings = launch_settings(n_rows, d, final.dtype)
    n_blocks = triton.cdiv(n_rows, settings["BLOCK_ROWS"])
    n_vocab_blocks = triton.cdiv(unembedding.d_vocab, settings["BLOCK_VOCAB"])
    n_parts = min(n_vocab_blocks, triton.cdiv(_PROGRAMS, n_blocks))
    n_parts = triton.cdiv(n_vocab_blocks, triton.cdiv(n_vocab_blocks, n_parts))
    partial = torch.empty(3, n_parts, n_rows, dtype=torch.float32, device=final.device)
    with device_of(final):
        _vocab_kernel[(n_blocks, n_parts)](
            final,
            final if base is None else base,
            unembedding.w_u,
            final if unembedding.bias is None else unembedding.bias.contiguous(),
            final if z is None else z,
            partial,
            n_rows,
            unembedding.d_vocab,
            d,
            final.stride(0),
            final.stride(0) if base is None else base.stride(0),
            unembedding.w_u.stride(0),
            triton.cdiv(n_vocab_blocks, n_parts),
            float(unembedding.scale),
            float(unembedding.softcap or 0.0),
            WHAT=what,
            HAS_BIAS=unembedding.bias is not None,
            HAS_CAP=unembedding.softcap is not None,
            **settings,
        )
    z_b, z_a, weighted = partial.double()
    if what == _DISTANCE:
        return ((weighted.sum(0) / 2).float(),)
    total_b = z_b.logsumexp(0)
    if what == _LOG_Z:
        return (total_b.float(),)
    total_a = z_a.logsumexp(0)
    kl = (weighted * (z_a - total_a).exp()).sum(0) - total_a + total_b
    return (kl.float(),)


def launch_settings(n_rows: int, d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Return the kernel's tile sizes for `n_rows` rows of size `d`."""
    wide = dtype == torch.float32
    return {
        "BLOCK_ROWS": min(32 if wide else 64, max(16, next_power_of_2(n_rows))),
        "BLOCK_VOCAB": 64 if wide else 128,
        "BLOCK_D": min(32 if wide else 64, max(16, next_power_of_2(d))),
        "num_warps": 8,
        "num_stages": 2,
        **dot_settings(dtype),
    }


# Grid (rows / BLOCK_ROWS, parts of the vocabulary). A program owns a block of rows and one part.
# Per block of the vocabulary it computes the logits of `final` (and of `base`) in steps along d,
# accumulates in fp32, and adds them to one sum per row. At the end it writes
# `partial[:, part, row]`: Z of final, Z of base, and the weighted sum relative to Z of base.
@jit
@no_type_check
def _vocab_kernel(
    final,
    base,
    w_u,
    bias,
    z,
    partial,
    n_rows,
    d_vocab,
    d,
    stride_final,
    stride_base,
    stride_vocab,
    blocks_per_part,
    scale,
    cap,
    WHAT: tl.constexpr,  # 0 log_z of final; 1 KL(base || final); 2 total variation, reads z
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_VOCAB: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(1).to(tl.int64)
    real_row = row < n_rows
    z_a = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    z_b = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
    if WHAT == 2:
        z_b = tl.load(z + row, mask=real_row, other=0.0)
        z_a = tl.load(z + n_rows + row, mask=real_row, other=0.0)
    weighted = tl.zeros((BLOCK_ROWS,), tl.float32)
    for block in range(blocks_per_part):
        token = (part * blocks_per_part + block) * BLOCK_VOCAB + tl.arange(0, BLOCK_VOCAB)
        real = token < d_vocab
        a = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
        b = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), tl.float32)
        for first in range(0, d, BLOCK_D):
            element = first + tl.arange(0, BLOCK_D)
            inside = element < d
            columns = tl.load(
                w_u + (token * stride_vocab)[None, :] + element[:, None],
                mask=inside[:, None] & real[None, :],
                other=0.0,
            )
            at = real_row[:, None] & inside[None, :]
            x = tl.load(final + (row * stride_final)[:, None] + element, mask=at, other=0.0)
            if UPCAST:
                columns = columns.to(tl.float32)
                x = x.to(tl.float32)
            b = tl.dot(x, columns, b, input_precision=PRECISION)
            if WHAT > 0:
                y = tl.load(base + (row * stride_base)[:, None] + element, mask=at, other=0.0)
                if UPCAST:
                    y = y.to(tl.float32)
                a = tl.dot(y, columns, a, input_precision=PRECISION)
        if HAS_BIAS:
            shift = tl.load(bias + token, mask=real, other=0.0).to(tl.float32)
            a += shift[None, :]
            b += shift[None, :]
        a *= scale
        b *= scale
        if HAS_CAP:
            # tanh(y) = 2 * sigmoid(2y) - 1
            a = cap * (2.0 / (1.0 + tl.exp(-2.0 * a / cap)) - 1.0)
            b = cap * (2.0 / (1.0 + tl.exp(-2.0 * b / cap)) - 1.0)
        if WHAT == 2:
            gap = tl.abs(tl.exp(a - z_a[:, None]) - tl.exp(b - z_b[:, None]))
            weighted += tl.sum(tl.where(real[None, :], gap, 0.0), 1)
        else:
            # Every part holds at least one real token in its first block, so no Z stays -inf.
            top = tl.maximum(z_b, tl.max(tl.where(real[None, :], b, float("-inf")), 1))
            mass = tl.where(real[None, :], tl.exp(b - top[:, None]), 0.0)
            z_b = top + tl.log(tl.exp(z_b - top) + tl.sum(mass, 1))
            if WHAT == 1:
                top = tl.maximum(z_a, tl.max(tl.where(real[None, :], a, float("-inf")), 1))
                mass = tl.where(real[None, :], tl.exp(a - top[:, None]), 0.0)
                z_new = top + tl.log(tl.exp(z_a - top) + tl.sum(mass, 1))
                weighted = weighted * tl.exp(z_a - z_new)
                weighted += tl.sum(mass * (a - b), 1) * tl.exp(top - z_new)
                z_a = z_new
    slot = part * n_rows + row
    n_slots = tl.num_programs(1).to(tl.int64) * n_rows
    tl.store(partial + slot, z_b, mask=real_row)
    tl.store(partial + n_slots + slot, z_a, mask=real_row)
    tl.store(partial + 2 * n_slots + slot, weighted, mask=real_row)
