"""The store of a run: units of work written once, flagged when they are on disk, read by xarray.

A unit's values are one shard, hence one file, put whole; its flag is put after it. So a kill at
any moment leaves finished units, unfinished units and perhaps a partial file, never a torn
shard, and the same command run again ends in the very bytes of an undisturbed run. Beside the
store lie `<store>.leases` (who works on what, see `lease`) and `<store>.journal` (see `journal`);
both hold hosts and times, the store itself holds none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import xarray as xr
import zarr

from patchsweep.attributes import attributes
from patchsweep.errors import StoreError
from patchsweep.store.address import open_folder
from patchsweep.store.difference import OLD, attribute_differences, is_old
from patchsweep.store.folder import Folder
from patchsweep.store.layout import (
    COMPLETE,
    FIXED,
    FORMAT,
    FORMAT_KEY,
    PROGRESS,
    Encoder,
    Layout,
    Unit,
    Variable,
    first_difference,
    fixed_key,
    group_of,
    layout_files,
    read_variables,
)
from patchsweep.store.lease import Leases

_FILE_BYTES = 4096  # what a small file takes on a disk


class Store:
    """A Zarr v3 group on a disk or behind a URL. `with store:` gives back its leases at the end."""

    def __init__(self, folder: Folder) -> None:
        """Use `Store.create_or_resume` or `Store.open`."""
        self.folder = folder
        folder.check()
        with folder.guard():
            root: Any = _group(folder)
            try:
                self.variables: dict[str, Variable] = read_variables(root)
                shape: tuple[int, int] = root[FIXED[0]].shape
            except KeyError as error:
                raise StoreError(
                    f"{folder.shown} has lost {error.args[0]}/zarr.json; put it back from a copy, "
                    "or give another path and start afresh"
                ) from None
            self.n_metrics, self.n_pairs = shape
            self.attrs: dict[str, Any] = attributes(root.attrs)
        self._encoders: dict[str, Encoder] = {}
        self._leases = Leases(folder.beside(".leases"))
        self._fixed_there: set[str] = set()

    @classmethod
    def create_or_resume(
        cls,
        url: str | Path,
        layout: Layout,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """The store at `url`, made if nothing lies there. Many processes may call this at once.

        `storage_options` go to fsspec as they are (retries, timeouts, endpoint); credentials come
        from the environment alone.

        Raises:
            StoreError: the store belongs to another run (the first difference is named), what
                lies there is no store, it cannot be written, or the values would not fit.
        """
        folder = open_folder(url, storage_options)
        files = layout_files(layout)
        root = _read_root(folder)
        if fresh := root is None:
            # made between two looks it is a rival's work, which begins with its root
            if not folder.is_empty() and _read_root(folder) is None:
                raise StoreError(
                    f"a store starts in an empty folder, and {folder.shown} holds other things; "
                    "give another path"
                )
            _check_space(folder, layout.variables, [u for v in layout.variables for u in v.units()])
            folder.make()
            folder.put_new("zarr.json", files["zarr.json"])
            root = _read_root(folder)
        assert root is not None
        mine = json.loads(files["zarr.json"])["attributes"]
        if is_old(mine, root):
            raise StoreError(f"{folder.shown} {OLD}")
        if not folder.exists(COMPLETE):  # its maker was killed, or is at work right now
            _refuse(folder, next(attribute_differences(mine, root), None))
            for key, data in files.items():
                if key != "zarr.json" and not folder.put_new(key, data):
                    raise StoreError(
                        f"another run, with other settings, has begun to make {folder.shown} "
                        f"({key} differs); give another path, or delete that folder"
                    )
        folder.sweep()
        with folder.guard():
            difference = first_difference(group_of(files), _group(folder))
        _refuse(folder, difference)
        store = cls(folder)
        if not fresh:
            _check_space(folder, list(store.variables.values()), store.pending())
        return store

    @classmethod
    def open(cls, url: str | Path, *, storage_options: Mapping[str, Any] | None = None) -> Self:
        """The existing store at `url`.

        Raises:
            StoreError: nothing lies there, or something else, or a store whose making was cut off.
        """
        folder = open_folder(url, storage_options)
        if _read_root(folder) is None:
            raise StoreError(
                f"there is no store at {folder.shown}; check the address, or start the run that "
                "writes it"
            )
        if not folder.exists(COMPLETE):
            raise StoreError(
                f"the store at {folder.shown} was cut off while it was made; run its command again"
            )
        return cls(folder)

    def units(self) -> list[Unit]:
        """Every unit, variable by variable, pairs first."""
        return [unit for variable in self.variables.values() for unit in variable.units()]

    def pending(self) -> list[Unit]:
        """The units that are not done, in the order of `units`."""
        self.folder.check()
        done = set(self.folder.list(PROGRESS))
        return [u for u in self.units() if self.variables[u.variable].flag_key(u) not in done]

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit's values are on disk for good."""
        return self.folder.exists(self.variables[unit.variable].flag_key(unit))

    def claim(self, units: Iterable[Unit]) -> list[Unit]:
        """Those of `units` that this process may work on now: not done, and nobody else's.

        What is claimed stays so until it is written, given back (`release`, `close`), or until
        this process has died or has hung for longer than a lease lasts.
        """
        self.folder.check()
        wanted = {unit.name: unit for unit in units}
        mine = [wanted[name] for name in self._leases.claim(wanted)]
        done = [unit for unit in mine if self.is_done(unit)]
        self.release(done)
        free = [unit for unit in mine if unit not in done]
        for unit in free:
            variable = self.variables[unit.variable]
            self.folder.sweep_file(variable.shard_key(unit))
            self.folder.sweep_file(variable.flag_key(unit))
        return free

    def release(self, units: Iterable[Unit]) -> None:
        """Give back units that were claimed, so that others can have them."""
        self._leases.release(unit.name for unit in units)

    def write(self, unit: Unit, values: np.ndarray) -> None:
        """Write a unit's `values`, of the shape of its block, and then its flag.

        Nothing happens if the unit is done already, or if its lease has passed to another process.

        Raises:
            StoreError: `values` have another shape, or the storage fails; the unit is then to be
                done again.
        """
        variable = self.variables[unit.variable]
        if values.shape != (shape := variable.block_shape(unit)):
            raise StoreError(
                f"values of unit {unit.name} have shape {values.shape}; its block has {shape}"
            )
        if self._leases.has_lost(unit.name):
            return
        if not self._leases.holds(unit.name) and self.is_done(unit):  # `claim` has asked that
            return
        data = self._encoder(variable.name).encode(variable.slices(unit), _plain(values))
        self.folder.put(variable.shard_key(unit), data)
        self.folder.put(variable.flag_key(unit), self._flag(variable.name))
        self.release([unit])

    def write_fixed(self, name: str, first_pair: int, values: np.ndarray) -> None:
        """Write `values` [metric, pair] of `base_metric` or `source_metric` from `first_pair` on.

        Each pair is a file of its own, and whoever comes first writes it.
        """
        if len(values) != self.n_metrics or first_pair + values.shape[1] > self.n_pairs:
            raise StoreError(
                f"{name} has {self.n_metrics} metrics and {self.n_pairs} pairs; "
                f"{values.shape} from pair {first_pair} on does not fit"
            )
        for i in range(values.shape[1]):
            pair = first_pair + i
            key = fixed_key(name, pair)
            if key not in self._fixed_there:
                where = (slice(None), slice(pair, pair + 1))
                data = self._encoder(name).encode(where, _plain(values[:, i : i + 1]))
                self.folder.put_new(key, data)
                self._fixed_there.add(key)

    def missing_fixed(self) -> list[tuple[str, int]]:
        """(name, pair) of each unpatched metric that has not been written."""
        return [
            (name, pair)
            for name in FIXED
            for there in [set(self.folder.list(name))]
            for pair in range(self.n_pairs)
            if fixed_key(name, pair) not in there
        ]

    def dataset(self) -> xr.Dataset:
        """The store as `xarray.open_zarr(url, consolidated=False)` gives it, values read lazily."""
        with self.folder.guard():
            return xr.open_zarr(self.folder.zarr_store(), consolidated=False, chunks=None)

    def close(self) -> None:
        """Give back all that is claimed."""
        self._leases.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _encoder(self, array: str) -> Encoder:
        if array not in self._encoders:
            self.folder.check()
            metadata = self.folder.read(f"{array}/zarr.json")
            if metadata is None:
                raise StoreError(f"{self.folder.shown} has lost {array}/zarr.json; start afresh")
            self._encoders[array] = Encoder(metadata)
        return self._encoders[array]

    def _flag(self, variable: str) -> bytes:
        one = slice(0, 1)
        return self._encoder(f"{PROGRESS}/{variable}").encode((one, one), np.ones((1, 1), bool))


