"""The config of `patchsweep multiverse`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from patchsweep.analyses.circuits.multiverse import OPTIONS
from patchsweep.attribution import Method
from patchsweep.cli.schema.run import AnalysisRun, one_method


@dataclass
class MultiverseRun(AnalysisRun):
    """One circuit under every way in which its faithfulness can be measured."""

    # keys of a sweep that say nothing about it, or that are choices here
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "runner",
        "precision",
        "compute_dtype",
        "tolerance",
        "intervention",
        "direction",
        "means_from",
    )
    subject: ClassVar[str] = "the ways to measure a circuit have"
    instead: ClassVar[dict[str, str]] = {
        "intervention": "several are run; choose with ablations=[resample,mean], say",
        "direction": "several are run; choose with directions=[noising], say",
        "means_from": "the prompts of means are a choice; give mean_sets=[clean], say",
    }

    count: int = 200  # edges of the circuit: the strongest by the method
    # what the rest is replaced by
    ablations: Any = field(default_factory=lambda: list(OPTIONS["ablations"]))
    # the prompts of means
    mean_sets: Any = field(default_factory=lambda: list(OPTIONS["mean_sets"]))
    # ablate the rest, or restore the circuit
    directions: Any = field(default_factory=lambda: list(OPTIONS["directions"]))
    # where ablated values act
    positions: Any = field(default_factory=lambda: list(OPTIONS["positions"]))
    # edges, or all edges of their nodes
    levels: Any = field(default_factory=lambda: list(OPTIONS["levels"]))

    def scored_by(self) -> str | Method:
        """Return the one method that ranks the edges.

        Raises:
            ConfigError: there are several.
        """
        return one_method(
            self.method,
            "a circuit is ranked by one method that scores all edges; give method=eap_ig, say",
        )

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `multiverse` other than model, pairs and config."""
        return {
            "scores": self.scored_by(),
            "count": self.count,
            **{name: getattr(self, name) for name in OPTIONS},
            "metrics": self.metric.metrics(),
            "read": self.metric.read,
        }
