"""`patchsweep multiverse`: one circuit's faithfulness under every way of measuring it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.multiverse import OPTIONS, multiverse
from patchsweep.attribution import Method
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun, one_method
from patchsweep.data.show import number


@dataclass
class MultiverseRun(AnalysisRun):
    """One circuit under every way in which its faithfulness can be measured."""

    uses: ClassVar = ("method", "metric")
    subject: ClassVar = "the ways to measure a circuit have"
    instead: ClassVar = {
        "intervention": "several are run; choose with ablations=[resample,mean], say",
        "direction": "several are run; choose with directions=[noising], say",
        "means_from": "the prompts of means are a choice; give mean_sets=[clean], say",
    }

    count: int = 200  # edges of the circuit: the strongest by the method
    # what the rest is replaced by
    ablations: Any = field(default_factory=lambda: list(OPTIONS["ablations"]))
    # the prompts of means
    mean_sets: Any = field(default_factory=lambda: list(OPTIONS["mean_sets"]))
    # ablate the rest, or restore the circuit
    directions: Any = field(default_factory=lambda: list(OPTIONS["directions"]))
    # where ablated values act
    positions: Any = field(default_factory=lambda: list(OPTIONS["positions"]))
    # edges, or all edges of their nodes
    levels: Any = field(default_factory=lambda: list(OPTIONS["levels"]))

    def scored_by(self) -> str | Method:
        """Return the one method that ranks the edges.

        Raises:
            ConfigError: there are several.
        """
        return one_method(
            self.method,
            "a circuit is ranked by one method that scores all edges; give method=eap_ig, say",
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "scores": self.scored_by()}


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
    columns = ("metric", "least", "a quarter below", "median", "a quarter above", "most")
    table = table_of(columns, title, columns[:1])
    for metric in ds["metric"].values:
        values = ds["faithfulness"].sel(metric=metric).values
        values = values[np.isfinite(values)]
        parts = np.quantile(values, [0, 0.25, 0.5, 0.75, 1]) if values.size else []
        table.add_row(str(metric), *(number(x) for x in parts))
    return table


def _choices(ds: xr.Dataset) -> Table:
    """Return a table of how far each choice moves faithfulness, what moves it most first."""
    columns = ("choice", "on average", "at most")
    table = table_of(columns, "how far one choice alone moves it", columns[:1])
    for i in np.argsort(-np.nan_to_num(ds["moves"].values, nan=-1.0), kind="stable"):
        moves = (float(ds[name].values[i]) for name in ("moves", "moves_most"))
        shown = map(number, moves)
        table.add_row(str(ds["choice"].values[i]).replace("_", " "), *shown)
    return table


main = AnalysisVerb("multiverse", MultiverseRun, multiverse, _show)
