"""The console to which the verbs print."""

from __future__ import annotations

import os
import sys

from rich.console import Console


def stdout() -> Console:
    """Return a console on standard output; 120 columns if the output is not a terminal."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else 120, highlight=False, soft_wrap=True, markup=False)
