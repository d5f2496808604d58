"""The config of `patchsweep acdc`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from patchsweep.analyses.circuits.acdc import THRESHOLDS
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.errors import ConfigError


@dataclass
class AcdcRun(AnalysisRun):
    """Greedy pruning of a model's edges."""

    # keys of a sweep that say nothing about pruning; what removed edges carry is called ablation
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "method",
        "runner",
        "precision",
        "compute_dtype",
        "tolerance",
        "intervention",
        "direction",
    )
    subject: ClassVar[str] = "pruned circuits have"
    instead: ClassVar[dict[str, str]] = {
        "intervention": "circuits call it ablation; give ablation=mean, say"
    }

    # largest distance that the removal of an edge may add, each in a run of its own
    thresholds: Any = field(default_factory=lambda: list(THRESHOLDS))
    positions: bool = False  # prune edges at single positions
    ablation: str = "resample"  # resample, mean or zero: what a removed edge carries

    def __post_init__(self) -> None:
        given = self.thresholds
        if not (isinstance(given, list) and all(type(x) in (int, float) for x in given)):
            raise ConfigError(f"thresholds={given!r} must be a list, such as [0.01,0.1]")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `acdc` other than model, pairs and means."""
        return {
            "metric": self.metric.metrics(),
            "thresholds": self.thresholds,
            "ablation": self.ablation,
            "positions": self.positions,
            "read": self.metric.read,
        }
