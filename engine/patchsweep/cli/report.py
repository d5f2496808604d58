"""`patchsweep report STORE`: writes a store as one HTML page."""

from __future__ import annotations

from patchsweep.cli import parsers
from patchsweep.report import write_report


def main(arguments: list[str]) -> int:
    """Write the page; return 0."""
    options = parsers.report(arguments)
    print(write_report(options.store, options.out))
    return 0
