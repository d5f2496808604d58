"""The console to which the verbs print, and their tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable

from rich.console import Console
from rich.table import Table


def stdout() -> Console:
    """Return a console on standard output; 120 columns if the output is not a terminal."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else 120, highlight=False, soft_wrap=True, markup=False)


def table_of(
    columns: Iterable[str], title: str | None = None, texts: Collection[str] = ()
) -> Table:
    """Return a table without rows yet; its columns hold numbers, but for those in `texts`."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="left" if name in texts else "right")
    return table
