"""Stores of an analysis, such as edges or a lens: one Zarr group, written at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr
import zarr

from patchsweep.errors import DamagedError, StoreError
from patchsweep.store.attributes import attributes, flat_attributes
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import PARTIAL, Folder
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.contents import DELETE, MEND, ROOT, parse, read_contents
from patchsweep.store.dataset import results_of
from patchsweep.store.difference import attribute_differences
from patchsweep.store.layout import COMPLETE, FORMAT, FORMAT_KEY, PROGRESS, settled, with_digests

WRITING = f"whole{PARTIAL}"  # behind a URL: marks a write in progress, and holds its attributes


def save_dataset(
    ds: xr.Dataset, url: str | Path, storage_options: Mapping[str, Any] | None = None
) -> None:
    """Write `ds` to a new store; an analysis' attributes name its `kind`.

    On a disk the write is atomic, even if power fails. Behind a URL the root `zarr.json`, without
    which nothing is read, comes last; the next write with the same attributes overwrites the
    remains of an interrupted one.

    Raises:
        StoreError: `url` is occupied or cannot be written.
    """
    folder = open_folder(url, storage_options)
    if not _is_free(folder, ds.attrs):
        raise _occupied(folder)
    files = _files(ds)
    if isinstance(folder, LocalFolder):
        if not folder.put_together(files):
            raise _occupied(folder)  # another process finished first
        return
    folder.put(WRITING, json.dumps(flat_attributes(ds.attrs)).encode())
    for key in sorted(files, key=lambda key: key == ROOT):
        folder.put(key, files[key])
    folder.delete(WRITING)


def load_dataset(
    url: str | Path, attrs: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> xr.Dataset | None:
    """Load the results at `url` if they have the attributes `attrs`; None if the place is free.

    The results may have further attributes. Attributes are compared after a round trip through
    JSON, so that a tuple equals a list.

    Raises:
        DamagedError: a file does not match its digest.
        StoreError: `url` holds something else (with the first difference).
    """
    folder = open_folder(url, storage_options)
    if _is_free(folder, attrs):
        return None
    if not folder.exists(ROOT) and not folder.exists(COMPLETE):
        raise StoreError(
            f"{folder.shown} holds no results that are whole; give another path, or delete it if "
            "nothing there is needed"
        )
    try:
        contents = read_contents(folder)
        contents.group()
    except DamagedError as error:
        raise DamagedError(str(error).replace(MEND, DELETE)) from None
    expected = _plain(attrs)
    stored = {key: contents.attrs[key] for key in expected if key in contents.attrs}
    difference = next(attribute_differences(expected, stored), None)
    if difference is not None:
        raise StoreError(
            f"{folder.shown} holds other results: {difference}; give another path, or delete it"
        )
    return results_of(contents)


def check_place(
    url: str | Path, attrs: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> None:
    """Check, before results with `attrs` are computed, that they can be written to `url`.

    Raises:
        StoreError: `url` is occupied or cannot be written.
    """
    folder = open_folder(url, storage_options)
    if not _is_free(folder, attrs):
        raise _occupied(folder)
    folder.check_writable()


def _is_free(folder: Folder, attrs: Mapping[str, Any]) -> bool:
    """Whether the folder is empty, or holds the remains of an interrupted write with `attrs`."""
    if folder.is_empty():
        return True
    if isinstance(folder, LocalFolder) or folder.exists(ROOT):
        return False
    marker = folder.read(WRITING)
    if marker is None:
        return False
    stored = attributes(parse(marker) or {})
    return all(stored.get(key) == value for key, value in _plain(attrs).items())


def _occupied(folder: Folder) -> StoreError:
    return StoreError(
        f"results are written to an empty place, and something lies at {folder.shown}; give "
        "another path, or delete it"
    )


def _files(ds: xr.Dataset) -> dict[str, bytes]:
    """Return the files of a Zarr group that holds `ds`, with their digests."""
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    flat = ds.copy()
    flat.attrs = {**flat_attributes(ds.attrs), FORMAT_KEY: FORMAT}
    # write a file for every chunk, so that a missing file means a loss
    with zarr.config.set({"array.write_empty_chunks": True}):
        flat.to_zarr(MemoryStore(memory), zarr_format=3, consolidated=False)
        zarr.create_group(MemoryStore(memory), path=PROGRESS, zarr_format=3)
    return with_digests({key: settled(key, data.to_bytes()) for key, data in memory.items()})


def _plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested attributes as they are after a write and a read."""
    return attributes(flat_attributes(attrs))
