"""Reports: writes a store as one self-contained HTML page that opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from os import PathLike, fspath
from pathlib import Path
from types import MappingProxyType

import xarray as xr

from patchsweep.errors import ConfigError, StoreError
from patchsweep.report.page import build_page
from patchsweep.report.tables import seconds_of
from patchsweep.report.views import by_intervention
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.contents import understood
from patchsweep.store.dataset import open_store

__all__ = ["write_report"]

# kinds of an analysis's results; each is a module of this package whose `build(ds)` is its page
KINDS = (
    "edges", "circuit", "acdc", "multiverse", "lens", "heads", "attention", "trace", "dose",
    "latents",
)  # fmt: skip


def write_report(store: str | PathLike[str], out: str | PathLike[str] = "report.html") -> Path:
    """Write the report of `store` to `out` and return its path.

    `store` is a folder or URL that `sweep` or an analysis wrote. Its attribute `kind` selects the
    page; a sweep has no `kind`. The report of an unfinished sweep shows the finished cells. The
    page replaces `out` in one step, so a reader never sees a partial file.

    Raises:
        StoreError: there is no store, it is damaged, or its kind has no page.
        ConfigError: the page cannot be written to `out`.
    """
    for name, given, such in (("store", store, "runs/a.zarr"), ("out", out, "report.html")):
        if not isinstance(given, str | PathLike):
            raise ConfigError(f"{name}={given!r} must be a path, such as {such!r}")
    address = fspath(store)
    _check_file(out)
    with understood(scrub(address)):
        page = page_of(open_store(address), scrub(address), seconds_of(address))
    return write_page(page, out)


def write_page(page: str, out: str | PathLike[str]) -> Path:
    """Write a page to `out` in one step and return its path.

    Raises:
        ConfigError: it cannot be written there.
    """
    path = _check_file(out)
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8", newline="\n")
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        in_the_way = isinstance(error, FileExistsError | NotADirectoryError)
        fault = "a file is in the way" if in_the_way else error.strerror
        raise ConfigError(
            f"the page cannot be written to out={str(path)!r} ({fault}); give another file"
        ) from error
    return path


def page_of(ds: xr.Dataset, name: str, seconds: Mapping[str, float] = MappingProxyType({})) -> str:
    """Return the page of `ds`, which errors call `name`; `seconds` are the times of its sites.

    Raises:
        StoreError: its kind has no page.
    """
    kind = ds.attrs.get("kind")
    if kind is None:
        return build_page(by_intervention(ds), seconds)
    if kind not in KINDS:
        raise StoreError(
            f"{name} holds results of kind {kind!r}, for which there is no page; "
            f"kinds with a page are {', '.join(KINDS)}"
        )
    page: str = import_module(f"patchsweep.report.{kind}").build(ds.load())
    return page


def _check_file(out: str | PathLike[str]) -> Path:
    path = Path(out)
    if not path.name or path.is_dir():
        raise ConfigError(f"out={fspath(out)!r} must be a file, such as report.html")
    return path
