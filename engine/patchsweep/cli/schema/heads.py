"""The config of `patchsweep heads`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from patchsweep.analyses.heads.ablations import ABLATIONS, check_ablations
from patchsweep.analyses.heads.classes import Thresholds
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.cli.schema.run import AnalysisRun


@dataclass
class HeadsRun(AnalysisRun):
    """One study of all heads."""

    # keys of a sweep that say nothing about a study of heads
    unused: ClassVar[tuple[str, ...]] = (
        "method",
        "intervention",
        "direction",
        "precision",
        "compute_dtype",
        "tolerance",
    )
    subject: ClassVar[str] = "heads have"
    instead: ClassVar[dict[str, str]] = {
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
        """Return the arguments of `study` other than model, pairs and means."""
        return {
            "metrics": self.metric.metrics(),
            "ablations": self.ablations,
            "positions": self.sites.positions,
            "optimal": self.optimal,
            "thresholds": self.thresholds,
            "read": self.metric.read,
            "runner": self.runner.name,
            "max_tokens": self.runner.max_tokens,
        }
