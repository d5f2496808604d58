"""A store as one self-contained HTML page that opens offline."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path

import xarray as xr

from patchsweep.errors import StoreError
from patchsweep.report.page import build_page
from patchsweep.report.tables import read_journal

__all__ = ["write_report"]


def write_report(store: str | PathLike[str], out: str | PathLike[str] = "report.html") -> Path:
    """Writes the report on `store` to `out` and returns its path.

    `store` is a folder or any address that xarray opens. An unfinished store is reported as far
    as it has got. The page replaces `out` in one step, so a reader never sees half of it.

    Raises:
        StoreError: nothing can be opened at `store`, or it holds no sweep.
    """
    address = fspath(store)
    try:
        ds = xr.open_zarr(address, consolidated=False, chunks=None)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(
            f"store={address!r} cannot be opened as a Zarr group ({error}); give the folder that "
            "a sweep wrote"
        ) from error
    with ds:
        page = build_page(ds, read_journal(address))
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page, encoding="utf-8", newline="\n")
    partial.replace(path)
    return path
