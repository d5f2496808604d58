"""`patchsweep circuit`: runs circuits of several sizes without the rest of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.circuits.circuits import circuit
from patchsweep.attribution import Method
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun, one_method
from patchsweep.data.show import number
from patchsweep.errors import ConfigError
from patchsweep.store.attributes import attributes


@dataclass
class CircuitRun(AnalysisRun):
    """Circuits of several sizes, each run without the rest of the model."""

    uses: ClassVar = ("method", "metric", "means_from")
    subject: ClassVar = "circuits have"
    instead: ClassVar = {"intervention": "circuits call it ablation; give ablation=mean, say"}

    level: str = "edges"  # nodes or edges
    growth: str = "top"  # top: the largest first; greedy: edges, from the logits backwards
    sizes: Any = None  # shares of all (up to 1) or numbers of nodes or edges; null: MIB's
    rank_by: str = "size"  # size: the largest |score| first; signed: what helps the metric most
    ablation: str = "resample"  # resample, mean or zero: what the rest is replaced by

    def __post_init__(self) -> None:
        if self.level not in ("nodes", "edges"):
            raise ConfigError(f"level={self.level!r} is not known; use nodes or edges")
        if self.growth not in ("top", "greedy"):
            raise ConfigError(f"growth={self.growth!r} is not known; use top or greedy")
        if self.sizes is not None and not (
            isinstance(self.sizes, list) and all(isinstance(x, int | float) for x in self.sizes)
        ):
            raise ConfigError(
                f"sizes={self.sizes!r} must be a list of shares or numbers, such as [0.01,0.1,1] "
                "or [50,200]; null takes those of the MIB benchmark"
            )
        self.scored_by()

    def scored_by(self) -> str | Method:
        """Return the one method that ranks nodes or edges.

        Raises:
            ConfigError: there are several methods, or the method does not score all of them.
        """
        return one_method(
            self.method,
            "a circuit is ranked by one method that scores all; give method=atp, ig or exact "
            "for nodes, method=eap, eap_ig or exact for edges",
        )

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "method": self.scored_by()}


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
    connected = ["n_connected"] if "n_connected" in ds else []
    names = (name.removeprefix("n_") for name in connected)
    columns = ("share", level, *names, "faithfulness", "completeness")
    table = table_of(columns, f"circuits of {level}, {metric}")
    for i, fraction in enumerate(ds["size"].values):
        scores = ds.isel(size=i).sel(metric=metric)
        counts = (int(scores[name]) for name in ("count", *connected))
        curves = [number(float(scores[name])) for name in ("faithfulness", "completeness")]
        table.add_row(f"{fraction:g}", *(f"{n:,}" for n in counts), *curves)
    return table


main = AnalysisVerb("circuit", CircuitRun, circuit, _show)
