"""Prefix attention on the CPU beside concatenating prefix and suffix per row, in one process.

    python -m pytest benchmarks/bench_attention.py -q

64 rows continue one prompt of 192 tokens, each with 32 tokens of its own. The rivals get the same
tensors: `concatenated` copies the prefix to every row each call, as a patched batch does that has
its whole prompt in every row; `concatenated_before` has been given the copies.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import machine
from patchsweep_kernels.attention import Rows, prefix_attention
from torch import Tensor

ROWS, PREFIX, SUFFIX, D = 64, 192, 32, 64
HEADS = {"12/12": (12, 12), "9/3": (9, 3)}
# averages of values of order 1, summed in another order
TOLERANCE = 1e-5


class Inputs:
    """Random queries, keys and values; the same for every contender."""

    def __init__(self, n_heads: int, kv_heads: int) -> None:
        torch.manual_seed(0)
        n_tokens = ROWS * SUFFIX
        # as a model's projections leave them
        self.q = torch.randn(n_tokens, n_heads, D)
        self.k, self.v = (torch.randn(n_tokens, kv_heads, D) for _ in range(2))
        self.prefix_k, self.prefix_v = (torch.randn(1, kv_heads, PREFIX, D) for _ in range(2))
        self.mask = torch.ones(SUFFIX, PREFIX + SUFFIX, dtype=torch.bool).tril(PREFIX)
        self.keys = self.whole(self.prefix_k, self.k)
        self.values = self.whole(self.prefix_v, self.v)

    @staticmethod
    def whole(prefix: Tensor, own: Tensor) -> Tensor:
        """Prefix and own keys of every row: `[row, kv_head, pos, d]`."""
        own = own.view(ROWS, SUFFIX, -1, D).transpose(1, 2)
        return torch.cat([prefix.expand(ROWS, -1, -1, -1), own], 2)


def _patchsweep(x: Inputs) -> Tensor:
    # tables too are made anew, as for a new packed batch
    rows = Rows(
        torch.arange(0, ROWS * SUFFIX + 1, SUFFIX),
        torch.zeros(ROWS, dtype=torch.int64),
        torch.full((ROWS,), PREFIX),
    )
    return prefix_attention(x.q, x.k, x.v, x.prefix_k, x.prefix_v, rows, scale=D**-0.5)


def _sdpa(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    q = x.q.view(ROWS, SUFFIX, -1, D).transpose(1, 2)
    z = F.scaled_dot_product_attention(q, keys, values, attn_mask=x.mask, enable_gqa=True)
    return z.transpose(1, 2).reshape(x.q.shape)


def _eager(x: Inputs, keys: Tensor, values: Tensor) -> Tensor:
    """As the eager attention of transformers computes it, which a hooked model runs."""
    q = x.q.view(ROWS, SUFFIX, -1, D).transpose(1, 2)
    groups = q.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
    scores = q @ keys.transpose(2, 3) * D**-0.5
    z = scores.masked_fill(~x.mask, -torch.inf).softmax(-1) @ values
    return z.transpose(1, 2).reshape(x.q.shape)


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "patchsweep": _patchsweep,
    "concatenated": lambda x: _sdpa(x, x.whole(x.prefix_k, x.k), x.whole(x.prefix_v, x.v)),
    "concatenated_before": lambda x: _sdpa(x, x.keys, x.values),
    "concatenated_eager": lambda x: _eager(x, x.whole(x.prefix_k, x.k), x.whole(x.prefix_v, x.v)),
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("contender", CONTENDERS)
@torch.no_grad()
def bench_prefix_attention(benchmark, contender: str, heads: str) -> None:
    x = Inputs(*HEADS[heads])
    run = CONTENDERS[contender]
    difference = float((run(x) - _patchsweep(x)).abs().max())
    assert difference <= TOLERANCE, difference
    benchmark.pedantic(run, (x,), rounds=50, warmup_rounds=5)
    benchmark.extra_info.update(
        machine(), rows=ROWS, prefix=PREFIX, suffix=SUFFIX, largest_difference=difference
    )
