"""`patchsweep acdc`: prunes edges greedily and stores the circuits that are left."""

from __future__ import annotations

import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.acdc import acdc
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.schema.acdc import AcdcRun
from patchsweep.data.show import number


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    console.print(_table(ds))


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
        table.add_row(f"{threshold:g}", *left, number(float(one["distance"])), *counts)
    return table


main = AnalysisVerb("acdc", AcdcRun, acdc, _show)
