"""The config of `patchsweep latents`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.errors import ConfigError
from patchsweep.spec.dictionary import Dictionary


@dataclass
class DictionaryConfig:
    """The file of one dictionary, and what the file does not say."""

    path: str
    site: str | None = None
    layer: int | None = None
    reads: str | None = None  # of a transcoder
    k: int | None = None
    name: str = ""

    @classmethod
    def of(cls, given: Any) -> DictionaryConfig:
        """Return an entry of `dictionaries`: a path, or a mapping with the keys of this class.

        Raises:
            ConfigError: it is something else.
        """
        keys = [f.name for f in fields(cls)]
        if isinstance(given, str):
            return cls(given)
        if isinstance(given, Mapping) and "path" in given and set(given) <= set(keys):
            return cls(**given)
        raise ConfigError(
            f"dictionaries has {given!r}; give a path, or {{path: params.npz, site: resid_post, "
            f"layer: 12}} with keys of {', '.join(keys)}"
        )

    def load(self) -> Dictionary:
        """Read the dictionary."""
        return Dictionary.from_safetensors(
            self.path,
            site=self.site,
            layer=self.layer,
            reads=self.reads,
            k=self.k,
            name=self.name,
        )


@dataclass
class LatentsRun(AnalysisRun):
    """Patches of the latents of some dictionaries."""

    # keys of a sweep that say nothing about latents
    unused: ClassVar[tuple[str, ...]] = ("sites", "method", "precision")
    subject: ClassVar[str] = "latents have"
    instead: ClassVar[dict[str, str]] = {
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
        """Return the arguments of `latents` other than model, pairs, means and config."""
        return {
            "dictionaries": [DictionaryConfig.of(given).load() for given in self.dictionaries],
            "metrics": self.metric.metrics(),
            "estimates": [*self.estimates],
            "top": self.top,
            "tolerance": self.tolerance,
            "direction": self.direction,
            "intervention": self.read_intervention(),
            "read": self.metric.read,
            "compute_dtype": self.compute_dtype,
            "runner": self.runner.name,
            "max_tokens": self.runner.max_tokens,
            "cache_budget": self.runner.cache_bytes,
        }
