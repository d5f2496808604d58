"""`patchsweep report STORE`: writes a store as one HTML page."""

from __future__ import annotations

from patchsweep.cli.parser import Parser
from patchsweep.report import write_report


def main(arguments: list[str]) -> int:
    """Write the page; return 0."""
    parser = Parser(
        "patchsweep report",
        description="Write a store as one self-contained HTML page, which opens offline.",
    )
    parser.add_argument("store", help="folder or URL")
    parser.add_argument("-o", "--out", default="report.html", help="file (report.html)")
    options = parser.parse_args(arguments)
    print(write_report(options.store, options.out))
    return 0
