"""Shared by the verbs of analyses: refusal of keys that only sweeps use, and stored results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import xarray as xr
from rich.console import Console

from patchsweep.arguments import check_store_path
from patchsweep.cli.schema.run import StoreConfig
from patchsweep.errors import ConfigError
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.difference import IDENTITY
from patchsweep.store.save import check_place, load_dataset, save_dataset
from patchsweep.sweeps.identity import refuse_unversioned


def refuse_unused(
    verb: str,
    subject: str,
    arguments: list[str],
    unused: Collection[str],
    instead: Mapping[str, str] | None = None,
) -> None:
    """Refuse overrides of keys that `verb` does not use.

    `subject` begins the message, such as `edges have`; `instead` maps keys to other messages.

    Raises:
        ConfigError: an override sets such a key.
    """
    for word in arguments:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0]
        if instead and key in instead:
            raise ConfigError(f"{word}: {instead[key]}")
        if key in unused:
            raise ConfigError(f"{word}: {subject} no {key}; leave it out (`patchsweep {verb} -h`)")


def stored(
    store: StoreConfig, attrs: Mapping[str, Any], compute: Callable[[], xr.Dataset]
) -> tuple[xr.Dataset, bool]:
    """Return (results in `store`, True), or save and return (the result of `compute`, False).

    Raises:
        ConfigError: `attrs` name a function that has no version to identify it.
        StoreError: the path holds something other than results with `attrs`.
    """
    check_store_path(store.path)
    refuse_unversioned(attrs[IDENTITY])
    ds = load_dataset(store.path, attrs, store.storage_options)
    if ds is not None:
        return ds, True
    check_place(store.path, attrs, store.storage_options)  # fail before the computation
    ds = compute()
    save_dataset(ds, store.path, store.storage_options)
    return ds, False


def say_where(console: Console, store: StoreConfig, known: bool) -> None:
    """Print the last lines: the store's path and the command that reports it."""
    path = scrub(store.path)
    console.print(f"{path}: {'already there, nothing was run' if known else 'written'}")
    console.print(f"patchsweep report {path}")
