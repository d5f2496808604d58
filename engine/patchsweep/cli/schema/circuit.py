"""The config of `patchsweep circuit`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from patchsweep.attribution import Method
from patchsweep.cli.schema.run import AnalysisRun, one_method
from patchsweep.errors import ConfigError


@dataclass
class CircuitRun(AnalysisRun):
    """Circuits of several sizes, each run without the rest of the model."""

    # keys of a sweep that say nothing about circuits; what is ablated by is called ablation here
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "runner",
        "precision",
        "compute_dtype",
        "tolerance",
        "intervention",
        "direction",
    )
    subject: ClassVar[str] = "circuits have"
    instead: ClassVar[dict[str, str]] = {
        "intervention": "circuits call it ablation; give ablation=mean, say"
    }

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
        """Return the arguments of `circuit` other than model, pairs and means."""
        return {
            "metrics": self.metric.metrics(),
            "level": self.level,
            "method": self.scored_by(),
            "growth": self.growth,
            "sizes": self.sizes,
            "ablation": self.ablation,
            "rank_by": self.rank_by,
            "read": self.metric.read,
        }
