"""The config of `patchsweep edges`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from patchsweep.attribution.quadrature import Path, path_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.errors import ConfigError


@dataclass
class EdgesRun(AnalysisRun):
    """Estimates of all edges, and exact runs of the top-k."""

    # keys of a sweep that say nothing about edges
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "method",
        "runner",
        "precision",
        "compute_dtype",
    )
    subject: ClassVar[str] = "edges have"

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

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `screen_edges` other than model, pairs and means."""
        return {
            "metrics": self.metric.metrics(),
            "top": self.top,
            "direction": self.direction,
            "intervention": self.intervention,
            "steps": self.steps,
            "rule": self.rule,
            "rtol": self.rtol,
            "positions": self.positions,
            "tolerance": self.tolerance,
            "read": self.metric.read,
        }
