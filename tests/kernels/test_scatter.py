"""scatter_patch writes exactly the targets it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive import DTYPES, refused
from patchsweep_kernels.scatter import Targets, scatter_patch, scatter_targets
from torch import Tensor


def _targets(n: int, n_heads: int, n_cells: int) -> tuple[Tensor, Tensor, Tensor]:
    """About half of the vectors of `[n, n_heads]`, and a cell for each."""
    flat = torch.randperm(n * n_heads)[: (n * n_heads + 1) // 2]
    return flat // n_heads, flat % n_heads, torch.randint(0, n_cells, flat.shape)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("mode", ["set", "add"])
@pytest.mark.parametrize(("n", "n_heads", "d"), [(1, 1, 1), (37, 3, 63), (37, 2, 123), (5, 7, 256)])
def test_scatter_writes_heads(n: int, n_heads: int, d: int, mode: str, dtype: torch.dtype) -> None:
    x = torch.randn(n, n_heads, d).to(dtype)
    values = torch.randn(4, d).to(dtype)
    token, head, source = _targets(n, n_heads, 4)
    expected = x.clone()
    for t, h, s in zip(token.tolist(), head.tolist(), source.tolist(), strict=True):
        expected[t, h] = values[s] + (expected[t, h] if mode == "add" else 0)
    scatter_patch(x, values, token, source=source, head=head, mode=mode)  # type: ignore[arg-type]
    # Sums of two 16-bit numbers in fp32 are stored rounded once, or cut off by the interpreter.
    rtol = 2.0**-7 if mode == "add" and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(x, expected, rtol=rtol, atol=0.0)


@pytest.mark.parametrize("shape", [(37, 123), (37, 3, 41), (3, 1, 1), (6, 1500)])
def test_scatter_writes_whole_tokens(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    token = torch.randperm(shape[0])[: (shape[0] + 1) // 2]
    values = torch.randn(len(token), *shape[1:])
    expected = x.clone()
    expected[token] = values
    scatter_patch(x, values, token)
    assert torch.equal(x, expected)


def test_scatter_takes_columns_of_a_table() -> None:
    table = torch.tensor([[3, 1, 0], [0, 2, 1], [5, 0, 0]])  # token, head, source
    x, values = torch.zeros(6, 3, 8), torch.randn(2, 8)
    scatter_patch(x, values, table[:, 0], head=table[:, 1], source=table[:, 2])
    expected = torch.zeros(6, 3, 8)
    for token, head, source in table.tolist():
        expected[token, head] = values[source]
    assert torch.equal(x, expected)


def test_scatter_leaves_other_vectors_alone_even_if_not_finite() -> None:
    store = torch.full((9, 4, 65), torch.nan)
    x = store[1:8, :, 1:64]  # a strided view with NaN all around
    scatter_patch(
        x,
        torch.ones(1, 63),
        torch.tensor([2, 5]),
        source=torch.tensor([0, 0]),
        head=torch.tensor([3, 0]),
    )
    expected = torch.full_like(store, torch.nan)
    expected[3, 3, 1:64] = 1.0
    expected[6, 0, 1:64] = 1.0
    torch.testing.assert_close(store, expected, rtol=0.0, atol=0.0, equal_nan=True)


def test_scatter_of_nothing_changes_nothing() -> None:
    x = torch.randn(3, 5)
    before = x.clone()
    none = torch.empty(0, dtype=torch.int64)
    scatter_patch(x, torch.empty(0, 5), none)
    assert torch.equal(x, before)


_X, _VALUES, _TOKEN = torch.zeros(4, 3, 8), torch.zeros(2, 8), torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("token holds 4", {"token": torch.tensor([0, 4])}),
        ("token holds -1", {"token": torch.tensor([0, -1])}),
        ("token must be int64", {"token": torch.tensor([0, 1], dtype=torch.int32)}),
        ("source holds 2", {"source": torch.tensor([0, 2])}),
        ("source must have 2", {"source": torch.tensor([0])}),
        ("head holds 3", {"head": torch.tensor([0, 3])}),
        ("same vector of x twice", {"token": torch.tensor([1, 1]), "head": torch.tensor([2, 2])}),
        ("values is torch.float16", {"values": _VALUES.half()}),
        ("values is on meta", {"values": _VALUES.to("meta")}),
        ("values has vectors of 7", {"values": torch.zeros(2, 7)}),
        ("x must be contiguous along d", {"x": torch.zeros(4, 8, 3).transpose(1, 2)}),
        ("mode must be", {"mode": "multiply"}),
        ("values has 3 cells", {"values": torch.zeros(3, 8)}),
        ("x must be of a floating", {"x": _X.long()}),
    ],
)
def test_scatter_refuses(message: str, arguments: dict[str, Any]) -> None:
    given = {"x": _X, "values": _VALUES, "token": _TOKEN, "head": torch.tensor([0, 1])} | arguments
    with refused(message):
        scatter_patch(**given)


def test_scatter_refuses_whole_tokens_that_are_not_contiguous() -> None:
    x = torch.zeros(4, 8, 3).transpose(1, 2)
    with refused("x must be contiguous in all axes after the first"):
        scatter_patch(x, torch.zeros(2, 3, 8), _TOKEN)


def test_checked_targets_are_written_and_held_against_what_they_reach() -> None:
    x, values = torch.zeros(4, 3, 8), torch.randn(2, 8)
    token, source, head = torch.tensor([[0, 3], [1, 0], [2, 2]])
    targets = Targets.of(token, source, head)
    scatter_targets(x, values, targets)
    assert torch.equal(x[0, 2], values[1])
    assert torch.equal(x[3, 2], values[0])
    assert x.count_nonzero() == 16
    for smaller, message in (
        ((x[:3], values), "token holds 3, outside 0..2"),
        ((x, values[:1]), "source holds 1, outside 0..0"),
        ((x[:, :2], values), "head holds 2, outside 0..1"),
    ):
        with refused(message):
            scatter_targets(*smaller, targets)
