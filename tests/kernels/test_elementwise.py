"""rms_norm, gated and rotate equal the model's own operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from naive import DTYPES, refused
from patchsweep_kernels import gate, rms_norm, rotary
from torch.nn import functional as F

# 16-bit results: half a unit in the last place, or a whole one where the interpreter cuts off
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
KINDS = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


def near(out: Any, expected: Any, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    bound = TOLERANCE[dtype]  # absolute too: far below 0 gelu is what is left of 1 + tanh
    torch.testing.assert_close(out, expected.to(dtype), rtol=bound, atol=2 * bound)


@KINDS
@pytest.mark.parametrize("shape", [(1, 1), (37, 63), (1, 5, 3, 128), (2, 3000), (0, 8)])
def test_rms_norm_of_llama_and_gemma(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = 3 * torch.randn(shape), torch.randn(shape[-1])
    x, weight = x.to(dtype), weight.to(dtype)
    wide = x.double()
    normed = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    near(rms_norm.rms_norm(x, weight, 1e-5), weight.double() * normed, dtype)
    gemma = rms_norm.rms_norm(x, weight, 1e-5, offset=1.0, rounds_first=False)
    near(gemma, (1 + weight.double()) * normed, dtype)


@KINDS
@pytest.mark.parametrize("shape", [(1, 1), (1, 5, 1123), (37, 63), (0, 8)])
def test_gate_of_two_products_or_halves_of_one(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    both = 4 * torch.randn(*shape[:-1], 2 * shape[-1])
    both[..., :1] = -200.0  # exp overflows
    left, right = both.to(dtype).chunk(2, dim=-1)
    wide = left.double()
    near(gate.gated(left, right, "silu"), F.silu(wide) * right.double(), dtype)
    expected = F.gelu(wide, approximate="tanh") * right.double()
    near(gate.gated(left.contiguous(), right, "gelu_tanh"), expected, dtype)


@KINDS
@pytest.mark.parametrize("rotated", [8, 14, 2])
@pytest.mark.parametrize("tables", [1, 3])
def test_rotary_of_whole_and_partial_heads(tables: int, rotated: int, dtype: torch.dtype) -> None:
    # views of packed products, [prompt, token, head, d], as models hand them on
    q, k = (torch.randn(3, 7, heads, 14).to(dtype).transpose(1, 2) for heads in (6, 2))
    angle = torch.randn(tables, 7, rotated)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def expected(x: torch.Tensor) -> torch.Tensor:
        x = x.double()
        c, s = cos.double().unsqueeze(1), sin.double().unsqueeze(1)
        first, second = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
        turned = torch.cat((-second, first), -1)
        return torch.cat((x[..., :rotated] * c + turned * s, x[..., rotated:]), -1)

    for out, x in zip(rotary.rotate(q, k, cos, sin), (q, k), strict=True):
        # sums of two rounded products
        assert out.dtype == dtype
        torch.testing.assert_close(
            out, expected(x).to(dtype), rtol=2 * TOLERANCE[dtype], atol=4 * TOLERANCE[dtype]
        )


def test_elementwise_refuses() -> None:
    x = torch.zeros(2, 3, 4, 8)
    table = torch.zeros(1, 4, 8)
    with refused("weight must have shape"):
        rms_norm.rms_norm(x, torch.zeros(7), 1e-5)
    with refused("up must have shape"):
        gate.gated(x, x[..., :4], "silu")
    with refused("activation must be one of"):
        gate.gated(x, x, "relu")  # type: ignore[arg-type]
    with refused("k must be .2, head, 4, 8"):
        rotary.rotate(x, x[:1], table, table)
    with refused("cos and sin must be"):
        rotary.rotate(x, x, table[..., :3], table[..., :3])
    with refused("cos and sin hold 3 prompts for 2"):
        rotary.rotate(x, x, table.expand(3, -1, -1), table.expand(3, -1, -1))
