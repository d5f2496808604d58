"""The config of `patchsweep trace`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from patchsweep.analyses.tracing import KINDS, Noise
from patchsweep.cli.schema.run import AnalysisRun


@dataclass
class NoiseConfig:
    """The noise on the embeddings of a labelled span."""

    label: str = "subject"
    scale: float = Noise.scale
    samples: int = Noise.samples
    seed: int = Noise.seed


@dataclass
class TraceRun(AnalysisRun):
    """One causal trace: which restored states bring the answer back."""

    # keys of a sweep that say nothing about a trace
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "method",
        "intervention",
        "direction",
        "precision",
        "tolerance",
        "means_from",
    )
    subject: ClassVar[str] = "a trace has"

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    kinds: list[str] = field(default_factory=lambda: [*KINDS[:3]])
    window: int = 10  # blocks whose MLP or attention writes are restored together

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `trace` other than model, pairs and config."""
        noise = self.noise
        return {
            "corruption": Noise(noise.label, noise.scale, noise.samples, noise.seed),
            "metrics": self.metric.metrics(),
            "kinds": [*self.kinds],
            "window": self.window,
            "read": self.metric.read,
            "compute_dtype": self.compute_dtype,
            "runner": self.runner.name,
            "max_tokens": self.runner.max_tokens,
        }
