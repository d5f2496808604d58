"""`patchsweep acdc`: prunes edges greedily and stores the circuits that are left."""

from __future__ import annotations

from typing import Any, cast

import xarray as xr
from omegaconf import DictConfig
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patchsweep.analyses.circuits.acdc import acdc
from patchsweep.cli.analysis import refuse_unused, say_where, stored
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.cli.schema.acdc import AcdcRun


def main(arguments: list[str]) -> int:
    """Prune edges with these overrides; return 0 when the results are in the store.

    Raises:
        ConfigError: an override sets a key that only sweeps use.
    """
    refuse_unused(
        "acdc",
        "pruned circuits have",
        arguments,
        AcdcRun.unused,
        instead={"intervention": "circuits call it ablation; give ablation=mean, say"},
    )
    compose("acdc", arguments, job, schema=AcdcRun)
    return 0


def job(cfg: DictConfig) -> None:
    """Run one config; Hydra calls this in this process or in a launcher's."""
    execute(cast(AcdcRun, as_config(cfg)))


def execute(config: AcdcRun) -> None:
    """Run the analysis and print its results; stored results are not computed again."""
    console = stdout()
    transformers_logging.disable_progress_bar()
    model = config.model.load()
    pairs = config.task.load(model)
    settings: dict[str, Any] = {
        "metric": config.metric.metrics(),
        "thresholds": config.thresholds,
        "ablation": config.ablation,
        "positions": config.positions,
        "means_from": config.reference(model),
        "read": config.metric.read,
        "config": config.identity(),
    }
    found = stored(console, config, lambda stages: acdc(model, pairs, **settings, stages=stages))
    if found is None:
        return
    ds, known = found
    console.print(_table(ds))
    say_where(console, config.store, known)


def _table(ds: xr.Dataset) -> Table:
    """Return a table of the circuits, threshold by threshold."""
    table = Table(title=f"pruned by {ds.attrs['metric']}", title_justify="left")
    for name in ("threshold", "edges left", "connected", "distance", "tried", "dead", "runs"):
        table.add_column(name, justify="right")
    names = ("n_candidates", "n_dead", "n_runs")
    for i, threshold in enumerate(ds["threshold"].values):
        one = ds.isel(threshold=i)
        left = (f"{int(one[name]):,}" for name in ("n_edges", "n_connected"))
        counts = (f"{int(one[name]):,}" for name in names)
        table.add_row(f"{threshold:.4g}", *left, f"{float(one['distance']):.4g}", *counts)
    return table
