"""`patchsweep acdc`: prunes edges greedily and stores the circuits that are left."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import xarray as xr
from rich.console import Console

from patchsweep.analyses.circuits.acdc import THRESHOLDS, acdc
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.show import number
from patchsweep.errors import ConfigError


@dataclass
class AcdcRun(AnalysisRun):
    """Greedy pruning of a model's edges."""

    uses: ClassVar = ("metric", "means_from")
    subject: ClassVar = "pruned circuits have"
    instead: ClassVar = {"intervention": "circuits call it ablation; give ablation=mean, say"}

    # largest distance that the removal of an edge may add, each in a run of its own
    thresholds: Any = field(default_factory=lambda: list(THRESHOLDS))
    positions: bool = False  # prune edges at single positions
    ablation: str = "resample"  # resample, mean or zero: what a removed edge carries

    def __post_init__(self) -> None:
        given = self.thresholds
        if not (isinstance(given, list) and all(type(x) in (int, float) for x in given)):
            raise ConfigError(f"thresholds={given!r} must be a list, such as [0.01,0.1]")

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        settings["metric"] = settings.pop("metrics")
        return settings


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    """Print the circuits, threshold by threshold."""
    columns = ("threshold", "edges left", "connected", "distance", "tried", "dead", "runs")
    table = table_of(columns, f"pruned by {ds.attrs['metric']}")
    names = ("n_candidates", "n_dead", "n_runs")
    for i, threshold in enumerate(ds["threshold"].values):
        one = ds.isel(threshold=i)
        left = (f"{int(one[name]):,}" for name in ("n_edges", "n_connected"))
        counts = (f"{int(one[name]):,}" for name in names)
        table.add_row(f"{threshold:g}", *left, number(float(one["distance"])), *counts)
    console.print(table)


main = AnalysisVerb("acdc", AcdcRun, acdc, _show)
