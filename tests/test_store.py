"""The store: layout, units, resuming, refusing, leases, journal. Faults are in `store_faults/`."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from patchsweep.errors import StoreError
from patchsweep.store import layout as layout_module
from patchsweep.store.backends.base import PARTIAL
from patchsweep.store.backends.credentials import refuse_credentials, scrub
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.backends.process import is_gone, process_name
from patchsweep.store.journal import Journal, read_journal
from patchsweep.store.layout import COMPLETE, Layout, Variable, with_digests
from patchsweep.store.store import Store
from store_checks import checksums, verify_structure
from store_faults.runs import run, small_layout, values_of


@pytest.fixture
def memory_url() -> str:
    return f"memory://{uuid.uuid4().hex}/run.zarr"


def test_process_is_gone_when_it_has_ended_and_not_before(dead_process: str) -> None:
    assert is_gone(dead_process)
    assert not is_gone(process_name())
    assert not is_gone("another_host.01234567-1-1")
    assert not is_gone("nonsense")


# ---------------------------------------------------------------------------- layout and units


@st.composite
def variables(draw: st.DrawFn) -> Variable:
    sizes = {"metric": draw(st.integers(1, 3)), "pair": draw(st.integers(1, 7))}
    if draw(st.booleans()):
        sizes["layer"] = draw(st.integers(1, 6))
    for dim in draw(st.sampled_from([(), ("pos",), ("head",), ("pos", "head")])):
        sizes[dim] = draw(st.integers(1, 4))
    unit = (draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    return Variable("v", tuple(sizes), tuple(sizes.values()), unit, {})


@given(variables())
@settings(deadline=None, max_examples=100)
def test_units_cover_every_cell_once_each_in_a_file_of_its_own(variable: Variable) -> None:
    covered = np.zeros(variable.shape, int)
    for unit in variable.units():
        covered[variable.slices(unit)] += 1
        assert covered[variable.slices(unit)].shape == variable.block_shape(unit)
    assert (covered == 1).all()
    assert len({variable.shard_key(unit) for unit in variable.units()}) == variable.n_units
    assert len({variable.flag_key(unit) for unit in variable.units()}) == variable.n_units


@given(variables(), st.sampled_from([16, 1 << 20]))
@settings(deadline=None, max_examples=15)
def test_written_values_are_read_back_by_xarray(variable: Variable, inner_bytes: int) -> None:
    coords = {
        dim: ((dim,), np.arange(size))
        for dim, size in zip(variable.dims, variable.shape, strict=True)
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout_module, "INNER_BYTES", inner_bytes)
        url = f"memory://{uuid.uuid4().hex}"
        store = Store.create_or_resume(url, Layout((variable,), coords, {}))
        assert store.variables["v"].shard == variable.shard
        wanted = np.random.default_rng(0).normal(size=variable.shape).astype(np.float32)
        for unit in store.units():
            store.write(unit, wanted[variable.slices(unit)])
        found = store.dataset()["v"]
        assert found.dims == variable.dims
        np.testing.assert_array_equal(found.values, wanted)
        assert verify_structure(store) == []


def test_each_shard_is_put_once_and_before_its_flag(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store.create_or_resume(tmp_path / "run.zarr", small_layout())
    puts: list[str] = []
    put = LocalFolder.put

    def noted(folder: LocalFolder, key: str, data: bytes) -> None:
        puts.append(key)
        put(folder, key, data)

    monkeypatch.setattr(LocalFolder, "put", noted)
    for unit in store.units():
        store.write(unit, values_of(store.variables[unit.variable], unit))
    wanted = []
    for unit in store.units():
        variable = store.variables[unit.variable]
        wanted += [variable.shard_key(unit), variable.flag_key(unit)]
    assert puts == wanted
    assert set(puts) <= set(checksums(tmp_path / "run.zarr"))


def test_all_files_and_folders_are_synced_before_a_unit_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"
    store = Store.create_or_resume(path, small_layout())
    unit = store.units()[0]
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle: int) -> None:
        order.append(f"sync {Path(os.readlink(f'/proc/self/fd/{handle}')).name.split('~')[0]}")
        fsync(handle)

    def noted_replace(source: Path, target: Path) -> None:
        order.append(f"rename {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    store.write(unit, values_of(store.variables[unit.variable], unit))
    shard, flag = "c.0.0.0.0.0", "c.0.0.0"
    assert order == [
        *(f"sync {shard}", f"rename {shard}", "sync z"),
        *(f"sync {flag}", f"rename {flag}", "sync z"),
    ]


def test_values_of_a_wrong_shape_are_refused(tmp_path: Path) -> None:
    store = Store.create_or_resume(tmp_path / "run.zarr", small_layout())
    with pytest.raises(StoreError, match=r"unit z/0.0 have shape \(1,\); its block has"):
        store.write(store.units()[0], np.zeros(1))
    with pytest.raises(StoreError, match=r"2 metrics and 5 pairs; \(2, 4\) from pair 2 on"):
        store.write_references(2, np.zeros((2, 4)), np.zeros((2, 4)))


def test_unpatched_metrics_are_kept_as_first_written(tmp_path: Path) -> None:
    store = Store.create_or_resume(tmp_path / "run.zarr", small_layout())
    assert store.pending_pairs() == [0, 1, 2, 3, 4]
    store.write_references(1, np.ones((2, 2)), np.zeros((2, 2)))
    again = Store.open(tmp_path / "run.zarr")
    again.write_references(0, np.full((2, 2), 7.0), np.full((2, 2), 8.0))
    values = again.dataset()["base_metric"].values
    np.testing.assert_array_equal(values[0], [7, 1, 1, np.nan, np.nan])
    assert again.pending_pairs() == [3, 4]


# ---------------------------------------------------------------------------- reading


def test_store_opens_with_xarray_alone_and_without_a_warning(tmp_path: Path) -> None:
    run(tmp_path / "run.zarr")
    code = """
