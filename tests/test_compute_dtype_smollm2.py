"""SmolLM2 in bfloat16: in fp32 its largest effects are the fp32 sweep's, else noise is named."""

from __future__ import annotations

from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.results.accessor import Effect, largest
from patchsweep.results.rounding import noise_floor

SITES = ["k", "q", "z"]
LAYERS = [0, 5, 15, 20, 25, 29]
N = 20


@cache
def swept(kind: str) -> xr.Dataset:
    """All patches of the sites: by the fp32 model, in fp32 of bf16 weights, in bf16."""
    model = ps.load_model("smollm2-135m", dtype="bfloat16", device="cpu")
    if kind == "fp32":
        model.to(torch.float32)  # the same weights: those of bf16
    text = "Then Anna and Paul were at the park and {} threw a ball to"
    pairs = ps.PromptPairs.from_strings(
        model,
        clean=[text.format("Paul")],
        corrupted=[text.format("Anna")],
        answers=[(" Anna", " Paul")],
    )
    compute_dtype = "model" if kind == "bf16" else "float32"
    return ps.sweep(
        model, pairs, SITES, layers=LAYERS, compute_dtype=compute_dtype, runner="packed"
    )


def _places(effects: list[Effect]) -> list[tuple[object, ...]]:
    return [(e.layer, e.pos, e.head) for e in effects]


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_the_largest_effects_in_fp32_are_those_of_the_fp32_model(site: str) -> None:
    found, expected = largest(swept("float32"), site, n=N), largest(swept("fp32"), site, n=N)
    assert len(found) == N
    assert _places(found) == _places(expected)
    np.testing.assert_allclose([e.effect for e in found], [e.effect for e in expected], atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_in_bf16_the_floor_stands_beside_every_number(site: str) -> None:
    low, exact = swept("bf16"), swept("fp32")
    floor = noise_floor(low, site)
    assert floor is not None
    told = largest(low, site, n=N)
    assert told
    assert all(e.noise == floor.item() < abs(e.effect) for e in told)
    # of the cells without an effect one in some thousands passes the floor, and here are about 200
    true, found = ((ds[site] - ds.base_metric).squeeze() for ds in (exact, low))
    error = abs(found - true).where(true != 0)
    assert int((error > floor.item() + 0.02 * abs(true)).sum()) <= 1
    unit = "kv_head" if site == "k" else "head"
    at = [{"layer": e.layer, "pos": e.pos, unit: e.head} for e in told]
    assert sum(true.sel(cell).item() * e.effect <= 0 for cell, e in zip(at, told, strict=True)) <= 1
    # and it had to be: the floor lies above the twentieth of the true effects
    sizes = np.sort(np.abs(true.values[np.isfinite(true.values)]))[::-1]
    assert floor.item() > sizes[N - 1]
    assert len(told) < N
