"""Results that are computed whole lie in their place whole, or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import xarray as xr
from patchsweep.errors import StoreError
from patchsweep.store.attributes import attributes
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.backends.process import process_name
from patchsweep.store.backends.remote import RemoteFolder
from patchsweep.store.save import load_dataset, save_dataset

ATTRS: dict[str, Any] = {
    "kind": "lens",
    "remove": ("mlp", 19),
    "provenance": {"model": "tiny", "dtype": "float32", "versions": {"torch": "2"}},
}


def made(**attrs: Any) -> xr.Dataset:
    """Numbers with gaps, and text with none, odd and long ones among it."""
    rng = np.random.default_rng(0)
    prob = rng.random((2, 3)).astype(np.float32)
    prob[1, 2] = np.nan
    words = np.array([["", " Mary", "\u202e\n"], ["é" * 300, "a", "</script>"]], dtype=object)
    return xr.Dataset(
        {"prob": (("pair", "pos"), prob), "word": (("pair", "pos"), words)},
        coords={"pair": [0, 1], "token": (("pair", "pos"), words)},
        attrs={**ATTRS, **attrs},
    )


@pytest.fixture(params=["disk", "file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {
        "disk": str(tmp_path / "deep" / "run.zarr"),
        "file": f"file://{tmp_path}/run.zarr",
        "memory": f"memory://{uuid.uuid4().hex}/run.zarr",
    }[request.param]


def test_what_was_written_is_read_back(place: str) -> None:
    ds = made()
    assert load_dataset(place, ATTRS) is None
    save_dataset(ds, place)
    found = load_dataset(place, ATTRS)
    assert found is not None
    assert found["prob"].dtype == np.float32
    xr.testing.assert_equal(found, ds)
    assert attributes(found) == {**ATTRS, "remove": ["mlp", 19]}  # as JSON gives it back
    assert ds.attrs["remove"] == ("mlp", 19)  # the caller's own are left alone
    opened = xr.open_zarr(place, consolidated=False)
    np.testing.assert_array_equal(opened["prob"], ds["prob"])


def test_the_same_results_are_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        save_dataset(made(), tmp_path / name)
    a, b = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")}
        for n in "ab"
    )
    assert a == b
    assert len(a) > 3


def test_an_occupied_place_is_refused_and_left_alone(place: str) -> None:
    save_dataset(made(n=1), place)
    with pytest.raises(StoreError, match="something lies at"):
        save_dataset(made(n=2), place)
    found = load_dataset(place, {"n": 1})
    assert found is not None


def test_files_of_others_are_neither_read_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="something lies at"):
        save_dataset(made(), tmp_path)
    with pytest.raises(StoreError, match="no results that are whole"):
        load_dataset(tmp_path, ATTRS)
    for content in ('{"node_type": "group"}', "half a fi"):
        (tmp_path / "zarr.json").write_text(content)
        with pytest.raises(StoreError, match="this version of patchsweep has not written"):
            load_dataset(tmp_path, ATTRS)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(StoreError, match="a store is a folder"):
        save_dataset(made(), tmp_path / "notes.txt")


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"remove": ("attn", 19)}, r"remove\[0\] is 'attn' in this run and 'mlp' in the store"),
        (
            {"provenance": {**ATTRS["provenance"], "dtype": "bfloat16"}},
            "provenance.dtype is 'bfloat16' in this run and 'float32' in the store",
        ),
        (
            {"provenance": {**ATTRS["provenance"], "versions": {"torch": "3"}}},
            "provenance.versions.torch is '3' in this run and '2' in the store",
        ),
        ({"which": "base", "kind": "lens"}, "which is only in this run"),
        ({"provenance": {"model": "tiny"}}, "provenance.dtype is only in the store"),
        ({"remove": "x" * 200}, r"remove is 'x{116}\.\.\. in this run and \['mlp', 19\] in the"),
    ],
)
def test_the_first_difference_is_named(place: str, attrs: dict[str, Any], words: str) -> None:
    save_dataset(made(), place)
    with pytest.raises(StoreError, match=f"holds other results: attrs.{words}"):
        load_dataset(place, attrs)


class Broken(Exception):
    pass


def break_off(monkeypatch: Any, folder: type, after: int, error: BaseException) -> None:
    """Let the `after`-th put of a folder fail, once."""
    put, left = folder.put, [after]  # type: ignore[attr-defined]

    def once(self: Any, key: str, data: bytes) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise error
        put(self, key, data)

    monkeypatch.setattr(folder, "put", once)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_a_write_that_breaks_off_on_disk_leaves_nothing(
    after: int, tmp_path: Path, monkeypatch: Any
) -> None:
    break_off(monkeypatch, LocalFolder, after, Broken())
    with pytest.raises(Broken):
        save_dataset(made(), tmp_path / "run.zarr")
    assert list(tmp_path.iterdir()) == []
    assert load_dataset(tmp_path / "run.zarr", ATTRS) is None
    save_dataset(made(), tmp_path / "run.zarr")
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


def test_a_full_disk_is_a_store_error(tmp_path: Path, monkeypatch: Any) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("patchsweep.store.backends.local.os.fsync", full)
    with pytest.raises(StoreError, match="no space is left"):
        save_dataset(made(), tmp_path / "run.zarr")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_a_killed_process_are_swept(tmp_path: Path) -> None:
    head, _, _ = process_name().rpartition("-")
    place, _, _ = head.rpartition("-")
    dead = tmp_path / f"run.zarr~{place}-{2**22 + 1}-5~0.partial"  # past the largest process id
    alive = tmp_path / f"run.zarr~{process_name()}x~0.partial"
    for left in (dead, alive):
        left.mkdir()
        (left / "zarr.json").write_text("{}")
    save_dataset(made(), tmp_path / "run.zarr")
    assert not dead.exists()
    assert alive.exists()  # whose it is cannot be known


def test_a_rival_that_was_quicker_is_not_written_over(tmp_path: Path, monkeypatch: Any) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        save_dataset(made(n=1), tmp_path / "run.zarr")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(StoreError, match="something lies at"):
        save_dataset(made(n=2), tmp_path / "run.zarr")
    assert load_dataset(tmp_path / "run.zarr", {"n": 1}) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["run.zarr"]


@pytest.mark.parametrize("after", [1, 2, 7])
def test_a_write_that_breaks_off_behind_a_url_is_not_read_and_goes_on(
    after: int, monkeypatch: Any
) -> None:
    url = f"memory://{uuid.uuid4().hex}/run.zarr"
    break_off(monkeypatch, RemoteFolder, after, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_dataset(made(), url)
    assert load_dataset(url, ATTRS) is None
    if after > 1:  # something was put: it is another's place for other results
        with pytest.raises(StoreError, match="something lies at"):
            save_dataset(made(kind="edges"), url)
        with pytest.raises(StoreError, match="no results that are whole"):
            load_dataset(url, {"kind": "edges"})
    save_dataset(made(), url)
    found = load_dataset(url, ATTRS)
    assert found is not None
    xr.testing.assert_equal(found, made())
    assert "whole.partial" not in {path.rpartition("/")[2] for path in files_of(url)}


def test_the_root_comes_last_behind_a_url(monkeypatch: Any) -> None:
    keys = []
    put = RemoteFolder.put

    def told(self: RemoteFolder, key: str, data: bytes) -> None:
        keys.append(key)
        put(self, key, data)

    monkeypatch.setattr(RemoteFolder, "put", told)
    save_dataset(made(), f"memory://{uuid.uuid4().hex}/run.zarr")
    assert keys.index("zarr.json") == len(keys) - 1


def files_of(url: str) -> list[str]:
    fs, root = fsspec.core.url_to_fs(url)
    return [str(path) for path in fs.find(root)]