def _group(folder: Folder) -> zarr.Group:
    return zarr.open_group(folder.zarr_store(), mode="r", zarr_format=3, use_consolidated=False)


def _read_root(folder: Folder) -> dict[str, Any] | None:
    """The store's attributes; None if there is no Zarr group.

    Raises:
        StoreError: it is none of ours, or of a format that this version does not know.
    """
    data = folder.read("zarr.json")
    if data is None:
        return None
    try:
        attrs = json.loads(data)["attributes"]
        found = attrs[FORMAT_KEY]
    except (ValueError, KeyError, TypeError):
        raise StoreError(
            f"{folder.shown} is a Zarr store, but none that patchsweep has written; give "
            "another path"
        ) from None
    if found != FORMAT:
        raise StoreError(
            f"{folder.shown} has store format {found!r}, and this patchsweep reads {FORMAT}; use "
            "the version that wrote it, or give another path"
        )
    return attributes(attrs)


def _refuse(folder: Folder, difference: str | None) -> None:
    if difference is not None:
        raise StoreError(
            f"{folder.shown} belongs to another run: {difference}; give another path, or the "
            "settings that it was begun with"
        )


def _check_space(folder: Folder, variables: Sequence[Variable], pending: Sequence[Unit]) -> None:
    free = folder.free_bytes()
    if free is None:
        return
    by_name = {variable.name: variable for variable in variables}
    needed = sum(
        4 * math.prod(by_name[unit.variable].block_shape(unit)) + 2 * _FILE_BYTES
        for unit in pending
    )
    if needed > free:
        raise StoreError(
            f"the values need up to {_size(needed)}, and {folder.shown} has {_size(free)} left; "
            "free some space, or give a path on another disk"
        )


def _size(n_bytes: int) -> str:
    size, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size >= 1000:
            size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"


def _plain(values: np.ndarray) -> np.ndarray:
    """A float32 copy with one kind of NaN, so that equal values are equal bytes."""
    values = np.array(values, dtype=np.float32)
    values[np.isnan(values)] = np.nan
    return values
