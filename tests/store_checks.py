"""Checks of a store's files, and checksums for comparing two stores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsweep.store.backends.address import open_folder
from patchsweep.store.store import Store
from patchsweep.store.verify import problems_of


def checksums(
    url: str | Path, *, storage_options: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """Path within the store -> SHA-256 (hex) of each file; empty if there is no store.

    Two runs with the same values give equal dicts.
    """
    folder = open_folder(url, storage_options)
    return {key: hashlib.sha256(folder.read(key) or b"").hexdigest() for key in folder.list()}


def verify_structure(store: Store) -> list[str]:
    """A line for each problem of the store's files; pending shards are none."""
    return problems_of(store, store.survey(read=True))
