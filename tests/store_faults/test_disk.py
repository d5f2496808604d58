"""Disks that fill up, turn read-only or go away: a StoreError says what to do; then it resumes."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from patchsweep.errors import StoreError
from patchsweep.store.layout import Layout, Variable
from patchsweep.store.store import Store
from store_checks import checksums, verify_structure

from store_faults.runs import run, small_layout, values_of

Observed = Callable[[str, str], None]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 400 kB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root and the right to mount")
    yield place
    while os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def write_all(store: Store) -> None:
    for unit in store.units():
        store.write(unit, values_of(store.variables[unit.variable], unit))


def assert_resumes(path: Path, tmp_path: Path) -> None:
    run(path)
    other = tmp_path / "undisturbed.zarr"
    run(other)
    assert checksums(path) == checksums(other)
    assert verify_structure(Store.open(path)) == []


def test_full_disk_stops_cleanly_and_resumes(
    small_disk: Path, tmp_path: Path, observed: Observed
) -> None:
    path = small_disk / "run.zarr"
    store = Store.create_or_resume(path, small_layout())
    ballast = small_disk / "ballast"
    with pytest.raises(OSError, match="No space left"):
        ballast.write_bytes(bytes(1 << 20))
    ballast.write_bytes(bytes(ballast.stat().st_size - 12_000))  # a few files fit, then no more
    with pytest.raises(StoreError, match=r"no space is left for the store .*; free some"):
        write_all(store)
    with pytest.raises(StoreError, match=r"need up to .* kB, and .* left; free some space"):
        run(path)
    assert verify_structure(Store.open(path)) == []  # not even a partial file
    ballast.unlink()
    assert_resumes(path, tmp_path)
    observed("the disk is full", "StoreError: free some space; resumed after that")


def test_disk_that_turns_read_only_stops_cleanly_and_resumes(
    small_disk: Path, tmp_path: Path, observed: Observed
) -> None:
    path = small_disk / "run.zarr"
    store = Store.create_or_resume(path, small_layout())
    unit = store.units()[0]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StoreError, match=r"must be readable and writable .*Read-only"):
        store.write(unit, values_of(store.variables[unit.variable], unit))
    with pytest.raises(StoreError, match="must be readable and writable"):
        Store.create_or_resume(small_disk / "new.zarr", small_layout())
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert_resumes(path, tmp_path)
    observed("the disk turns read-only", "StoreError: mend its permissions; resumed after that")


def test_lost_mount_is_not_written_beneath(
    small_disk: Path, tmp_path: Path, observed: Observed
) -> None:
    path = small_disk / "run.zarr"
    store = Store.create_or_resume(path, small_layout())
    unit = store.units()[0]
    subprocess.run(["umount", "-l", str(small_disk)], check=True)
    with pytest.raises(StoreError, match="disk must stay in reach"):
        store.write(unit, values_of(store.variables[unit.variable], unit))
    with pytest.raises(StoreError, match="disk must stay in reach"):
        store.claim([unit])
    with pytest.raises(StoreError, match="disk must stay in reach"):
        store.pending()
    assert list(small_disk.iterdir()) == []
    path.mkdir()  # even where a folder of that name lies beneath
    with pytest.raises(StoreError, match="disk must stay in reach"):
        store.write(unit, values_of(store.variables[unit.variable], unit))
    assert list(path.iterdir()) == []
    observed("the disk is unmounted during the run", "StoreError: mount it again; nothing astray")


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EIO, errno.EDQUOT], ids=lambda c: errno.errorcode[c]
)
def test_failed_sync_leaves_the_unit_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observed: Observed, code: int
) -> None:
    path = tmp_path / "run.zarr"
    store = Store.create_or_resume(path, small_layout())
    unit = store.units()[0]

    def failing(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StoreError, match="finished units are kept"):
            store.write(unit, values_of(store.variables[unit.variable], unit))
    assert not store.is_done(unit)
    assert_resumes(path, tmp_path)
    observed(f"{errno.errorcode[code]} while syncing", "StoreError; the unit stays undone; resumed")


def test_too_little_space_is_refused_before_the_start(tmp_path: Path) -> None:
    shape = (1, 1 << 20, 1 << 10, 1 << 12)  # 16 TiB
    huge = Variable("z", ("metric", "pair", "layer", "pos"), shape, (1 << 14, 1 << 8), {})
    coords = {name: ((name,), np.arange(n)) for name, n in (("metric", 1), ("pair", 1 << 20))}
    with pytest.raises(StoreError, match=r"need up to 17.59 TB, .* left; free some space"):
        Store.create_or_resume(tmp_path / "run.zarr", Layout((huge,), coords, {}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="must be readable and writable"):
            Store.create_or_resume(tmp_path / "run.zarr", small_layout())
    finally:
        tmp_path.chmod(0o700)
