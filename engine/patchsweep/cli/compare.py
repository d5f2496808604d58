"""`patchsweep compare STORE`: how far the estimates of a store can be trusted."""

from __future__ import annotations

import argparse
import json

from patchsweep.cli.console import stdout
from patchsweep.compare import as_dict, compare, render


def main(arguments: list[str]) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        "patchsweep compare",
        description="Attribution's estimates beside the exact effects of one store: correlations, "
        "the largest misses by name, and which sites they may be trusted on.",
    )
    parser.add_argument("store", help="folder or URL, of a run with method=[exact,atp] or screen")
    parser.add_argument("--json", action="store_true", help="all numbers, for scripts")
    options = parser.parse_args(arguments)
    found = compare(options.store)
    if options.json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        stdout().print(render(found))
    return 0
