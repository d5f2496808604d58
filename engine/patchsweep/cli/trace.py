"""`patchsweep trace`: restores clean states under noise, and stores which bring the answer back."""

from __future__ import annotations

import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.tracing import largest_effects, trace
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.schema.trace import TraceRun
from patchsweep.data.show import number

N_SHOWN = 5


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    name = str(ds["metric"].values[0])
    clean, noised = (float(ds[f"{x}_metric"][0].mean()) for x in ("clean", "noised"))
    console.print(f"{name}: {number(clean)} on the clean prompt, {number(noised)} under noise")
    console.print(_table(ds))


def _table(ds: xr.Dataset) -> Table:
    """Return a table of the places of the first pair with the largest effects, kind by kind."""
    table = Table(title="what brings most back, in pair 0", title_justify="left")
    for name in ("kind", "layer", "position"):
        table.add_column(name)
    for name in ("effect", "95 % interval"):
        table.add_column(name, justify="right")
    for kind in ds["kind"].values:
        for place in largest_effects(ds, str(kind), n=N_SHOWN):
            low, high = (number(x, sign=True) for x in (place.low, place.high))
            where = f"{place.pos} {place.token!r}"
            table.add_row(
                str(kind),
                str(place.layer),
                where,
                number(place.effect, sign=True),
                f"{low} to {high}",
            )
    return table


main = AnalysisVerb("trace", TraceRun, trace, _show)
