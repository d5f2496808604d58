"""What `patchsweep heads` is told besides what every run is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patchsweep.config import RunConfig
from patchsweep.errors import ConfigError
from patchsweep.heads.ablations import ABLATIONS, check_ablations
from patchsweep.heads.classes import Thresholds
from patchsweep.heads.optimal import OptimalSettings

# keys of a sweep that say nothing about a study of heads
UNUSED = ("method", "intervention", "direction", "precision", "slice", "n_slices")


@dataclass
class HeadsRun(RunConfig):
    """One study of all heads."""

    ablations: list[str] = field(default_factory=lambda: list(ABLATIONS))  # resample among them
    optimal: OptimalSettings = field(default_factory=OptimalSettings)  # how constants are trained
    thresholds: Thresholds = field(default_factory=Thresholds)  # of the classes

    def __post_init__(self) -> None:
        for key in ("layers", "heads", "neurons"):
            if getattr(self.sites, key) is not None:
                raise ConfigError(
                    f"sites.{key}={getattr(self.sites, key)!r}: a study is of all heads; leave it "
                    "out"
                )
        check_ablations(self.ablations, self.sites.positions, self.optimal)

    def identity(self) -> dict[str, Any]:
        """What the results depend on."""
        return {key: value for key, value in super().identity().items() if key not in UNUSED}
