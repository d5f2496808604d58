"""`patchsweep multiverse`: one circuit's faithfulness under every way of measuring it."""

from __future__ import annotations

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.multiverse import multiverse
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.schema.multiverse import MultiverseRun
from patchsweep.data.show import number


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    console.print(_ranges(ds))
    console.print(_choices(ds))
    if ds.attrs["undefined"]:
        console.print(
            f"{ds.attrs['undefined']} of {ds.attrs['n_variants']} variants have no faithfulness: "
            "ablating everything moves the metric by no more than rounding"
        )


def _ranges(ds: xr.Dataset) -> Table:
    """Return a table of the range of faithfulness, metric by metric."""
    title = f"faithfulness of {ds.attrs['count']:,} edges, {ds.attrs['n_variants']:,} variants"
    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    for name in ("least", "a quarter below", "median", "a quarter above", "most"):
        table.add_column(name, justify="right")
    for metric in ds["metric"].values:
        values = ds["faithfulness"].sel(metric=metric).values
        values = values[np.isfinite(values)]
        parts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]) if values.size else []
        table.add_row(str(metric), *(number(x) for x in parts))
    return table


def _choices(ds: xr.Dataset) -> Table:
    """Return a table of how far each choice moves faithfulness, what moves it most first."""
    table = Table(title="how far one choice alone moves it", title_justify="left")
    table.add_column("choice")
    for name in ("on average", "at most"):
        table.add_column(name, justify="right")
    for i in np.argsort(-np.nan_to_num(ds["moves"].values, nan=-1.0), kind="stable"):
        moves = (float(ds[name].values[i]) for name in ("moves", "moves_most"))
        shown = map(number, moves)
        table.add_row(str(ds["choice"].values[i]).replace("_", " "), *shown)
    return table


main = AnalysisVerb("multiverse", MultiverseRun, multiverse, _show)
