"""A store as an `xarray.Dataset`: values are read lazily, and each file beside its digest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from xarray.backends import BackendArray
from xarray.core import indexing

from patchsweep.errors import StoreError
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import Folder
from patchsweep.store.contents import Contents, damaged, read_contents
from patchsweep.store.digest import SEAL_BYTES, seal
from patchsweep.store.layout import FIXED, FORMAT_KEY, Variable, fixed_key, references_key
from patchsweep.store.shard import ShardForm


def open_store(url: str | Path, *, storage_options: Mapping[str, Any] | None = None) -> xr.Dataset:
    """What a sweep or an analysis wrote to `url`; the values of a sweep are read lazily.

    Every file is held against its digest when it is read. `xarray.open_zarr(url,
    consolidated=False)` gives the same values, and takes a lost file for one that was not written.
    NaN is what has not run.

    Raises:
        DamagedError: a file is not as it was written; that of values is told when they are read.
        StoreError: there is no store, or one of another program.
    """
    folder = open_folder(url, storage_options)
    contents = read_contents(folder)
    return dataset_of(folder, contents) if contents.is_sweep else results_of(contents)


def results_of(contents: Contents) -> xr.Dataset:
    """The results of an analysis, loaded."""
    group = contents.group()
    with xr.open_zarr(group.store, zarr_format=3, consolidated=False, chunks=None) as ds:
        found = ds.load()
    found.attrs.pop(FORMAT_KEY, None)
    return found


def dataset_of(folder: Folder, contents: Contents) -> xr.Dataset:
    """A sweep's variables, unpatched metrics and coordinates."""
    group: Any = contents.group()
    n_metrics, n_pairs = contents.fixed_shape()
    identity = contents.identity
    arrays: dict[str, xr.Variable] = {}
    for variable in contents.variables().values():
        files = _Units(folder, identity, contents.form(variable.name), variable)
        arrays[variable.name] = _lazy(variable.dims, variable.shape, files, variable.attrs)
    for i, name in enumerate(FIXED):
        fixed = _Pairs(folder, identity, contents.form(name), name, i)
        dims, shape = ("metric", "pair"), (n_metrics, n_pairs)
        arrays[name] = _lazy(dims, shape, fixed, dict(group[name].attrs))
    coords = {}
    for name in contents.coords():
        values = np.asarray(group[name][...])
        # text is kept as objects, as it was given
        values = values if values.dtype.kind in "iufb" else values.astype(object)
        coords[name] = (tuple(group[name].metadata.dimension_names), values)
    attrs = {key: value for key, value in contents.attrs.items() if key != "coordinates"}
    return xr.Dataset(arrays, coords=coords, attrs=attrs)


@dataclass(frozen=True)
class _Units:
    """The files of a variable's units."""

    folder: Folder
    identity: bytes
    form: ShardForm
    variable: Variable

    @property
    def cut(self) -> tuple[int, ...]:
        return self.form.shape

    def read(self, block: Mapping[str, int]) -> np.ndarray | None:
        """The values of one unit; None if it has not run."""
        unit = self.variable.at(block["pair"], block.get("layer", 0))
        key, flag_key = self.variable.shard_key(unit), self.variable.flag_key(unit)
        return _read(self.folder, self.identity, self.form, key, self.folder.read(flag_key))


@dataclass(frozen=True)
class _Pairs:
    """The files of one of `FIXED`."""

    folder: Folder
    identity: bytes
    form: ShardForm
    name: str
    number: int  # which of `FIXED` it is

    @property
    def cut(self) -> tuple[int, ...]:
        return self.form.shape

    def read(self, block: Mapping[str, int]) -> np.ndarray | None:
        """The values of one pair; None if they are not written."""
        pair = block["pair"]
        flag = self.folder.read(references_key(pair)) or b""
        part = flag[self.number * SEAL_BYTES :][:SEAL_BYTES]
        return _read(self.folder, self.identity, self.form, fixed_key(self.name, pair), part)


def _read(
    folder: Folder, identity: bytes, form: ShardForm, key: str, flag: bytes | None
) -> np.ndarray | None:
    if not flag:
        return None
    data = folder.read(key)
    if data is None or seal(identity, key, data) != flag:
        what = "is lost" if data is None else "is not as it was written"
        raise damaged(folder.shown, f"{key} {what}")
    try:
        return form.decode(data)
    except ValueError as error:
        raise StoreError(
            f"{folder.shown} is not as patchsweep writes stores: {key} holds no values ({error}); "
            "do not trust it"
        ) from None


@dataclass(frozen=True)
class _Lazy(BackendArray):
    """An array that reads the files of which a part is wanted."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    files: _Units | _Pairs
    dtype = np.dtype("float32")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self._get)

    def _get(self, key: tuple[int | slice, ...]) -> np.ndarray:
        places = [
            part if isinstance(part, slice) else int(part) % n
            for part, n in zip(key, self.shape, strict=True)
        ]
        wanted = [
            range(n)[part : part + 1] if isinstance(part, int) else range(n)[part]
            for part, n in zip(places, self.shape, strict=True)
        ]
        out = np.full([len(part) for part in wanted], np.nan, np.float32)
        for block, target, inside in _blocks(wanted, self.files.cut):
            values = self.files.read(dict(zip(self.dims, block, strict=True)))
            if values is not None:
                out[target] = values[inside]
        return out[tuple(0 if isinstance(part, int) else slice(None) for part in places)]


def _blocks(
    wanted: list[range], cut: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """Each file that holds a part: its place among the files, and where that part lies in the
    result and in the file."""
    axes = []
    for part, size in zip(wanted, cut, strict=True):
        pieces: dict[int, list[int]] = {}  # file -> first and last place in the result
        for place, index in enumerate(part):
            pieces.setdefault(index // size, [place, place])[1] = place
        axes.append(
            [
                (block, slice(first, last + 1), _within(part, first, last, block * size))
                for block, (first, last) in pieces.items()
            ]
        )
    for chosen in itertools.product(*axes):
        blocks, targets, inside = zip(*chosen, strict=True)
        yield blocks, targets, inside


def _within(part: range, first: int, last: int, start: int) -> slice:
    stop = part[last] - start + (1 if part.step > 0 else -1)
    return slice(part[first] - start, stop if stop >= 0 else None, part.step)


def _lazy(
    dims: tuple[str, ...],
    shape: tuple[int, ...],
    files: _Units | _Pairs,
    attrs: Mapping[str, Any],
) -> xr.Variable:
    array = _Lazy(dims, shape, files)
    return xr.Variable(dims, indexing.LazilyIndexedArray(array), dict(attrs))
