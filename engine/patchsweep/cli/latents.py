"""`patchsweep latents`: patches every latent of dictionaries, and stores effects and estimates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import xarray as xr
from rich.console import Console

from patchsweep.analyses.latents import agreement, largest_latents, latents
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.console import table_of
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.data.show import number
from patchsweep.errors import ConfigError
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.spec.dictionary import Dictionary

N_SHOWN = 10


# of an entry of `dictionaries`: its file, and what the file does not say
_KEYS = ("path", "site", "layer", "reads", "k", "name")


@dataclass
class LatentsRun(AnalysisRun):
    """Patches of the latents of some dictionaries."""

    uses: ClassVar = (
        "metric",
        "runner",
        "intervention",
        "direction",
        "means_from",
        "compute_dtype",
        "tolerance",
    )
    subject: ClassVar = "latents have"
    instead: ClassVar = {
        "method": "latents take estimates=[atp,relp], and top=100 to run the largest exactly",
    }

    dictionaries: list[Any] = field(default_factory=list)  # paths, or mappings with a path
    estimates: list[str] = field(default_factory=lambda: ["atp"])
    top: int | None = None  # run only the top places of the first estimate exactly; null: all

    def __post_init__(self) -> None:
        if not self.dictionaries:
            raise ConfigError(
                "latents need dictionaries; give dictionaries=[sae_weights.safetensors], say"
            )

    def settings(self) -> dict[str, Any]:
        dictionaries = [_read(given) for given in self.dictionaries]
        cache_budget = self.runner.cache_bytes
        return {**super().settings(), "dictionaries": dictionaries, "cache_budget": cache_budget}


def _read(given: Any) -> Dictionary:
    """Read an entry of `dictionaries`: a path, or a mapping with keys of `_KEYS`.

    Raises:
        ConfigError: it is something else.
    """
    entry = {"path": given} if isinstance(given, str) else given
    if not (isinstance(entry, Mapping) and "path" in entry and set(entry) <= set(_KEYS)):
        raise ConfigError(
            f"dictionaries has {given!r}; give a path, or {{path: params.npz, site: resid_post, "
            f"layer: 12}} with keys of {', '.join(_KEYS)}"
        )
    return Dictionary.from_safetensors(**entry)


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    """Print how estimates agree, and the latents of the first pair with the largest effects."""
    n_live, n = int(ds.attrs["n_live"]), int(ds.attrs["n_patches"])
    console.print(f"{n_live:,} of {n:,} latents and positions change; the others are dead")
    for note in tolerance_notes(ds):
        console.print(note)
    for one in agreement(ds):
        if one.n:
            console.print(f"{one.method}: r = {number(one.pearson)} with {one.n:,} exact effects")
    texts = ("dictionary", "latent", "position")
    table = table_of((*texts, "change", "effect"), "largest effects in pair 0", texts)
    for place in largest_latents(ds, n=N_SHOWN):
        ran = np.isfinite(place.effect)
        effect = place.effect if ran else next(iter(place.estimates.values()))
        where = f"{place.pos} {place.token!r}"
        table.add_row(
            place.dictionary,
            str(place.latent),
            where,
            number(place.change, sign=True),
            number(effect, sign=True),
        )
    console.print(table)


main = AnalysisVerb("latents", LatentsRun, latents, _show)
