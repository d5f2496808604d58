"""Addresses of folders: a path, or any URL that fsspec opens."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsweep.errors import StoreError
from patchsweep.store.backends.base import Folder
from patchsweep.store.backends.credentials import refuse_credentials
from patchsweep.store.backends.local import LocalFolder


def open_folder(
    url: str | Path, storage_options: Mapping[str, Any] | None = None, *, sync: bool = True
) -> Folder:
    """Return the folder at `url` (a path or a URL), which need not exist yet.

    `sync=False` skips fsync, for files that a power failure may destroy.

    Raises:
        StoreError: `url` is no path or URL, one that fsspec cannot open, or credentials are in it
            or in `storage_options`.
    """
    if not isinstance(url, str | os.PathLike):
        raise StoreError(f"store={url!r} must be a path or a URL, such as 'runs/a.zarr'")
    text = str(url)
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        return LocalFolder(Path(text).expanduser(), sync=sync)
    options = dict(storage_options or {})
    refuse_credentials(text, options)
    from patchsweep.store.backends.remote import RemoteFolder  # loads fsspec, only for URLs

    return RemoteFolder(text.rstrip("/"), options)
