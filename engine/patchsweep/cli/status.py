"""`patchsweep status STORE`: prints the progress of a run."""

from __future__ import annotations

from patchsweep.cli import parsers
from patchsweep.cli.console import stdout
from patchsweep.errors import DamagedError, printable
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.contents import DELETE, Contents, read_contents
from patchsweep.store.status import EXIT_COMPLETE, EXIT_INCOMPLETE, render, stages_of, store_status


def main(arguments: list[str]) -> int:
    """Print the status; return 0 if the store is complete, 3 if units are missing or damaged."""
    url = parsers.status(arguments).store
    try:
        folder = open_folder(url)
        if folder.is_empty() and (stages := stages_of(url)):
            return _unfinished(url, stages)
        contents = read_contents(folder)
        if not contents.is_sweep:
            return _results(contents)
        status = store_status(url)
    except DamagedError as error:
        stdout().print(printable(str(error)))
        return EXIT_INCOMPLETE
    stdout().print(render(status))
    return status.exit_code


def _unfinished(url: str, stages: list[str]) -> int:
    """Print the status of each stage of an analysis without results; return the exit code."""
    console = stdout()
    for stage in stages:
        console.print(render(store_status(stage)))
    console.print(
        f"{printable(scrub(url))}: no results yet; {len(stages)} stages of the analysis have "
        "begun, and the same command goes on"
    )
    return EXIT_INCOMPLETE


def _results(contents: Contents) -> int:
    """Print the status of an analysis's results; return the exit code."""
    console = stdout()
    words = f"results of `patchsweep {printable(contents.kind)}`" if contents.kind else "results"
    for problem in contents.problems:
        console.print(f"damaged: {printable(problem)}")
    if contents.problems:
        console.print(f"{contents.folder.shown}: {words}, damaged; {DELETE}")
        return EXIT_INCOMPLETE
    console.print(f"{contents.folder.shown}: {words}, {len(contents.files)} files, complete")
    return EXIT_COMPLETE
