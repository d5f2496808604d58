"""Offsets stay right beyond 2^31 elements, where 32-bit products would wrap.

The storage is claimed, not filled: only the pages that are read or written take memory. Strides
stay below 2^31, so that Triton passes them as 32-bit integers.
"""

from __future__ import annotations

import naive
import pytest
import torch
from patchsweep_kernels import replaced_torch
from patchsweep_kernels.answer_logits import answer_logits
from patchsweep_kernels.attention import prefix_attention
from patchsweep_kernels.attention_change import attention_change
from patchsweep_kernels.attribution import attribution_dot
from patchsweep_kernels.replaced import replaced_attention
from patchsweep_kernels.scatter import scatter_patch
from patchsweep_kernels.tokens import Tokens
from patchsweep_kernels.unembedding import Unembedding
from patchsweep_kernels.vocab import log_z
from torch import Tensor

STRIDE = 2**30
ROWS = 4


@pytest.fixture(scope="module")
def storage() -> Tensor:
    return torch.empty(STRIDE * (ROWS - 1) + 4096, dtype=torch.float16)


def _far_apart(storage: Tensor, d: int, first: int) -> Tensor:
    """`[ROWS, d]` of random numbers, a quarter of 2^32 elements from row to row."""
    x = storage.as_strided((ROWS, d), (STRIDE, 1), first)
    return x.copy_(torch.randn(ROWS, d))


def test_scatter_reaches_far_rows(storage: Tensor) -> None:
    x, values = _far_apart(storage, 32, 0), _far_apart(storage, 32, 64)
    scatter_patch(x, values, torch.tensor([3, 1]), source=torch.tensor([2, 3]))
    assert torch.equal(x[3], values[2])
    assert torch.equal(x[1], values[3])


def test_scatter_reaches_far_heads(storage: Tensor) -> None:
    x = _far_apart(storage, 32, 0)
    values = torch.randn(1, 32).half()
    scatter_patch(x.unsqueeze(0), values, torch.tensor([0]), head=torch.tensor([3]))
    assert torch.equal(x[3], values[0])


def test_dot_reads_far_rows(storage: Tensor) -> None:
    source, base, grad = (_far_apart(storage, 32, 64 * i) for i in range(3))
    expected = ((source.double() - base.double()) * grad.double()).sum(-1)
    out = attribution_dot(source, base, grad)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)


def test_vocabulary_is_read_far_apart(storage: Tensor) -> None:
    unembedding = Unembedding(_far_apart(storage, 32, 0))
    final = _far_apart(storage, 32, 64)
    expected = naive.logits(final, unembedding)
    tokens = torch.tensor([[3], [2], [1], [0]])
    picked = answer_logits(final, unembedding, tokens).double()
    torch.testing.assert_close(picked, expected.gather(1, tokens), atol=2e-5, rtol=1e-5)
    sums = log_z(final, unembedding).double()
    torch.testing.assert_close(sums, expected.logsumexp(-1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("far", ["tokens", "prefix positions", "pairs"])
def test_attention_reads_far_apart(far: str, storage: Tensor) -> None:
    q, k, v = (torch.randn(ROWS, 1, 16).half() for _ in range(3))
    prefix_k, prefix_v = (torch.randn(ROWS, 1, ROWS, 16).half() for _ in range(2))
    apart = [_far_apart(storage, 16, 64 * i) for i in range(3)]
    if far == "tokens":
        q, k, v = (x.unsqueeze(1) for x in apart)
    elif far == "prefix positions":
        prefix_k, prefix_v = (x[None, None].expand(ROWS, -1, -1, -1) for x in apart[:2])
    else:
        prefix_k, prefix_v = (x[:, None, None].expand(-1, -1, ROWS, -1) for x in apart[:2])
    rows = naive.make_rows([2, 1, 1], [3, 1, 0], [4, 2, 3])
    out = prefix_attention(q, k, v, prefix_k, prefix_v, rows, scale=0.25)
    expected = naive.attention(q, k, v, prefix_k, prefix_v, rows, scale=0.25)
    torch.testing.assert_close(out.double(), expected, **naive.TOLERANCE[torch.float16])


@pytest.mark.parametrize("far", ["tokens", "positions", "pairs"])
def test_replaced_keys_are_read_far_apart(far: str, storage: Tensor) -> None:
    q, k, v = (torch.randn(ROWS, 1, 16).half() for _ in range(3))
    base_q, base_k, base_v = (torch.randn(ROWS, 1, ROWS, 16).half() for _ in range(3))
    grad = torch.randn(1, ROWS, 1, ROWS, 16).half()
    apart = [_far_apart(storage, 16, 64 * i) for i in range(4)]
    if far == "tokens":
        q, k, v = (x.unsqueeze(1) for x in apart[:3])
    elif far == "positions":
        base_q, base_k, base_v, grad = (x[None, None].expand(ROWS, -1, -1, -1) for x in apart)
    else:
        base_q, base_k, base_v, grad = (x[:, None, None].expand(-1, -1, ROWS, -1) for x in apart)
    grad = grad if grad.dim() == 5 else grad.unsqueeze(0)
    tokens = Tokens(torch.arange(ROWS), torch.tensor([0, 3, 1, 2]), torch.tensor([0, 1, 3, 3]))
    z = replaced_attention(q, tokens, k, v, tokens, base_k, base_v, scale=0.25)
    exact = [x.double() for x in (q, k, v, base_q, base_k, base_v, grad)]
    expected = replaced_torch.attend(
        exact[0], tokens, *exact[1:3], tokens, *exact[4:6], 0.25, None, None, None
    )
    torch.testing.assert_close(z.double(), expected, **naive.TOLERANCE[torch.float16])
    changed = attention_change(base_q, base_k, base_v, grad, k, v, tokens, ROWS, scale=0.25)
    expected = replaced_torch.change_of_output(
        *exact[3:], *exact[1:3], tokens, ROWS, 0.25, None, None, None
    )
    for found, wanted in zip(changed, expected, strict=True):
        # a bound's |v - z| is a root of rounding where z is v, as at position 0
        torch.testing.assert_close(found.double(), wanted, atol=2e-3, rtol=1e-5)
