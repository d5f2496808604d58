"""The command line: `patchsweep VERB ...`, one verb a module."""

from patchsweep.cli.main import main

__all__ = ["main"]
