"""The store of a run: each shard is written once and then flagged; xarray reads it.

The values of a shard (`Unit`) are one file, written atomically. Its flag, which holds the digest of
that file, is written after it. So a kill at any moment leaves complete and missing shards and
perhaps a partial file, never a torn shard, and a rerun of the same command ends with the same bytes
as an undisturbed run. A shard is done if its flag exists and its file matches the digest; lost or
damaged shards are computed again. Beside the store lie `<store>.leases` (which process computes
which shard, see `lease`) and `<store>.journal` (see `journal`). Both hold hosts and times; the
store itself holds none.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from patchsweep.errors import DamagedError, StoreError
from patchsweep.store.attributes import attributes
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import Folder
from patchsweep.store.contents import KIND, ROOT, Contents, digests_of, read_contents, read_root
from patchsweep.store.difference import attribute_differences
from patchsweep.store.digest import digest_of, seal
from patchsweep.store.layout import (
    COMPLETE,
    FIXED,
    Encoder,
    Layout,
    Unit,
    Variable,
    first_difference,
    fixed_key,
    group_of,
    layout_files,
    references_key,
)
from patchsweep.store.lease import Leases
from patchsweep.store.survey import Survey, survey, survey_pairs, survey_units

if TYPE_CHECKING:
    import xarray as xr

_FILE_BYTES = 4096  # disk space of a small file


class Store(AbstractContextManager["Store"]):
    """A Zarr v3 group on a disk or behind a URL; `with store:` releases its leases at the end."""

    def __init__(self, contents: Contents) -> None:
        """Use `Store.create_or_resume` or `Store.open`."""
        self.folder = folder = contents.folder
        self.contents = contents
        folder.check()
        if not contents.is_sweep:
            raise _no_sweep(folder, contents.attrs)
        contents.group()  # raises if a file is damaged
        self.variables = contents.variables
        self.n_metrics, self.n_pairs = self.contents.fixed_shape()
        self.attrs: dict[str, Any] = attributes(self.contents.attrs)
        self._encoders: dict[str, Encoder] = {}
        self._leases = Leases(folder.beside(".leases"))
        self._references_there: set[int] = set()

    @classmethod
    def create_or_resume(
        cls,
        url: str | Path,
        layout: Layout,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open the store at `url`, or create it; any number of processes may do so at once.

        `storage_options` go to fsspec unchanged (retries, timeouts, endpoint); credentials come
        from the environment alone.

        Raises:
            StoreError: the store belongs to another run (with the first difference), `url` holds
                something else, it cannot be written, or the values would not fit.
        """
        folder = open_folder(url, storage_options)
        files = layout_files(layout)
        stored = {key: folder.read(key) for key in files}
        if fresh := stored[ROOT] is None and stored[COMPLETE] is None:
            _check_free(folder)
            check_space(url, layout, storage_options)
            folder.make()
            folder.put_new(ROOT, files[ROOT])
            stored = {key: folder.read(key) for key in files}
        changed = {key for key, data in files.items() if stored[key] != data}
        if _are_ours(changed, files, stored):
            for key in (key for key in files if key in changed):
                folder.put(key, files[key])
        elif not digests_of(stored[COMPLETE]):
            _finish(folder, files)  # its creator was killed, or is still at work
        folder.sweep()
        contents = read_contents(folder)
        if contents.files[COMPLETE] != files[COMPLETE]:
            _refuse(folder, first_difference(group_of(files), contents.group()))
        store = cls(contents)
        if not fresh:
            _check_space(folder, list(store.variables.values()), store.survey().to_do)
        return store

    @classmethod
    def open(cls, url: str | Path, *, storage_options: Mapping[str, Any] | None = None) -> Self:
        """Open the existing store at `url`.

        Raises:
            DamagedError: a file of metadata or coordinates does not match its digest.
            StoreError: `url` holds nothing, something else, or an incompletely created store.
        """
        return cls(read_contents(open_folder(url, storage_options)))

    def units(self) -> list[Unit]:
        """Return all shards, variable by variable, ordered by pairs and then layers."""
        return [unit for variable in self.variables.values() for unit in variable.units()]

    def survey(self, *, read: bool = False) -> Survey:
        """List pending and damaged shards, by the existence and length of files.

        `read` checks the digest of each file too.
        """
        self.folder.check()
        return survey(self.contents, read=read)

    def pending(self, units: Iterable[Unit] | None = None) -> list[Unit]:
        """Return those of `units` (default: all) that are missing or damaged; reads every file."""
        self.folder.check()
        candidates = self.units() if units is None else list(units)
        pending, damaged = survey_units(self.contents, candidates, read=True)
        to_do = {*pending, *damaged}
        return [unit for unit in candidates if unit in to_do]

    def pending_pairs(self) -> list[int]:
        """Return pairs whose unpatched metrics are missing or damaged; reads every file."""
        pending, damaged = survey_pairs(self.contents, read=True)
        return sorted({*pending, *damaged})

    def is_done(self, unit: Unit) -> bool:
        """Whether the shard's flag exists and its file matches the flag."""
        variable = self.variables[unit.variable]
        flag = self.folder.read(variable.flag_key(unit))
        key = variable.shard_key(unit)
        data = self.folder.read(key) if flag else None
        return data is not None and seal(self.contents.identity, key, data) == flag

    def claim(self, units: Iterable[Unit]) -> list[Unit]:
        """Lease `units` and return those that are not done and not leased by another process.

        A lease ends when the shard is written or released (`release`, `close`), when this process
        dies, or when it hangs for longer than a lease lasts.
        """
        self.folder.check()
        by_name = {unit.name: unit for unit in units}
        leased = [by_name[name] for name in self._leases.claim(by_name)]
        done = [unit for unit in leased if self.is_done(unit)]
        self.release(done)
        free = [unit for unit in leased if unit not in done]
        for unit in free:
            variable = self.variables[unit.variable]
            self.folder.sweep_file(variable.shard_key(unit))
            self.folder.sweep_file(variable.flag_key(unit))
        return free

    def beat(self) -> None:
        """Renew the leases of this process; cheap enough to call often."""
        self._leases.beat()

    def holders(self, units: Iterable[Unit]) -> dict[str, int]:
        """Count the leases among `units` per process name."""
        return dict(Counter(self._leases.holders(unit.name for unit in units).values()))

    def release(self, units: Iterable[Unit]) -> None:
        """Release claimed shards, so that other processes can claim them."""
        self._leases.release(unit.name for unit in units)

    def write(self, unit: Unit, values: np.ndarray) -> None:
        """Write a shard's `values` (of shape `Variable.block_shape`), and then its flag.

        Does nothing if the shard is done: two processes compute one shard if one of them hung and
        lost its lease, and then the first writes it.

        Raises:
            StoreError: `values` have another shape, or the storage fails; the shard then stays
                pending.
        """
        variable = self.variables[unit.variable]
        if values.shape != (shape := variable.block_shape(unit)):
            raise StoreError(
                f"values of unit {unit.name} have shape {values.shape}; its block has {shape}"
            )
        if self.is_done(unit):
            return
        key = variable.shard_key(unit)
        data = self._encoder(variable.name).encode(variable.slices(unit), _plain(values))
        self.folder.put(key, data)
        self.folder.put(variable.flag_key(unit), seal(self.contents.identity, key, data))
        self.release([unit])

    def write_references(self, first_pair: int, base: np.ndarray, source: np.ndarray) -> None:
        """Write base and source metric `[metric, pair]` of the pairs from `first_pair` on.

        Each of a pair's two metrics is one file; both share a flag. Only missing or damaged files
        are written.

        Raises:
            StoreError: the shapes do not fit the store, or the storage fails.
        """
        for name, values in zip(FIXED, (base, source), strict=True):
            if len(values) != self.n_metrics or first_pair + values.shape[1] > self.n_pairs:
                raise StoreError(
                    f"{name} has {self.n_metrics} metrics and {self.n_pairs} pairs; "
                    f"{values.shape} from pair {first_pair} on does not fit"
                )
        for i, pair in enumerate(range(first_pair, first_pair + base.shape[1])):
            if pair not in self._references_there and not self.has_references(pair):
                self._write_pair(pair, base[:, i : i + 1], source[:, i : i + 1])
            self._references_there.add(pair)

    def has_references(self, pair: int) -> bool:
        """Whether both unpatched metrics of a pair are written and match their flag."""
        flag = self.folder.read(references_key(pair))
        if not flag:
            return False
        files = [(key, self.folder.read(key)) for key in (fixed_key(n, pair) for n in FIXED)]
        return flag == b"".join(seal(self.contents.identity, k, data or b"") for k, data in files)

    def dataset(self) -> xr.Dataset:
        """Return the Dataset of `open_store(url)`; values are read lazily."""
        from patchsweep.store.dataset import dataset_of  # a late import, since it loads xarray

        return dataset_of(self.contents)

    def close(self) -> None:
        """Release all leases."""
        self._leases.close()

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _write_pair(self, pair: int, *metrics: np.ndarray) -> None:
        where = (slice(None), slice(pair, pair + 1))
        flag_key, flag = references_key(pair), b""
        flagged = self.folder.exists(flag_key)
        for name, values in zip(FIXED, metrics, strict=True):
            key = fixed_key(name, pair)
            data = self._encoder(name).encode(where, _plain(values))
            if flagged or not self.folder.put_new(key, data):
                stored = None if flagged else self.folder.read(key)
                if stored is not None and self._agree(name, stored, values):
                    data = stored  # another machine wrote it first, with other last bits
                else:
                    self.folder.put(key, data)
            flag += seal(self.contents.identity, key, data)
        self.folder.put(flag_key, flag)

    def _agree(self, name: str, data: bytes, values: np.ndarray) -> bool:
        try:
            stored = self.contents.form(name).decode(data)
        except ValueError:
            return False
        return np.allclose(stored, values, rtol=1e-3, atol=1e-3, equal_nan=True)

    def _encoder(self, array: str) -> Encoder:
        if array not in self._encoders:
            self._encoders[array] = Encoder(self.contents.files[f"{array}/{ROOT}"])
        return self._encoders[array]


