"""The formulas, written out row by row in fp64: what references and kernels are held against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from patchsweep_kernels.attention import Rows
from patchsweep_kernels.unembedding import FinalNorm, Unembedding
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Inputs are exact in fp64 and sums are in fp32, so what is left is fp32 rounding of sums of some
# hundred terms of order 1 (a few 1e-6), and the rounding of an output that is stored in 16 bits:
# half a unit in the last place, 2^-9 of the value in bf16 and 2^-12 in fp16. The interpreter cuts
# bf16 off instead of rounding, which doubles that.
TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 2e-5, "rtol": 2**-7},
    torch.float16: {"atol": 2e-5, "rtol": 2**-11},
}


def make_rows(lengths: list[int], pair: list[int], start: list[int]) -> Rows:
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return Rows(offsets, torch.tensor(pair), torch.tensor(start))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    rows: Rows,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    q, k, v, prefix_k, prefix_v = (x.double() for x in (q, k, v, prefix_k, prefix_v))
    share = q.shape[1] // k.shape[1]
    out = q.new_empty(*q.shape[:2], v.shape[2])
    for row in range(len(rows.pair)):
        own = slice(int(rows.offsets[row]), int(rows.offsets[row + 1]))
        pair, start = int(rows.pair[row]), int(rows.start[row])
        heads = torch.arange(q.shape[1]) // share
        keys = torch.cat([prefix_k[pair, heads, :start], k[own, heads].transpose(0, 1)], 1)
        values = torch.cat([prefix_v[pair, heads, :start], v[own, heads].transpose(0, 1)], 1)
        score = q[own].transpose(0, 1) @ keys.transpose(1, 2) * scale
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        age = torch.arange(score.shape[1])[:, None] + start - torch.arange(score.shape[2])
        seen = age >= 0
        if window is not None:
            seen &= age < window
        score = score.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            sink = sinks.double()[:, None, None].expand(-1, score.shape[1], 1)
            score = torch.cat([score, sink], 2)
        weights = score.softmax(-1)[:, :, : keys.shape[1]]
        out[own] = (weights @ values).transpose(0, 1)
    return out


def normed(resid: Tensor, norm: FinalNorm | None) -> Tensor:
    x = resid.double()
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm.weight is not None:
        x = x * (norm.weight.double() + norm.offset)
    return x if norm.bias is None else x + norm.bias.double()


def logits(final: Tensor, unembedding: Unembedding) -> Tensor:
    out = final.double() @ unembedding.w_u.double().T
    if unembedding.bias is not None:
        out = out + unembedding.bias.double()
    out = out * unembedding.scale
    cap = unembedding.softcap
    return out if cap is None else cap * torch.tanh(out / cap)


def padded(x: Tensor, axis: int = 0) -> Tensor:
    """A view equal to `x` inside a larger tensor that is NaN everywhere else."""
    shape = list(x.shape)
    shape[axis] += 3
    store = torch.full(shape, torch.nan, dtype=x.dtype)
    view = store.narrow(axis, 1, x.shape[axis])
    view.copy_(x)
    return view


@contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a ValueError that matches `message`, from functions as a user calls them: without
    the checks of shapes and types that the tests switch on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=message):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
