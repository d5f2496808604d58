"""`patchsweep heads`: ablates every head in several ways, classes heads, compares ablations."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.heads import effects, study
from patchsweep.analyses.heads.ablations import ABLATIONS, check_ablations
from patchsweep.analyses.heads.classes import Thresholds
from patchsweep.analyses.heads.findings import ALL, TRAINED
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import stdout, table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.show import number

N_SHOWN = 8  # number of heads to list per class


@dataclass
class HeadsRun(AnalysisRun):
    """One study of all heads."""

    uses: ClassVar = ("sites", "metric", "runner", "means_from")
    subject: ClassVar = "heads have"
    instead: ClassVar = {
        "sites.names": "a study is of all heads; leave it out",
        "sites.layers": "a study is of all heads; leave it out",
        "sites.heads": "a study is of all heads; leave it out",
        "sites.neurons": "a study is of all heads; leave it out",
    }

    ablations: list[str] = field(default_factory=lambda: list(ABLATIONS))  # resample among them
    optimal: OptimalSettings = field(default_factory=OptimalSettings)  # how constants are trained
    thresholds: Thresholds = field(default_factory=Thresholds)  # of the classes

    def __post_init__(self) -> None:
        check_ablations(self.ablations, self.sites.positions, self.optimal)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "positions": self.sites.positions}


def _say(stage: str) -> None:
    stdout().print(f"{stage} ...")


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    console.print(_classes(ds))
    if ds.attrs["task_classes"] != "measured":
        console.print(f"no classes by behaviour on the task: {ds.attrs['task_classes']}")
    console.print(_ablations(ds))


def _classes(ds: xr.Dataset) -> Table:
    """Return a table of the heads of each class, by |resample effect|, largest first."""
    effect = effects(ds).isel(ablation=0, metric=0).mean("pair").transpose("layer", "head", ...)
    size = np.abs(effect.values).reshape(*effect.shape[:2], -1).max(axis=-1)
    columns = ("class", "heads", "largest effects first")
    table = table_of(columns, "classes of heads; a head may be of several", columns[::2])
    for name in ds["head_class"].values:
        member = ds["member"].sel(head_class=name).transpose("layer", "head").values.astype(bool)
        heads = sorted(np.argwhere(member).tolist(), key=lambda at: -size[tuple(at)])
        more = " ..." if len(heads) > N_SHOWN else ""
        named = ", ".join(f"a{layer}.h{head}" for layer, head in heads[:N_SHOWN]) + more
        table.add_row(str(name), str(len(heads)), named if heads else "none")
    return table


def _ablations(ds: xr.Dataset) -> Table:
    """Return a table that compares each ablation with resample, for the first metric."""
    metric, unit = (str(ds[name].values[0]) for name in ("metric", "metric_unit"))
    title = (
        f"how much each ablation disagrees with resample on {metric} [{unit}]: mean |difference| "
        "of effects (rank correlation)"
    )
    names = [str(name) for name in ds["ablation"].values]
    table = table_of(("class", "resample effect", *names[1:]), title, ("class",))
    first_metric = ds.isel(metric=0)
    classes = [str(name) for name in ds["table_class"].values]
    for c in sorted(classes, key=lambda name: name not in (ALL, TRAINED)):
        row = first_metric.sel(table_class=c)
        if not int(row["n_heads"].values[0]):
            continue
        cells = [
            f"{number(float(row['disagreement'].values[a]))} "
            f"({number(float(row['rank_correlation'].values[a]))})"
            if int(row["n_heads"].values[a])
            else "-"
            for a in range(1, len(names))
        ]
        table.add_row(str(c), number(float(row["mean_effect"].values[0]), sign=True), *cells)
    return table


main = AnalysisVerb("heads", HeadsRun, partial(study, stage=_say), _show)
