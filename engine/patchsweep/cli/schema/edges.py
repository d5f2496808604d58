"""The config of `patchsweep edges`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
        "tolerance",
    )

    top: int = 200  # foremost edges that are run exactly
    positions: bool = False  # rank and run edges at single positions
    steps: int | None = None  # of integrated gradients; null: the gradient at the base run alone

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top={self.top} must be at least 1; 200 is usual")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1, or null for plain EAP")
