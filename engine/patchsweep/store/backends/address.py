"""Addresses of folders: a path, or any URL that fsspec opens."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patchsweep.arguments import user_path
from patchsweep.errors import StoreError
from patchsweep.store.backends.base import Folder
from patchsweep.store.backends.credentials import refuse_credentials, scrub
from patchsweep.store.backends.local import LocalFolder

_URL = re.compile(r"[\w+.:-]+://.*[^/]/*", re.DOTALL)  # with something behind the protocol


def open_folder(url: str | Path, storage_options: Mapping[str, Any] | None = None) -> Folder:
    """Return the folder at `url` (a path or a URL), which need not exist yet.

    Raises:
        StoreError: `url` is no path or URL, one that fsspec cannot open, or credentials are in it
            or in `storage_options`.
    """
    text = os.fspath(url) if isinstance(url, str | os.PathLike) else ""
    if not text or "\0" in text or ("://" in text and not _URL.fullmatch(text)):
        raise StoreError(f"store={scrub(repr(url))} must be a path or a URL, such as 'runs/a.zarr'")
    if not isinstance(storage_options, Mapping | None):
        raise StoreError(f"storage_options={storage_options!r} must be a mapping, or left out")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "://" not in text:
        if storage_options:
            raise StoreError(
                f"storage_options ({', '.join(map(str, storage_options))}) are for URLs, and "
                f"{text} is a folder on a disk; leave them out"
            )
        return LocalFolder(user_path(text))
    options = dict(storage_options or {})
    refuse_credentials(text, options)
    from patchsweep.store.backends.remote import RemoteFolder  # loads fsspec, only for URLs

    return RemoteFolder(text.rstrip("/"), options)
