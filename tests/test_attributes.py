"""Attributes of results: netCDF takes them, and what was nested is read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import circuit, edges, exact_edges, screen_edges
from patchsweep.analyses.heads import study
from patchsweep.analyses.logit_lens import Patch, lens, sublayers
from patchsweep.store.attributes import attributes, flat_attributes
from patchsweep.sweeps.api import sweep
from patchsweep.sweeps.screen_settings import Screen
from subjects import demo_pairs, model

TEXT = st.text('ab{["é ', max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
M, P = (lambda: model("tiny:llama")), (lambda: demo_pairs("tiny:llama"))
RESULTS: dict[str, Callable[[Path], xr.Dataset]] = {
    "sweep": lambda tmp: sweep(M(), P(), "z", layers=[1]),
    "sweep-atp": lambda tmp: sweep(M(), P(), "z", method=["exact", "atp"], layers=[1]),
    "screen": lambda tmp: sweep(M(), P(), "z", method=Screen(k=2, subsets=8)),
    "stored-sweep": lambda tmp: sweep(M(), P(), "z", layers=[1], store=tmp / "s.zarr"),
    "edges": lambda tmp: edges(M(), P()),
    "exact-edges": lambda tmp: exact_edges(M(), P(), ["m1->logits"], positions=True),
    "screen-edges": lambda tmp: screen_edges(M(), P(), top=3),
    "circuit": lambda tmp: circuit(M(), P(), sizes=[0.1, 1]),
    "lens": lambda tmp: lens(M(), P(), patch=Patch("z", 1, head=[0, 1])),
    "sublayers": lambda tmp: sublayers(M(), P()),
    "attention": lambda tmp: attention(M(), P(), top=2),
    "heads": lambda tmp: study(M(), P(), ablations=["resample", "zero"]),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_are_written_as_netcdf_and_read_back(name: str, tmp_path: Path) -> None:
    ds = RESULTS[name](tmp_path)
    ds.to_netcdf(tmp_path / "a.nc", engine="scipy")
    with xr.open_dataset(tmp_path / "a.nc", engine="scipy") as found:
        assert attributes(found) == attributes(ds)
        assert found.patchsweep.attributes["provenance"]["weights_hash"]


@given(st.dictionaries(st.sampled_from("abc"), JSON | st.floats(allow_nan=False)))
def test_flat_attributes_are_numbers_and_texts(attrs: dict[str, object]) -> None:
    flat = flat_attributes(attrs)
    assert all(type(value) in (str, int, float) for value in flat.values())
    assert flat_attributes(flat) == flat
    told = attributes(flat)
    for key, value in attrs.items():
        if not isinstance(value, str):  # a text may look like JSON
            assert told[key] == value
            assert type(told[key]) is type(value)


def test_nested_attributes_stay_what_they_are() -> None:
    nested = {"a": {"b": [1, None]}, "c": [True], "d": "text", "e": 1.5}
    assert attributes(nested) == nested
