"""What is wrong with a store on disk, and the checksums by which two stores are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from patchsweep.store.address import open_folder
from patchsweep.store.credentials import scrub
from patchsweep.store.folder import PARTIAL
from patchsweep.store.layout import COMPLETE, PROGRESS, Variable, array_names, fixed_key
from patchsweep.store.store import Store


def checksums(
    url: str | Path, *, storage_options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """SHA-256 of every file of the store, by its path within; empty if there is none.

    Two runs that gave the same values give equal dicts.
    """
    folder = open_folder(url, storage_options)
    return {key: hashlib.sha256(folder.read(key) or b"").hexdigest() for key in folder.list()}


def verify_structure(store: Store) -> list[str]:
    """What is wrong with the store's files, one line each; empty if nothing is.

    Everything that is done is read back (its checksums are compared on the way). Units that are
    not done are no problem: see `status`.
    """
    keys = set(store.folder.list())
    with store.folder.guard():
        root: Any = zarr.open_group(store.folder.zarr_store(), mode="r", use_consolidated=False)
        kinds = array_names(root)
    needed = {"zarr.json", COMPLETE}  # files that must be there
    possible = set()  # files that may be there
    for name, kind in kinds.items():
        needed.add(f"{name}/zarr.json")
        if kind == "fixed":
            possible |= {fixed_key(name, pair) for pair in range(store.n_pairs)}
    for name, variable in store.variables.items():
        needed.add(f"{PROGRESS}/{name}/zarr.json")
        for unit in variable.units():
            possible |= {variable.shard_key(unit), variable.flag_key(unit)}
    problems = []
    sizes: dict[str, int] = {}
    for name, kind in kinds.items():
        if f"{name}/zarr.json" not in keys:
            continue
        array = root[name]
        for dim, size in zip(array.metadata.dimension_names, array.shape, strict=True):
            if sizes.setdefault(dim, size) != size:
                problems.append(f"{name}: has {size} along {dim}, where others have {sizes[dim]}")
        if kind == "coords":
            needed.add(f"{name}/c" + ".0" * array.ndim)
            problems += _unreadable(f"coordinate {name}", array, ...)
        elif kind == "variables":
            problems += _bad_units(store.variables[name], array, keys)
        else:
            for pair in range(store.n_pairs):
                if (key := fixed_key(name, pair)) in keys:
                    problems += _unreadable(key, array, (slice(None), pair))
    problems += [f"{key}: is missing" for key in sorted(needed - keys)]
    for key in sorted(keys - needed - possible):
        if key.endswith(PARTIAL):
            problems.append(
                f"{key}: left by a killed process; running the command again removes it"
            )
        else:
            problems.append(f"{key}: is no file of this store; delete it")
    return problems


def _bad_units(variable: Variable, array: zarr.Array, keys: set[str]) -> list[str]:
    problems = []
    for unit in variable.units():
        shard, flag = variable.shard_key(unit), variable.flag_key(unit)
        if flag not in keys:
            continue
        if shard not in keys:
            found = [f"{unit.name}: is done, but {shard} is missing"]
        else:
            found = _unreadable(unit.name, array, variable.slices(unit))
        again = f"delete {flag} and run the same command to do it again"
        problems += [f"{problem}; {again}" for problem in found]
    return problems


def _unreadable(what: str, array: zarr.Array, where: Any) -> list[str]:
    """A line if this part of the array cannot be read, or holds numbers that are all NaN."""
    try:
        values = np.asarray(array[where])
    except Exception as error:  # each codec has its own errors for rotten bytes
        return [f"{what}: cannot be read ({scrub(f'{type(error).__name__}: {error}')[:200]})"]
    if values.dtype.kind == "f" and values.size and np.isnan(values).all():
        return [f"{what}: holds nothing but NaN"]
    return []
