"""Results that are computed whole, such as edges or a lens: one Zarr group, put there at once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from patchsweep.errors import StoreError
from patchsweep.store.address import open_folder
from patchsweep.store.local_folder import LocalFolder
from patchsweep.store.process import process_name

KIND = "kind"  # the attribute that says what a store holds: edges, circuit, lens, heads


def write_whole(
    ds: xr.Dataset, url: str | Path, storage_options: Mapping[str, Any] | None = None
) -> None:
    """Write `ds`, whose attributes name its `kind`, to a store that is not there yet.

    On a disk it is there whole or not at all; behind a URL its `zarr.json`, without which nothing
    is read, comes last.

    Raises:
        StoreError: something lies there already, or it cannot be written.
    """
    folder = open_folder(url, storage_options)
    if not folder.is_empty():
        raise StoreError(
            f"results are written to an empty place, and something lies at {folder.shown}; give "
            "another path, or delete it"
        )
    made = ds.copy()
    made.attrs = {key: _plain(value) for key, value in ds.attrs.items()}
    with folder.guard():
        if isinstance(folder, LocalFolder):
            partial = folder.path.with_name(f"{folder.path.name}~{process_name()}.partial")
            try:
                made.to_zarr(partial, zarr_format=3, consolidated=False)
                partial.replace(folder.path)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return
        memory: dict[str, Any] = {}
        made.to_zarr(_in_memory(memory), zarr_format=3, consolidated=False)
        for key in sorted(memory, key=lambda key: key == "zarr.json"):
            folder.put(key, memory[key].to_bytes())


def read_whole(
    url: str | Path, attrs: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> xr.Dataset | None:
    """What lies at `url` if it was made with these attributes; None if nothing lies there.

    Raises:
        StoreError: something else lies there; the first attribute that differs is named.
    """
    folder = open_folder(url, storage_options)
    if folder.is_empty():
        return None
    with folder.guard():
        try:
            found = xr.open_zarr(folder.zarr_store(), consolidated=False, chunks=None).load()
        except (FileNotFoundError, KeyError, ValueError):
            found = xr.Dataset()
    for key, value in attrs.items():
        if found.attrs.get(key) != _plain(value):
            raise StoreError(
                f"{folder.shown} holds other results ({key} differs); give another path, or "
                "delete it"
            )
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return json.loads(json.dumps(value))


def _in_memory(memory: dict[str, Any]) -> Any:
    from zarr.storage import MemoryStore

    return MemoryStore(memory)
