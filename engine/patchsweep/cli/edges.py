"""`patchsweep edges`: estimates every edge, runs the top-k exactly and stores both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.edges import screen_edges
from patchsweep.attribution.quadrature import Path, path_of
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.show import number
from patchsweep.errors import ConfigError
from patchsweep.report.edges import correlation, rows_of
from patchsweep.results.stated import stated_errors
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.store.attributes import attributes

N_SHOWN = 12


@dataclass
class EdgesRun(AnalysisRun):
    """Estimates of all edges, and exact runs of the top-k."""

    uses: ClassVar = (
        "metric",
        "intervention",
        "direction",
        "means_from",
        "tolerance",
    )
    subject: ClassVar = "edges have"

    top: Any = 200  # foremost edges that are run exactly; all: every edge
    positions: bool = False  # rank and run edges at single positions
    # nodes of integrated gradients, or auto; null: the gradient at the base run alone
    steps: Any = None
    rule: str = Path.rule  # gauss, or left: as the EAP-IG package has it, which converges slowly
    rtol: float = Path.rtol  # with steps=auto: error over the largest score of each pair

    def __post_init__(self) -> None:
        if self.top != "all" and not (type(self.top) is int and self.top >= 1):
            raise ConfigError(
                f"top={self.top!r} must be a whole number of at least 1, or all; 200 is usual"
            )
        if self.tolerance is not None and self.top != "all":
            raise ConfigError(
                f"tolerance={self.tolerance} needs a sample, which is worth its time for all edges "
                "alone; use top=all, or leave the tolerance out"
            )
        path_of(self.steps, self.rule, self.rtol)  # type: ignore[arg-type]


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
    positions = bool(attributes(ds)["positions"])
    texts = ("sender", "reader", *(["position"] if positions else []))
    title = f"largest effects on {metric}{unit}{over}"
    table = table_of((*texts, "estimate", "exact"), title, texts)
    for row in rows_of(ds, metric, N_SHOWN):
        position = [f"{row.pos} {row.token!r}" if row.token else str(row.pos)] if positions else []
        table.add_row(
            row.sender,
            row.reader,
            *position,
            number(row.estimate, sign=True),
            number(row.exact, sign=True),
        )
    return table


main = AnalysisVerb("edges", EdgesRun, screen_edges, _show)