import json, sys, warnings
sys.modules["patchsweep"] = None  # any import of it fails
warnings.simplefilter("error")
import xarray
ds = xarray.open_zarr(sys.argv[1], consolidated=False)
assert ds["z"].dims == ("metric", "pair", "layer", "pos", "head"), ds
assert set(ds.coords) == {
    "metric", "pair", "layer", "pos", "head", "base_token", "answer"}, ds.coords
assert set(ds.data_vars) == {"z", "embed", "base_metric", "source_metric"}, ds
assert ds.sel(metric="prob", pair=3)["base_token"].values[1] == "token 3 1 \\u2603"
assert ds.sel(layer=[0, 2])["z"].shape == (2, 5, 2, 4, 2)
assert json.loads(ds.attrs["provenance"])["config"] == {"sites": ["z"], "seed": 1}
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run.zarr")], check=True)


def test_store_in_memory_equals_the_one_on_disk(tmp_path: Path, memory_url: str) -> None:
    run(tmp_path / "run.zarr")
    run(memory_url, journal=True)
    assert checksums(memory_url) == checksums(tmp_path / "run.zarr")
    assert read_journal(memory_url)[-1]["event"] == "finished"
    assert verify_structure(Store.open(memory_url)) == []


def test_store_holds_no_host_process_or_path(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run(path)
    everything = b"".join((path / key).read_bytes() for key in checksums(path))
    for mark in (process_name(), socket.gethostname() + ".", str(tmp_path), time.strftime("%Y-")):
        assert mark.encode() not in everything


def test_equal_values_are_equal_bytes_whatever_the_order_and_the_kind_of_nan(
    tmp_path: Path,
) -> None:
    run(tmp_path / "a.zarr")
    other = Store.create_or_resume(tmp_path / "b.zarr", small_layout())
    strange_nan = np.array([0xFFC00001], np.uint32).view(np.float32)[0]
    other.write_references(
        0, *(np.full((2, 5), len(n), np.float64) for n in ("base_metric", "source_metric"))
    )
    for unit in reversed(other.units()):
        values = values_of(other.variables[unit.variable], unit)
        values[np.isnan(values)] = strange_nan
        other.write(unit, values)
    assert checksums(tmp_path / "a.zarr") == checksums(tmp_path / "b.zarr")


# ---------------------------------------------------------------------------- resuming, refusing


def test_resume_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    run(path, only=slice(0, 4))
    stamps = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    store = Store.create_or_resume(path, small_layout())
    assert store.pending() == store.units()[4:]
    assert store.is_done(store.units()[3])
    assert not store.is_done(store.units()[4])
    run(path)
    assert store.pending() == []
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in stamps.items())
    run(tmp_path / "undisturbed.zarr")
    assert checksums(path) == checksums(tmp_path / "undisturbed.zarr")


