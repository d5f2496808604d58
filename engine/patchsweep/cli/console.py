"""What the verbs print on."""

from __future__ import annotations

import os
import sys

from rich.console import Console


def stdout() -> Console:
    """Standard output; wide enough for tables where it is no terminal that has a width."""
    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else 120, highlight=False, soft_wrap=True, markup=False)
