"""`patchsweep circuit`: runs circuits of several sizes without the rest of the model."""

from __future__ import annotations

import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.schema.circuit import CircuitRun
from patchsweep.data.show import number
from patchsweep.store.attributes import attributes


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    attrs = attributes(ds)
    for metric in map(str, ds["metric"].values):
        console.print(_table(ds, metric))
        if metric in attrs["cpr"]:
            cpr, cmd = (number(float(attrs[name][metric])) for name in ("cpr", "cmd"))
            console.print(f"{metric}: CPR {cpr} (more is better), CMD {cmd} (0 is best)")
        if reason := attrs.get("undefined", {}).get(metric):
            console.print(f"{metric}: faithfulness is not defined: {reason}")


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
        curves = [number(float(scores[name])) for name in ("faithfulness", "completeness")]
        table.add_row(f"{fraction:g}", *(f"{int(n):,}" for n in counts), *curves)
    return table


main = AnalysisVerb("circuit", CircuitRun, circuit, _show)