def recorded_attributes(
    url: str | Path, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any] | None:
    """Return the attributes of the sweep at `url`; None if one can be created or repaired there.

    Raises:
        StoreError: `url` holds something else, or cannot be written.
    """
    folder = open_folder(url, storage_options)
    folder.check_writable()
    try:
        attrs = read_root(folder)
    except DamagedError:
        return None  # `create_or_resume` repairs a damaged store of this run; likewise below
    if attrs is None:
        _check_free(folder)
        return None
    if KIND in attrs:
        raise _no_sweep(folder, attrs)
    recorded = digests_of(folder.read(COMPLETE)).get(ROOT)
    if recorded not in (None, digest_of(folder.read(ROOT) or b"")):
        return None  # damaged
    return attributes(attrs)


def _no_sweep(folder: Folder, attrs: Mapping[str, Any]) -> StoreError:
    kind = f"of `patchsweep {attrs[KIND]}`" if KIND in attrs else "that were put there at once"
    return StoreError(
        f"{folder.shown} holds results {kind}, and no sweep in units; give another path"
    )


def check_space(
    url: str | Path, layout: Layout, storage_options: Mapping[str, Any] | None = None
) -> None:
    """Raise a StoreError if the values of `layout` would not fit."""
    units = [unit for variable in layout.variables for unit in variable.units()]
    _check_space(open_folder(url, storage_options), layout.variables, units)


