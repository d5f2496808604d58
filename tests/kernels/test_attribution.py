"""attribution_dot sums (source - base) * grad over d in fp32."""

from __future__ import annotations

import naive
import pytest
import torch
from naive import DTYPES, refused
from patchsweep_kernels.attribution import attribution_dot


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("shape", [(1, 1), (37, 123), (5, 3, 63), (2, 3, 4, 256), (3, 2500)])
def test_dot_equals_fp64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    source, base, grad = (naive.padded(torch.randn(shape).to(dtype)) for _ in range(3))
    out = attribution_dot(source, base, grad)
    terms = (source.double() - base.double()) * grad.double()
    assert out.dtype == torch.float32
    # Inputs are exact and all is in fp32: the error is that of the sum, against the sum of sizes.
    bound = 1e-6 * terms.abs().sum(-1) + 1e-7
    assert ((out.double() - terms.sum(-1)).abs() <= bound).all()


def test_dot_keeps_small_differences_of_large_bf16_values() -> None:
    base = torch.full((3, 64), 256.0, dtype=torch.bfloat16)
    source = base.clone()
    source[1] += 2.0
    out = attribution_dot(source, base, torch.full_like(base, 1.0078125))
    assert out.tolist() == [0.0, 64 * 2 * 1.0078125, 0.0]


def test_dot_of_strided_inputs() -> None:
    source, base, grad = (torch.randn(3, 7, 40).transpose(0, 1) for _ in range(3))
    expected = ((source - base).double() * grad.double()).sum(-1)
    out = attribution_dot(source, base, grad)
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_dot_of_nothing(shape: tuple[int, ...]) -> None:
    x = torch.empty(shape)
    assert torch.equal(attribution_dot(x, x, x), torch.zeros(shape[:-1]))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("base has shape", {"base": torch.zeros(3, 7)}),
        ("grad has shape", {"grad": torch.zeros(8)}),
        ("grad is torch.bfloat16", {"grad": torch.zeros(3, 8, dtype=torch.bfloat16)}),
        ("base is on meta", {"base": torch.zeros(3, 8, device="meta")}),
        ("source must be of a floating", {"source": torch.zeros(3, 8, dtype=torch.int64)}),
    ],
)
def test_dot_refuses(message: str, arguments: dict[str, torch.Tensor]) -> None:
    given = {name: torch.zeros(3, 8) for name in ("source", "base", "grad")}
    with refused(message):
        attribution_dot(**given | arguments)
