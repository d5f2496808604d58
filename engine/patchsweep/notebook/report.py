"""A whole report inside a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from os import PathLike
from pathlib import Path

import xarray as xr

from patchsweep.report import page_of, write_page


@dataclass(frozen=True)
class Report:
    """The page of a Dataset, which a notebook shows in a frame."""

    html: str  # the whole page
    height: int = 720  # of the frame, in pixels

    def _repr_html_(self) -> str:
        return (
            f'<iframe srcdoc="{escape(self.html)}" sandbox="allow-scripts allow-downloads" '
            f'style="width:100%;height:{self.height}px;border:1px solid #d9dee3"></iframe>'
        )

    def save(self, out: str | PathLike[str] = "report.html") -> Path:
        """Write the page to `out` and return its path."""
        return write_page(self.html, out)


def report(ds: xr.Dataset) -> Report:
    """Return the page that `write_report` writes of a store, without the times of its journal.

    Raises:
        StoreError: `ds` holds no results that have a page.
    """
    return Report(page_of(ds, "the Dataset"))
