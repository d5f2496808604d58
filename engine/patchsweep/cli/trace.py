"""`patchsweep trace`: restores clean states under noise, and stores which bring the answer back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import xarray as xr
from rich.console import Console

from patchsweep.analyses.tracing import KINDS, Noise, largest_effects, trace
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.show import number

N_SHOWN = 5


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

    uses: ClassVar = ("metric", "runner", "compute_dtype")
    subject: ClassVar = "a trace has"

    noise: NoiseConfig = field(default_factory=NoiseConfig)
    kinds: list[str] = field(default_factory=lambda: [*KINDS[:3]])
    window: int = 10  # blocks whose MLP or attention writes are restored together

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        settings["corruption"] = Noise(**asdict(settings.pop("noise")))
        return settings


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    """Print the places of the first pair with the largest effects, kind by kind."""
    name = str(ds["metric"].values[0])
    clean, noised = (float(ds[f"{x}_metric"][0].mean()) for x in ("clean", "noised"))
    console.print(f"{name}: {number(clean)} on the clean prompt, {number(noised)} under noise")
    texts = ("kind", "layer", "position")
    title = "what brings most back, in pair 0"
    table = table_of((*texts, "effect", "95 % interval"), title, texts)
    for kind in ds["kind"].values:
        for place in largest_effects(ds, str(kind), n=N_SHOWN):
            low, high = (number(x, sign=True) for x in (place.low, place.high))
            where = f"{place.pos} {place.token!r}"
            table.add_row(
                str(kind),
                str(place.layer),
                where,
                number(place.effect, sign=True),
                f"{low} to {high}",
            )
    console.print(table)


main = AnalysisVerb("trace", TraceRun, trace, _show)
