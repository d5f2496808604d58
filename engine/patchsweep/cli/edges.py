"""`patchsweep edges`: estimates every edge, runs the top-k exactly and stores both."""

from __future__ import annotations

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.edges import screen_edges
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.schema.edges import EdgesRun
from patchsweep.data.show import number
from patchsweep.report.edges import Row, correlation, rows_of
from patchsweep.results.stated import stated_errors
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.store.attributes import attributes

N_SHOWN = 12


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    if not known:
        console.print(_done(ds))
    console.print(_table(ds))
    for note in (*tolerance_notes(ds), *(stated.words for stated in stated_errors(ds))):
        console.print(note)


def _done(ds: xr.Dataset) -> str:
    name = "edge_eap" if "edge_eap" in ds else "edge_eap_ig"
    scored = int(np.isfinite(ds[name].values[0, 0]).sum())
    position_words = " at single positions" if attributes(ds)["positions"] else ""
    agreement = correlation(rows_of(ds, str(ds["metric"].values[0])))
    if "edge_dead" in ds:
        how = "run with a tolerance" if "edge_linear" in ds else "run exactly"
        run = f"all of them {how}{_dead(ds)}; estimates"
    else:
        run = f"the foremost {ds.sizes['chosen']:,} of them run exactly; over those, estimates"
    return (
        f"{scored:,} edges{position_words} scored, {run} and exact effects correlate at "
        f"{number(agreement)}"
    )


def _dead(ds: xr.Dataset) -> str:
    """Return how many edges were proved dead and why, in words."""
    counts = {text: n for text, n in attributes(ds)["dead"].items() if n}
    if not counts:
        return ""
    reasons = "; ".join(f"{n:,}: {text}" for text, n in counts.items())
    return f" but {sum(counts.values()):,} that were proved dead ({reasons})"


def _table(ds: xr.Dataset) -> Table:
    """Return a table of the edges with the largest exact effects on the first metric."""
    metric, unit = (str(ds[name].values[0]) for name in ("metric", "metric_unit"))
    over = "" if ds.sizes["pair"] == 1 else f", mean over {ds.sizes['pair']} pairs"
    unit = f" [{unit}]" if unit else ""
    table = Table(title=f"largest effects on {metric}{unit}{over}", title_justify="left")
    positions = bool(attributes(ds)["positions"])
    for name in ("sender", "reader", *(["position"] if positions else [])):
        table.add_column(name)
    for name in ("estimate", "exact"):
        table.add_column(name, justify="right")
    for row in rows_of(ds, metric, N_SHOWN):
        position = [_where(row)] if positions else []
        table.add_row(
            row.sender,
            row.reader,
            *position,
            number(row.estimate, sign=True),
            number(row.exact, sign=True),
        )
    return table


def _where(row: Row) -> str:
    return f"{row.pos} {row.token!r}" if row.token else str(row.pos)


main = AnalysisVerb("edges", EdgesRun, screen_edges, _show)
