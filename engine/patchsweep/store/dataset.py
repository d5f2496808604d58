"""A store as an `xarray.Dataset`: values are read lazily, and checked against their digests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
    """Open the store of a sweep or an analysis at `url`; the values of a sweep are read lazily.

    NaN marks cells that have not run. Each file is checked against its digest when it is read.
    `xarray.open_zarr(url, consolidated=False)` gives the same values without the check, and reads
    a lost file as NaN.

    Raises:
        DamagedError: a file does not match its digest; files of values raise when they are read.
        StoreError: there is no store, or one of another program.
    """
    contents = read_contents(open_folder(url, storage_options))
    return dataset_of(contents) if contents.is_sweep else results_of(contents)


def results_of(contents: Contents) -> xr.Dataset:
    """Return the results of an analysis, loaded."""
    group = contents.group()
    with xr.open_zarr(group.store, zarr_format=3, consolidated=False, chunks=None) as ds:
        results = ds.load()
    results.attrs.pop(FORMAT_KEY, None)
    return results


def dataset_of(contents: Contents) -> xr.Dataset:
    """Return a sweep's variables, unpatched metrics and coordinates; values are read lazily."""
    group: Any = contents.group()
    arrays: dict[str, xr.Variable] = {}
    for variable in contents.variables.values():
        keys = partial(_keys_of_unit, variable)
        lazy = _Lazy.of(contents, variable.name, variable.dims, variable.shape, keys)
        arrays[variable.name] = xr.Variable(variable.dims, lazy, dict(variable.attrs))
    for i, name in enumerate(FIXED):
        part = slice(i * SEAL_BYTES, (i + 1) * SEAL_BYTES)
        dims, keys = ("metric", "pair"), partial(_keys_of_pair, name)
        lazy = _Lazy.of(contents, name, dims, contents.fixed_shape(), keys, part)
        arrays[name] = xr.Variable(dims, lazy, dict(group[name].attrs))
    coords = {}
    for name in contents.coords():
        values = np.asarray(group[name][...])
        # text as Python objects, not as fixed-width strings
        values = values if values.dtype.kind in "iufb" else values.astype(object)
        coords[name] = (tuple(group[name].metadata.dimension_names), values)
    attrs = {key: value for key, value in contents.attrs.items() if key != "coordinates"}
    return xr.Dataset(arrays, coords=coords, attrs=attrs)


def _keys_of_unit(variable: Variable, block: Mapping[str, int]) -> tuple[str, str]:
    """Return the keys of a shard's file and flag; `block`: dim -> block index."""
    unit = variable.at(block["pair"], block.get("layer", 0))
    return variable.shard_key(unit), variable.flag_key(unit)


def _keys_of_pair(name: str, block: Mapping[str, int]) -> tuple[str, str]:
    """Return the keys of the file and the flag of a pair's values of one of `FIXED`."""
    return fixed_key(name, block["pair"]), references_key(block["pair"])


@dataclass(frozen=True)
class _Lazy(BackendArray):
    """A float32 array that reads only the files that an index selects from."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    folder: Folder
    identity: bytes
    form: ShardForm
    keys: Callable[[Mapping[str, int]], tuple[str, str]]  # block -> keys of its file and its flag
    part: slice  # of the flag: the seal of the file
    dtype = np.dtype("float32")

    @classmethod
    def of(
        cls,
        contents: Contents,
        name: str,
        dims: tuple[str, ...],
        shape: tuple[int, ...],
        keys: Callable[[Mapping[str, int]], tuple[str, str]],
        part: slice = slice(None),
    ) -> indexing.LazilyIndexedArray:
        """Return the array `name` of a sweep."""
        form = contents.form(name)
        array = cls(dims, shape, contents.folder, contents.identity, form, keys, part)
        return indexing.LazilyIndexedArray(array)

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        basic = indexing.IndexingSupport.BASIC
        return indexing.explicit_indexing_adapter(key, self.shape, basic, self._get)

    def _get(self, key: tuple[int | slice, ...]) -> np.ndarray:
        index = [
            part if isinstance(part, slice) else int(part) % n
            for part, n in zip(key, self.shape, strict=True)
        ]
        ranges = [
            range(n)[part : part + 1] if isinstance(part, int) else range(n)[part]
            for part, n in zip(index, self.shape, strict=True)
        ]
        out = np.full([len(part) for part in ranges], np.nan, np.float32)
        for block, target, inside in _blocks(ranges, self.form.shape):
            values = self._read(dict(zip(self.dims, block, strict=True)))
            if values is not None:
                out[target] = values[inside]
        return out[tuple(0 if isinstance(part, int) else slice(None) for part in index)]

    def _read(self, block: Mapping[str, int]) -> np.ndarray | None:
        """Return the values of one file; None if it has not been written."""
        key, flag_key = self.keys(block)
        flag = (self.folder.read(flag_key) or b"")[self.part]
        if not flag:
            return None
        data = self.folder.read(key)
        if data is None or seal(self.identity, key, data) != flag:
            what = "is lost" if data is None else "is not as it was written"
            raise damaged(self.folder, f"{key} {what}")
        try:
            return self.form.decode(data)
        except ValueError as error:
            raise StoreError(
                f"{self.folder.shown} is not as patchsweep writes stores: {key} holds no values "
                f"({error}); do not trust it"
            ) from None


def _blocks(
    wanted: list[range], cut: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...], tuple[slice, ...]]]:
    """Yield (block index, slices of the result, slices of the file) for each file with a part of
    `wanted`."""
    axes = []
    for part, size in zip(wanted, cut, strict=True):
        pieces: dict[int, list[int]] = {}  # block -> first and last position in the result
        for position, index in enumerate(part):
            pieces.setdefault(index // size, [position, position])[1] = position
        axes.append(
            [
                (block, slice(first, last + 1), _within(part, first, last, block * size))
                for block, (first, last) in pieces.items()
            ]
        )
    for combination in itertools.product(*axes):
        blocks, targets, inside = zip(*combination, strict=True)
        yield blocks, targets, inside


def _within(part: range, first: int, last: int, start: int) -> slice:
    stop = part[last] - start + (1 if part.step > 0 else -1)
    return slice(part[first] - start, stop if stop >= 0 else None, part.step)