def _other(change: Callable[[dict[str, Any]], None]) -> Layout:
    plain = small_layout()
    parts: dict[str, Any] = {
        "variables": list(plain.variables),
        "coords": dict(plain.coords),
        "attrs": {"provenance": {"model": "none", "config": {"sites": ["z"], "seed": 1}}},
    }
    change(parts)
    return Layout(tuple(parts["variables"]), parts["coords"], parts["attrs"])


def _set_token(parts: dict[str, Any]) -> None:
    dims, tokens = parts["coords"]["base_token"]
    tokens = tokens.copy()
    tokens[2, 1] = " Anna"
    parts["coords"]["base_token"] = dims, tokens


def _set_unit(parts: dict[str, Any]) -> None:
    z = parts["variables"][0]
    parts["variables"][0] = Variable(z.name, z.dims, z.shape, (1, 1), z.attrs)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda parts: parts["attrs"]["provenance"]["config"].update(seed=2, sites=["z", "q"]),
            r"the length of attrs.provenance.config.sites is 2 in this run and 1 in the store",
        ),
        (
            lambda parts: parts["attrs"]["provenance"]["config"].update(seed=1.0),
            r"attrs.provenance.config.seed is 1.0 in this run and 1 in the store",
        ),
        (
            lambda parts: parts["attrs"].update(direction="noising"),
            r"attrs.direction is only in this run",
        ),
        (_set_token, r"base_token\[2, 1\] is ' Anna' in this run and 'token 2 1"),
        (lambda parts: parts["coords"].pop("answer"), r"attrs.coordinates is 'base_token' in"),
        (lambda parts: parts["variables"].pop(), r"array embed is only in the store"),
        (_set_unit, r"z.unit\[1\] is 1 in this run and 2 in the store"),
    ],
    ids=["list", "number", "new-attr", "token", "coordinate", "variable", "unit"],
)
def test_store_of_another_run_is_refused_with_the_first_difference(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], difference: str
) -> None:
    path = tmp_path / "run.zarr"
    run(path, only=slice(0, 1))
    before = checksums(path)
    with pytest.raises(StoreError, match="belongs to another run: " + difference) as caught:
        Store.create_or_resume(path, _other(change))
    assert "give another path, or the settings that it was begun with" in str(caught.value)
    assert checksums(path) == before


def test_only_stores_and_empty_folders_are_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Store.create_or_resume(tmp_path / "empty", small_layout()).pending()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(StoreError, match="holds other things; give another path"):
        Store.create_or_resume(tmp_path / "mine", small_layout())
    with pytest.raises(StoreError, match="a store is a folder"):
        Store.create_or_resume(tmp_path / "mine" / "notes.txt", small_layout())
    with pytest.raises(StoreError, match="a store is a folder"):
        Store.create_or_resume(tmp_path / "mine" / "notes.txt" / "run.zarr", small_layout())
    zarr.create_group(tmp_path / "other.zarr", attributes={"title": "weather"})
    with pytest.raises(StoreError, match="this version of patchsweep has not written"):
        Store.create_or_resume(tmp_path / "other.zarr", small_layout())
    with pytest.raises(StoreError, match=r"there is no store at .*nothing\.zarr"):
        Store.open(tmp_path / "nothing.zarr")


