"""A place that will not do is refused before the model runs, and nothing is left there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import patchsweep as ps
import pytest
import xarray as xr
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from patchsweep.analyses.stages import Stages
from patchsweep.errors import StoreError
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.save import save_dataset
from patchsweep.sweeps import api
from patchsweep.sweeps.identity import sealed
from subjects import demo_pairs, model

NAME = "tiny:llama"
Prepare = Callable[[Path, pytest.MonkeyPatch], str]


def file_in_the_way(here: Path, patch: pytest.MonkeyPatch) -> str:
    (here / "notes.txt").write_text("mine")
    return str(here / "notes.txt" / "a.zarr")


def is_a_file(here: Path, patch: pytest.MonkeyPatch) -> str:
    (here / "a.zarr").write_text("mine")
    return str(here / "a.zarr")


def other_things(here: Path, patch: pytest.MonkeyPatch) -> str:
    (here / "notes.txt").write_text("mine")
    return str(here)


def another_programs(here: Path, patch: pytest.MonkeyPatch) -> str:
    zarr.create_group(here / "weather.zarr", attributes={"title": "weather"})
    return str(here / "weather.zarr")


def an_analysis(here: Path, patch: pytest.MonkeyPatch) -> str:
    save_dataset(xr.Dataset({"a": ("x", [1.0])}, attrs={"kind": "dream"}), here / "a.zarr")
    return str(here / "a.zarr")


def read_only_disk(here: Path, patch: pytest.MonkeyPatch) -> str:
    def read_only(path: Any) -> Any:
        found = list(os_statvfs(path))
        found[8] |= os.ST_RDONLY
        return os.statvfs_result(found)

    os_statvfs = os.statvfs
    patch.setattr("patchsweep.store.backends.local.os.statvfs", read_only)
    return str(here / "a.zarr")


def no_right_to_write(here: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setattr("patchsweep.store.backends.local.os.access", lambda *args: False)
    return str(here / "a.zarr")


def full_disk(here: Path, patch: pytest.MonkeyPatch) -> str:
    patch.setattr(LocalFolder, "free_bytes", lambda self: 10)
    return str(here / "a.zarr")


def no_right_behind_a_url(here: Path, patch: pytest.MonkeyPatch) -> str:
    def refuse(*args: Any, **more: Any) -> None:
        raise PermissionError(errno.EACCES, "Access Denied")

    patch.setattr(MemoryFileSystem, "pipe_file", refuse)
    return "memory://refused/a.zarr"


PLACES: dict[str, tuple[Prepare, str]] = {
    "file-in-the-way": (file_in_the_way, "a store is a folder"),
    "a-file": (is_a_file, "a store is a folder"),
    "other-things": (other_things, "starts in an empty folder"),
    "another-programs": (another_programs, "this version of patchsweep has not written"),
    "an-analysis": (an_analysis, "holds results of `patchsweep dream`"),
    "read-only-disk": (read_only_disk, "must be readable and writable"),
    "no-right": (no_right_to_write, "must be readable and writable"),
    "full-disk": (full_disk, "the values need up to"),
    "no-right-behind-a-url": (no_right_behind_a_url, "did not after its library's retries"),
    "protocol": (lambda *args: "gopher://x/a.zarr", "one that fsspec can open"),
    "credentials": (lambda *args: "s3://AKIA:a/b@bucket/a.zarr", "no credentials"),
}


@pytest.mark.parametrize(("prepare", "said"), PLACES.values(), ids=list(PLACES))
def test_a_sweep_is_refused_before_any_forward_pass(
    prepare: Prepare, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = prepare(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))

    def never(*args: object, **more: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(api, "prepare_runner", never)
    monkeypatch.setattr(type(model(NAME).original_model), "forward", never)
    with pytest.raises(StoreError, match=said) as caught:
        ps.sweep(model(NAME), demo_pairs(NAME), "z", store=place)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


# results of an analysis may take the place of nothing at all
ANALYSES = {
    **{name: place for name, place in PLACES.items() if name not in ("other-things", "full-disk")},
    "other-things": (other_things, "holds no results that are whole"),
    "an-analysis": (an_analysis, "holds other results"),
}


@pytest.mark.parametrize(("prepare", "said"), ANALYSES.values(), ids=list(ANALYSES))
def test_an_analysis_is_refused_before_it_is_computed(
    prepare: Prepare, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = prepare(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))

    def never() -> xr.Dataset:
        raise AssertionError("it was computed")

    attrs = {"kind": "lens", "identity": sealed({"kind": "lens"})}
    with pytest.raises(StoreError, match=said):
        Stages(place).results(model(NAME), lambda: attrs, never)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    fs = MemoryFileSystem()
    ps.sweep(model(NAME), demo_pairs(NAME), "z", layers=[1], store="memory://tried/a.zarr")
    assert not [path for path in fs.find("/tried") if "probe" in path]
