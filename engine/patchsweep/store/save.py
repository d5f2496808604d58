"""Results that are computed whole, such as edges or a lens: one Zarr group, put there at once."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

import xarray as xr
import zarr

from patchsweep.errors import DamagedError, StoreError
from patchsweep.store.attributes import attributes, flat_attributes
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import PARTIAL, Folder
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.backends.process import is_gone, process_name
from patchsweep.store.contents import DELETE, MEND, ROOT, parse, read_contents
from patchsweep.store.dataset import results_of
from patchsweep.store.difference import attribute_differences
from patchsweep.store.layout import COMPLETE, FORMAT, FORMAT_KEY, PROGRESS, settled, with_digests

WRITING = f"whole{PARTIAL}"  # behind a URL: the attributes of results that are being put there
_COUNTER = itertools.count()  # no two partial folders of this process have one name


def save_dataset(
    ds: xr.Dataset, url: str | Path, storage_options: Mapping[str, Any] | None = None
) -> None:
    """Write `ds` to a store that is not there yet; an analysis' attributes name its `kind`.

    On a disk it is there whole or not at all, also after a loss of power. Behind a URL the root
    `zarr.json`, without which nothing is read, comes last; what an interrupted write left there is
    written over by the next one with the same attributes.

    Raises:
        StoreError: something lies there already, or it cannot be written.
    """
    folder = open_folder(url, storage_options)
    if not _is_free(folder, ds.attrs):
        raise _occupied(folder)
    files = _files(ds)
    if isinstance(folder, LocalFolder):
        _put_at_once(folder, files)
        return
    folder.put(WRITING, json.dumps(flat_attributes(ds.attrs)).encode())
    for key in sorted(files, key=lambda key: key == ROOT):
        folder.put(key, files[key])
    folder.delete(WRITING)


def load_dataset(
    url: str | Path, attrs: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> xr.Dataset | None:
    """What lies at `url`, loaded, if it was made with these attributes; None if the place is free.

    It may have further attributes. Attributes are compared as JSON gives them back, so that a
    tuple equals a list.

    Raises:
        StoreError: something else lies there; the first difference is named.
    """
    folder = open_folder(url, storage_options)
    if _is_free(folder, attrs):
        return None
    if not folder.exists(ROOT) and not folder.exists(COMPLETE):
        raise StoreError(
            f"{folder.shown} holds no results that are whole; give another path, or delete it"
        )
    try:
        contents = read_contents(folder)
        contents.group()
    except DamagedError as error:
        raise DamagedError(str(error).replace(MEND, DELETE)) from None
    wanted = _plain(attrs)
    theirs = {key: contents.attrs[key] for key in wanted if key in contents.attrs}
    difference = next(attribute_differences(wanted, theirs), None)
    if difference is not None:
        raise StoreError(
            f"{folder.shown} holds other results: {difference}; give another path, or delete it"
        )
    return results_of(contents)


def check_place(
    url: str | Path, attrs: Mapping[str, Any], storage_options: Mapping[str, Any] | None = None
) -> None:
    """Refuse a place where results with `attrs` cannot be written, before they are computed.

    Raises:
        StoreError: something else lies there, or no file can be put there.
    """
    folder = open_folder(url, storage_options)
    if not _is_free(folder, attrs):
        raise _occupied(folder)
    folder.check_writable()


def _is_free(folder: Folder, attrs: Mapping[str, Any]) -> bool:
    """Whether nothing lies there, or what a write of results with `attrs` left as it broke off."""
    if folder.is_empty():
        return True
    if isinstance(folder, LocalFolder) or folder.exists(ROOT):
        return False
    begun = folder.read(WRITING)
    if begun is None:
        return False
    told = attributes(parse(begun) or {})
    return all(told.get(key) == value for key, value in _plain(attrs).items())


def _put_at_once(folder: LocalFolder, files: Mapping[str, bytes]) -> None:
    """Write the files to a folder beside, each to the platter, and give that folder the name."""
    place = folder.path
    for left in place.parent.glob(f"{escape(place.name)}~*~*{PARTIAL}"):
        if is_gone(left.name.removesuffix(PARTIAL).rsplit("~", 2)[1]):
            shutil.rmtree(left, ignore_errors=True)
    mark = f"~{process_name()}~{next(_COUNTER)}{PARTIAL}"
    partial = LocalFolder(place.with_name(place.name + mark))
    partial.shown = folder.shown
    try:
        partial.make()
        for key, data in files.items():
            partial.put(key, data)
        with folder.guard():
            try:
                partial.path.rename(place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise _occupied(folder) from None  # another process was quicker
            handle = os.open(place.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
    finally:
        shutil.rmtree(partial.path, ignore_errors=True)


def _occupied(folder: Folder) -> StoreError:
    return StoreError(
        f"results are written to an empty place, and something lies at {folder.shown}; give "
        "another path, or delete it"
    )


def _files(ds: xr.Dataset) -> dict[str, bytes]:
    """The files of the Zarr group that holds `ds`, with the digests of them all."""
    from zarr.storage import MemoryStore

    memory: dict[str, Any] = {}
    made = ds.copy()
    made.attrs = {**flat_attributes(ds.attrs), FORMAT_KEY: FORMAT}
    with zarr.config.set({"array.write_empty_chunks": True}):  # what is missing is lost
        made.to_zarr(MemoryStore(memory), zarr_format=3, consolidated=False)
        zarr.create_group(MemoryStore(memory), path=PROGRESS, zarr_format=3)
    return with_digests({key: settled(key, data.to_bytes()) for key, data in memory.items()})


def _plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Nested attributes as they are read back."""
    return attributes(flat_attributes(attrs))
