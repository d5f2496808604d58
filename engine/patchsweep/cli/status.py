"""`patchsweep status STORE`: how far a run has come."""

from __future__ import annotations

import argparse

from patchsweep.cli.console import stdout
from patchsweep.store.status import render, store_status


def main(arguments: list[str]) -> int:
    """Print the status; 0 if the store is complete, 3 if units are missing."""
    parser = argparse.ArgumentParser(
        "patchsweep status",
        description="How far the run of a store has come: units done, running, stale and missing.",
        epilog="Exit codes: 0 complete; 2 there is no such store; 3 not complete.",
    )
    parser.add_argument("store", help="folder or URL")
    status = store_status(parser.parse_args(arguments).store)
    stdout().print(render(status))
    return status.exit_code