def _check_free(folder: Folder) -> None:
    # if another process created a store between the two reads, its root exists now
    if not folder.is_empty() and read_root(folder) is None:
        raise StoreError(
            f"a store starts in an empty folder, and {folder.shown} holds other things; "
            "give another path"
        )


def _are_ours(
    changed: set[str], files: Mapping[str, bytes], there: Mapping[str, bytes | None]
) -> bool:
    """Whether the store is this run's, so that `changed` files are damaged ones."""
    if COMPLETE not in changed:
        return True
    if changed != {COMPLETE}:
        return False
    # all files of this run exist; another run may have these files and more
    digests, stored_digests = (digests_of(data) for data in (files[COMPLETE], there[COMPLETE]))
    if not stored_digests:
        return True
    names, stored_names = (
        [json.loads(data or b"")["attributes"].get(key) for key in ("coords", "variables")]
        for data in (files[COMPLETE], there[COMPLETE])
    )
    # one damaged byte leaves either the names or the digests' keys unchanged
    return names == stored_names or digests.keys() == stored_digests.keys()


def _finish(folder: Folder, files: Mapping[str, bytes]) -> None:
    """Write the missing files of an incompletely created store, `COMPLETE` last."""
    stored_attrs = read_root(folder)
    assert stored_attrs is not None
    attrs = json.loads(files[ROOT])["attributes"]
    _refuse(folder, next(attribute_differences(attrs, stored_attrs), None))
    for key, data in files.items():
        if key not in (ROOT, COMPLETE) and not folder.put_new(key, data):
            raise StoreError(
                f"another run, with other settings, has begun to make {folder.shown} "
                f"({key} differs); give another path, or delete that folder"
            )
    folder.put(COMPLETE, files[COMPLETE])


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
    """Return a float32 copy with one bit pattern of NaN, so that equal values are equal bytes."""
    values = np.array(values, dtype=np.float32)
    values[np.isnan(values)] = np.nan
    return values