def test_store_of_another_format_or_half_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    Store.create_or_resume(path, small_layout())
    (path / COMPLETE).rename(tmp_path / "aside")
    with pytest.raises(StoreError, match=r"was cut off while it was made\); run the command"):
        Store.open(path)
    with pytest.raises(StoreError, match=r"belongs to another run: attrs\.x is only in this run"):
        Store.create_or_resume(path, small_layout(x=1))
    with pytest.raises(StoreError, match=r"has begun to make .* \(base_token/c.0.0 differs\)"):
        Store.create_or_resume(path, _other(_set_token))
    (tmp_path / "aside").rename(path / COMPLETE)
    files = {key: (path / key).read_bytes() for key in checksums(path)}
    root = json.loads(files["zarr.json"])
    root["attributes"]["patchsweep_store"] = 99
    files["zarr.json"] = json.dumps(root).encode()
    for key, data in with_digests(files).items():
        (path / key).write_bytes(data)
    with pytest.raises(StoreError, match="store format 99, and this patchsweep reads 2"):
        Store.open(path)


def test_leftovers_of_dead_processes_are_swept_and_others_are_not(
    tmp_path: Path, dead_process: str
) -> None:
    path = tmp_path / "run.zarr"
    store = Store.create_or_resume(path, small_layout())
    dead = path / "z" / f"c.0.0.0.0.0~{dead_process}~3{PARTIAL}"
    live = path / "z" / f"c.0.1.0.0.0~{process_name()}~3{PARTIAL}"
    far = path / "z" / f"c.0.2.0.0.0~another_host.01234567-1-1~3{PARTIAL}"
    old = path / "z" / f"c.0.0.1.0.0.0a1b2c{PARTIAL}"
    for partial in (dead, live, far, old):
        partial.write_bytes(b"half")
    os.utime(old, (0, 0))
    assert len(verify_structure(store)) == 4
    Store.create_or_resume(path, small_layout())
    assert [p.exists() for p in (dead, live, far, old)] == [False, True, True, False]
    unit = next(u for u in store.units() if store.variables["z"].shard_key(u) == "z/c.0.2.0.0.0")
    store.claim([unit])  # nobody else may write it now
    assert not far.exists()


# ---------------------------------------------------------------------------- checking


def _rot(path: Path) -> None:
    shard = path / "z" / "c.0.0.0.0.0"
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 0xFF
    shard.write_bytes(bytes(data))


def _all_nan(path: Path) -> None:
    (path / "progress/z/c.0.0.0").unlink()
    store = Store.open(path)
    unit = store.units()[0]
    store.write(unit, np.full(store.variables["z"].block_shape(unit), np.nan))


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (
            lambda p: (p / "z/c.0.0.0.0.0").unlink(),
            r"z/0.0: z/c.0.0.0.0.0 is lost; run the command",
        ),
        (_rot, r"z/0.0: z/c.0.0.0.0.0 is not as it was written; run"),
        (_all_nan, r"z/0.0: holds nothing but NaN"),
        (lambda p: (p / "z/.DS_Store").write_text("x"), r"z/.DS_Store: is no file of this store"),
        (lambda p: (p / "answer/c.0").unlink(), r"answer/c.0: is missing"),
        (lambda p: shutil.rmtree(p / "base_metric"), r"base_metric/zarr.json: is missing"),
    ],
    ids=["lost-shard", "rotten-shard", "all-nan", "stray-file", "lost-coordinate", "lost-array"],
)
def test_verify_finds(tmp_path: Path, damage: Callable[[Path], None], problem: str) -> None:
    path = tmp_path / "run.zarr"
    run(path)
    assert verify_structure(Store.open(path)) == []
    damage(path)
    try:
        (found,) = verify_structure(Store.open(path))
    except StoreError as error:
        found = str(error)
    assert re.search(problem, found), found


