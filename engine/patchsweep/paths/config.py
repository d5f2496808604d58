"""What `patchsweep edges` is told besides what every run is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from patchsweep.config import RunConfig
from patchsweep.errors import ConfigError

# keys of a sweep that say nothing about edges
UNUSED = ("sites", "method", "runner", "precision", "slice", "n_slices")


@dataclass
class EdgesRun(RunConfig):
    """One scoring of all edges, and the verification of the foremost."""

    top: int = 200  # foremost edges that are run exactly
    positions: bool = False  # rank and run edges at single positions
    steps: int | None = None  # of integrated gradients; null: the gradient at the base run alone

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top={self.top} must be at least 1; 200 is usual")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1, or null for plain EAP")

    def identity(self) -> dict[str, Any]:
        """What the results depend on."""
        return {key: value for key, value in super().identity().items() if key not in UNUSED}
