"""Shared by the verbs of analyses: refusal of keys that only sweeps use, and stored results."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import xarray as xr
from rich.console import Console

from patchsweep.analyses.stages import Stages, Unfinished
from patchsweep.cli.progress import Bar
from patchsweep.cli.schema.run import AnalysisRun, StoreConfig
from patchsweep.cli.stop import STOPPER
from patchsweep.errors import ConfigError
from patchsweep.store.backends.credentials import scrub


def refuse_unused(
    verb: str,
    subject: str,
    arguments: list[str],
    unused: Collection[str],
    instead: Mapping[str, str] | None = None,
) -> None:
    """Refuse overrides of keys that `verb` does not use.

    `subject` begins the message, such as `edges have`; `instead` maps keys to other messages.

    Raises:
        ConfigError: an override sets such a key.
    """
    for word in arguments:
        key = word.lstrip("+~").partition("=")[0].partition(".")[0]
        if instead and key in instead:
            raise ConfigError(f"{word}: {instead[key]}")
        if key in unused:
            raise ConfigError(f"{word}: {subject} no {key}; leave it out (`patchsweep {verb} -h`)")


def stored(
    console: Console, config: AnalysisRun, analyse: Callable[[Stages], xr.Dataset]
) -> tuple[xr.Dataset, bool] | None:
    """Return (the results of `analyse`, whether they were stored before); see `Stages`.

    None, with a line on the console, if what remains needs units of other slices.
    """
    STOPPER.listen()
    with Bar(console) as bar:
        stages = Stages(
            config.store.path,
            storage_options=config.store.storage_options,
            slice_index=config.slice,
            n_slices=config.n_slices,
            progress=bar,
        )
        try:
            return analyse(stages), stages.known
        except Unfinished as told:
            console.print(f"{scrub(config.store.path)}: {told}")
            return None


def say_where(console: Console, store: StoreConfig, known: bool) -> None:
    """Print the last lines: the store's path and the command that reports it."""
    path = scrub(store.path)
    console.print(f"{path}: {'already there, nothing was run' if known else 'written'}")
    console.print(f"patchsweep report {path}")