# ---------------------------------------------------------------------------- journal, credentials


def test_journal_is_read_back_past_torn_and_foreign_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    unit = small_layout().variables[0].units()[3]
    with Journal(path) as journal:
        journal.started({"sites": ["z"]}, n_units=9, slice=2, n_slices=8)
        journal.unit_done(unit, seconds=0.25, token_layers=100, n_live=7)
        journal.warning("the packed batch was halved")
    second = Journal(path)
    second.started("again", n_units=8)
    second.__exit__(RuntimeError, RuntimeError("no more"), None)
    first, again = sorted((tmp_path / "run.zarr.journal").iterdir(), key=lambda p: len(p.name))
    assert first.stem == process_name()
    assert again.stem == f"{process_name()}-run1"
    with first.open("a") as file:
        file.write('[1]\n{"event": 3, "time": 1}\n{"event": "unit", "sec')
    events = read_journal(path)
    assert [event["event"] for event in events] == [
        *("started", "unit", "warning", "finished", "started", "interrupted")
    ]
    assert events[1] | {"time": 0} == {
        "event": "unit",
        "time": 0,
        "variable": "z",
        "pair_block": 1,
        "layer_block": 0,
        "seconds": 0.25,
        "token_layers": 100,
        "n_live": 7,
        "process": process_name(),
    }
    assert events[-1]["reason"] == "RuntimeError: no more"


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://me:hunter2hunter2@bucket/x", {}),
        ("s3://AKIAIOSFODNN7EXAMPLE:hunter2/hunter2+x@bucket/x", {}),
        ("s3://me:/hunter2@bucket/x", {}),
        ("s3://hunter2hunter2@bucket/x", {}),
        ("s3://AKIAhunter2@bucket/x".replace("hunter2", "IOSFODNN7EXAMPLE"), {}),
        ("https://me:hunter2/2@host:9000/x", {}),
        ("https://host/x?X-Amz-Signature=abcdef0123", {}),
        ("memory://x", {"key": "AKIA"}),
        ("memory://x", {"client_kwargs": {"aws_secret_access_key": "hunter2hunter2"}}),
    ],
    ids=[
        *("password", "slash", "first-slash", "user", "key-id", "web", "signature", "option"),
        "nested-option",
    ],
)
def test_credentials_in_the_address_are_refused_and_not_shown(
    url: str, options: dict[str, Any]
) -> None:
    with pytest.raises(StoreError, match=r"no credentials, but .*; leave .* out and set") as caught:
        Store.create_or_resume(url, small_layout(), storage_options=options)
    for secret in ("hunter2", "abcdef0123", "AKIA"):
        assert secret not in str(caught.value).replace("for S3: ", "")


@pytest.mark.parametrize(
    "url",
    [
        *("s3://bucket/run@2.zarr", "https://host:9000/b/x@y.zarr", "sftp://bob@host/x"),
        "abfs://container@account.dfs.core.windows.net/x",
    ],
)
def test_an_at_sign_without_credentials_is_no_secret(url: str) -> None:
    refuse_credentials(url, {})


def test_scrub_removes_what_is_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "correct horse")
    text = "GET sftp://bob@host/x?sig=12ab&y=1 by AKIAIOSFODNN7EXAMPLE with correct horse"
    assert scrub(text) == "GET sftp://***@host/x?sig=***&y=1 by *** with ***"
    assert scrub("correct%20horse at s3://a:b/c+d@e/f and s3://k:x@y@z/w") == (
        "*** at s3://***@e/f and s3://***@z/w"
    )


def test_unknown_protocol_is_refused() -> None:
    with pytest.raises(StoreError, match="one that fsspec can open; 'gopher://x/y' is not"):
        Store.create_or_resume("gopher://x/y", small_layout())
