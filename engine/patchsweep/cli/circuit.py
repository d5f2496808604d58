"""`patchsweep circuit`: runs circuits of several sizes without the rest of the model."""

from __future__ import annotations

from typing import Any, cast

import xarray as xr
from omegaconf import DictConfig
from rich.table import Table
from transformers.utils import logging as transformers_logging

from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.cli.analysis import refuse_unused, say_where, stored
from patchsweep.cli.app import as_config, compose
from patchsweep.cli.console import stdout
from patchsweep.cli.schema.circuit import CircuitRun
from patchsweep.store.attributes import attributes


def main(arguments: list[str]) -> int:
    """Select and run circuits with these overrides; return 0 when the results are in the store.

    Raises:
        ConfigError: an override sets a key that only sweeps use.
    """
    refuse_unused(
        "circuit",
        "circuits have",
        arguments,
        CircuitRun.unused,
        instead={"intervention": "circuits call it ablation; give ablation=mean, say"},
    )
    compose("circuit", arguments, job, schema=CircuitRun)
    return 0


def job(cfg: DictConfig) -> None:
    """Run one config; Hydra calls this in this process or in a launcher's."""
    execute(cast(CircuitRun, as_config(cfg)))


def execute(config: CircuitRun) -> None:
    """Run the analysis and print its results; stored results are not computed again."""
    console = stdout()
    transformers_logging.disable_progress_bar()
    method = config.scored_by()
    model = config.model.load()
    pairs = config.task.load(model)
    settings: dict[str, Any] = {
        "metrics": config.metric.metrics(),
        "level": config.level,
        "method": method,
        "growth": config.growth,
        "sizes": config.sizes,
        "ablation": config.ablation,
        "rank_by": config.rank_by,
        "means_from": config.reference(model),
        "read": config.metric.read,
        "config": config.identity(),
    }

    results = stored(
        console, config, lambda stages: circuit(model, pairs, **settings, stages=stages)
    )
    if results is None:
        return
    ds, known = results
    attrs = attributes(ds)
    for metric in map(str, ds["metric"].values):
        console.print(_table(ds, metric))
        if metric in attrs["cpr"]:
            cpr, cmd = (float(attrs[name][metric]) for name in ("cpr", "cmd"))
            console.print(f"{metric}: CPR {cpr:.3f} (more is better), CMD {cmd:.3f} (0 is best)")
        if reason := attrs.get("undefined", {}).get(metric):
            console.print(f"{metric}: faithfulness is not defined: {reason}")
    say_where(console, config.store, known)


def _table(ds: xr.Dataset, metric: str) -> Table:
    """Return a table of faithfulness (the circuit) and completeness (the rest) by size."""
    level = ds.attrs["level"]
    table = Table(title=f"circuits of {level}, {metric}", title_justify="left")
    connected = "n_connected" in ds
    columns = ["share", level, *(["connected"] if connected else [])]
    for name in (*columns, "faithfulness", "completeness"):
        table.add_column(name, justify="right")
    for i, fraction in enumerate(ds["size"].values):
        scores = ds.isel(size=i).sel(metric=metric)
        counts = [scores["count"], *([scores["n_connected"]] if connected else [])]
        # + 0 turns -0.0 into 0.0
        curves = [
            f"{round(float(scores[name]), 3) + 0:.3f}" for name in ("faithfulness", "completeness")
        ]
        table.add_row(f"{fraction:.4g}", *(f"{int(n):,}" for n in counts), *curves)
    return table
