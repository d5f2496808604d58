"""`patchsweep trace`: restores clean states under noise, and stores which bring the answer back."""

from __future__ import annotations

from typing import cast

import numpy as np
import xarray as xr
from omegaconf import DictConfig
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patchsweep.analyses.tracing import largest_effects, trace
from patchsweep.cli.analysis import refuse_unused, say_where, stored
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.cli.schema.trace import TraceRun

N_SHOWN = 5


def main(arguments: list[str]) -> int:
    """Trace with these overrides; return 0 when the results are in the store.

    Raises:
        ConfigError: an override sets a key that only sweeps use.
    """
    refuse_unused("trace", "a trace has", arguments, TraceRun.unused)
    compose("trace", arguments, job, schema=TraceRun)
    return 0


def job(cfg: DictConfig) -> None:
    """Run one config; Hydra calls this in this process or in a launcher's."""
    execute(cast(TraceRun, as_config(cfg)))


def execute(config: TraceRun) -> None:
    """Run the trace and print its results; stored results are not computed again."""
    console = stdout()
    transformers_logging.disable_progress_bar()
    model = config.model.load()
    pairs = config.task.load(model)
    settings = {**config.settings(), "config": config.identity()}
    found = stored(
        console,
        config,
        lambda stages: trace(model, pairs, config.corruption(), **settings, stages=stages),
    )
    if found is None:
        return
    ds, known = found
    name = str(ds["metric"].values[0])
    clean, noised = (float(ds[f"{x}_metric"][0].mean()) for x in ("clean", "noised"))
    console.print(f"{name}: {clean:.4g} on the clean prompt, {noised:.4g} under noise")
    console.print(_table(ds))
    say_where(console, config.store, known)


def _table(ds: xr.Dataset) -> Table:
    """Return a table of the places of the first pair with the largest effects, kind by kind."""
    table = Table(title="what brings most back, in pair 0", title_justify="left")
    for name in ("kind", "layer", "position"):
        table.add_column(name)
    for name in ("effect", "95 % interval"):
        table.add_column(name, justify="right")
    for kind in ds["kind"].values:
        for place in largest_effects(ds, str(kind), n=N_SHOWN):
            low, high = (np.format_float_positional(x, 3) for x in (place.low, place.high))
            where = f"{place.pos} {place.token!r}"
            table.add_row(
                str(kind), str(place.layer), where, f"{place.effect:+.4f}", f"{low} to {high}"
            )
    return table
