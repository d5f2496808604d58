"""The noise floor: measured in every run that is not in fp32, and nothing is told from below it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.models.arithmetic import last_bit_turned
from patchsweep.report import write_report
from patchsweep.results.accessor import largest
from patchsweep.results.compare import compare
from patchsweep.results.render import render
from patchsweep.results.rounding import noise_floor, noise_of
from patchsweep.store.store import Store
from patchsweep.sweeps import exact
from patchsweep.sweeps.noise import FACTOR, N_NULL
from patchsweep.sweeps.sample import sample_exact
from patchsweep.sweeps.screen_settings import Screen
from rich.console import Console
from test_compute_dtype import bridges, pairs_of

SITES = ["resid_pre", "z", "q", "mlp_out"]


@cache
def swept(family: str, n: int = 1, runner: Any = "packed") -> tuple[xr.Dataset, xr.Dataset]:
    """A sweep in the arithmetic of bf16 weights, and the fp32 one of the same weights."""
    low, wide = bridges(family)
    return (
        ps.sweep(low, pairs_of(low, n), SITES, compute_dtype="model", runner=runner),
        ps.sweep(wide, pairs_of(wide, n), SITES, runner=runner),
    )


@pytest.mark.parametrize("runner", ["packed", "hooked"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_floor_is_about_what_rounding_does(family: str, runner: str) -> None:
    low, wide = swept(family, runner=runner)
    for site in SITES:
        effect = wide[site] - wide.base_metric
        error = np.abs(((low[site] - low.base_metric) - effect).values)
        floor = low[f"{site}_noise"].item()
        # large effects round by a share of themselves besides
        small = (effect.values != 0) & (np.abs(effect.values) < 5 * floor)
        # of 16 samples from three layers; the floor is some 4 standard deviations
        assert (error[small] > floor).mean() <= 0.1, site
        assert floor < 20 * np.sqrt(np.square(error[small]).mean()), site


@pytest.mark.parametrize("compute_dtype", ["auto", "float32"])
def test_fp32_has_no_floor(compute_dtype: Any) -> None:
    low, _ = bridges("llama")
    ds = ps.sweep(low, pairs_of(low), "z", layers=[1], compute_dtype=compute_dtype, runner="packed")
    assert set(ds.data_vars) == {"z", "base_metric", "source_metric"}
    assert noise_floor(ds, "z") is None
    assert noise_of(ds) == []
    assert largest(ds, "z")[0].noise is None


def test_the_last_bit_is_turned_and_nothing_else() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.tensor([1.0, -1.0, 0.0, 3.5, -1e-3, 1e4]).to(dtype)
        y = last_bit_turned(x)
        assert y.dtype == dtype
        assert bool((x != y).all())
        step = torch.finfo(dtype).eps * x.float().abs() + torch.finfo(dtype).tiny
        assert bool(((x.float() - y.float()).abs() <= step).all())
    wide = torch.tensor([1.0, -3.5, 1e4])
    assert torch.equal(last_bit_turned(wide).bfloat16(), last_bit_turned(wide.bfloat16()))


def test_the_floor_is_a_multiple_of_what_null_patches_did(monkeypatch: pytest.MonkeyPatch) -> None:
    low, _ = bridges("llama")
    seen: list[np.ndarray] = []
    original = exact.Floor.put

    def keep(floor: Any, null: Any, change: np.ndarray) -> None:
        seen.append(change)
        original(floor, null, change)

    monkeypatch.setattr(exact.Floor, "put", keep)
    ds = ps.sweep(low, pairs_of(low), "z", compute_dtype="model", runner="packed")
    (change,) = seen
    assert change.shape == (1, N_NULL)
    expected = FACTOR * np.sqrt(np.square(change).mean())
    np.testing.assert_allclose(ds["z_noise"].item(), expected, rtol=1e-6)


def test_largest_stops_at_the_floor() -> None:
    low, _ = swept("llama")
    cells = largest(low, "z", n=10_000)
    floor = low["z_noise"].item()
    assert {cell.noise for cell in cells} == {floor}
    assert 0 < len(cells) < int((low["z"] != low.base_metric).sum())
    assert min(abs(cell.effect) for cell in cells) > floor
    (told,) = [n for n in noise_of(low) if n.site == "z"]
    assert told.n_above == len(cells)


def test_the_floor_of_a_mean_over_pairs_falls_as_independent_rounding_does() -> None:
    low, _ = swept("llama", 2)
    floors = low["z_noise"].values[0]
    assert largest(low, "z")[0].noise == pytest.approx(np.sqrt(np.square(floors).sum()) / 2)
    assert largest(low, "z", pair=1)[0].noise == pytest.approx(floors[1])


def test_a_store_holds_the_floor_that_memory_holds(tmp_path: Path) -> None:
    low, _ = bridges("llama")
    ds = ps.sweep(
        low,
        pairs_of(low, 2),
        SITES,
        compute_dtype="model",
        runner="packed",
        store=tmp_path / "a.zarr",
    )
    assert not Store.open(tmp_path / "a.zarr").pending()
    for site in SITES:
        np.testing.assert_array_equal(ds[f"{site}_noise"], swept("llama", 2)[0][f"{site}_noise"])


@pytest.mark.parametrize("kind", ["screen", "sample"])
def test_screens_and_samples_have_a_floor_too(kind: str) -> None:
    low, _ = bridges("llama")
    arguments: dict[str, Any] = {"compute_dtype": "model", "runner": "packed"}
    if kind == "screen":
        method = Screen(k=5, inclusion=0.3)
        ds = ps.sweep(low, pairs_of(low), "z", method=method, **arguments)
    else:
        ds = sample_exact(low, pairs_of(low), "z", n=5, **arguments)
    # the same null patches, in other packed batches
    ratio = ds["z_noise"].item() / swept("llama")[0]["z_noise"].item()
    assert 0.3 < ratio < 3


def test_the_floor_of_bf16_products_covers_their_error() -> None:
    _, wide = bridges("llama")
    ds = ps.sweep(wide, pairs_of(wide), "z", precision="bf16", runner="packed")
    exactly = swept("llama")[1]["z"]
    error, floor = np.abs((ds["z_bf16"] - exactly).values), ds["z_noise"].item()
    effect = np.abs((exactly - ds.base_metric).values)
    small = (effect > 0) & (effect < 5 * floor)
    assert (error[small] > floor).mean() <= 0.1
    assert floor < 20 * np.sqrt(np.square(error[small]).mean())


def test_compare_and_the_report_say_what_is_below_the_floor(tmp_path: Path) -> None:
    low, _ = bridges("llama")
    store = tmp_path / "a.zarr"
    ds = ps.sweep(
        low,
        pairs_of(low),
        "q",
        method=["exact", "atp"],
        compute_dtype="model",
        runner="packed",
        store=store,
    )
    found = compare(ds).of("q", "atp")
    below = np.abs((ds["q"] - ds.base_metric).values) <= ds["q_noise"].item()
    counted = below & ((ds["q"] != ds.base_metric) | (ds["q_atp"] != 0)).values
    assert found.n_below_noise == int(counted.sum()) > 0
    console = Console(width=300, record=True)
    console.print(render(compare(ds)))
    assert "below the run's noise floor" in console.export_text()
    page = write_report(store, tmp_path / "a.html").read_text()
    assert "What is rounding" in page
    assert "noise floor</th>" in page
