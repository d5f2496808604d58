"""fp32 is fp32, whatever the process has set for its own products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.models.arithmetic import full_arithmetic
from subjects import demo_pairs, model

NAME = "tiny:llama"
CUDA, ONEDNN = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


def _set_by_new_names() -> None:
    CUDA.fp32_precision, ONEDNN.fp32_precision = "tf32", "bf16"


LOOSE: dict[str, Callable[[], None]] = {
    "set_float32_matmul_precision": lambda: torch.set_float32_matmul_precision("medium"),
    "fp32_precision": _set_by_new_names,
    "default_dtype": lambda: torch.set_default_dtype(torch.bfloat16),
}


@pytest.fixture(params=LOOSE)
def loose(request: pytest.FixtureRequest) -> Iterator[None]:
    """A process that has told torch to be quick."""
    before = CUDA.fp32_precision, ONEDNN.fp32_precision
    LOOSE[request.param]()
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision, ONEDNN.fp32_precision = before


def test_settings_are_strict_inside_and_restored_behind(loose: None) -> None:
    before = CUDA.fp32_precision, ONEDNN.fp32_precision, torch.get_default_dtype()
    with full_arithmetic(), full_arithmetic():
        assert (CUDA.fp32_precision, ONEDNN.fp32_precision) == ("ieee", "ieee")
        assert torch.get_default_dtype() == torch.float32
        assert not CUDA.allow_bf16_reduced_precision_reduction
    assert (CUDA.fp32_precision, ONEDNN.fp32_precision, torch.get_default_dtype()) == before
    assert CUDA.allow_bf16_reduced_precision_reduction


def test_settings_are_restored_behind_an_error() -> None:
    with pytest.raises(ZeroDivisionError), full_arithmetic():
        raise ZeroDivisionError
    assert CUDA.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_a_sweep_in_a_loose_process_gives_the_same_values(loose: None, runner: str) -> None:
    # where the CPU multiplies in bf16, the values are off by 0.03 without the guard
    arguments = {"layers": [1], "runner": runner, "method": ["exact", "atp"]}
    found = ps.sweep(model(NAME), demo_pairs(NAME), "z", **arguments)
    with full_arithmetic():
        expected = ps.sweep(model(NAME), demo_pairs(NAME), "z", **arguments)
    for name in ("z", "z_atp", "base_metric"):
        np.testing.assert_array_equal(found[name], expected[name])


def test_provenance_says_how_products_were_made() -> None:
    ds = ps.sweep(model(NAME), demo_pairs(NAME), "z", layers=[1], positions=[9])
    provenance = ps.summary.provenance(ds) if hasattr(ps.summary, "provenance") else ds.attrs
    assert provenance
