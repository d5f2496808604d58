"""The command line: `patchsweep VERB ...`, with one module per verb."""

from patchsweep.cli.main import main

__all__ = ["main"]
