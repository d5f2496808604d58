"""The config of `patchsweep lens`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

from patchsweep.analyses.logit_lens.patches import Patch, Sublayer
from patchsweep.cli.schema.run import AnalysisRun
from patchsweep.errors import ConfigError


@dataclass
class PatchConfig:
    """A patch of the run that the lens reads, with values of `intervention`."""

    site: str | None = None  # such as z or mlp_out; null: no patch
    layer: Any = None  # a layer, or a list of layers that are patched together
    pos: Any = "all"  # a position, a label of the pairs, or all
    head: Any = None  # a head, key head or neuron, or a list of them; null: all


@dataclass
class LensRun(AnalysisRun):
    """One lens: a grid of predictions, optionally of a patched run and with sublayers' effects."""

    # keys of a sweep that say nothing about a lens
    unused: ClassVar[tuple[str, ...]] = (
        "sites",
        "method",
        "metric",
        "precision",
        "compute_dtype",
        "tolerance",
        "means_from",
    )
    subject: ClassVar[str] = "a lens has"

    which: str | None = None  # clean, corrupted, base or source
    remove: str | None = None  # such as mlp:19 or attn:23; null: nothing
    patch: PatchConfig = field(default_factory=PatchConfig)
    top: int = 5  # most probable tokens kept at each place
    sublayers: bool = True  # what the prediction is without each sublayer

    def __post_init__(self) -> None:
        if self.top < 1:
            raise ConfigError(f"top={self.top} must be at least 1; 5 is usual")
        if self.remove is not None and not re.fullmatch(r"(attn|mlp):\d+", self.remove):
            raise ConfigError(f"remove={self.remove!r} is no sublayer; write mlp:19 or attn:23")
        if self.patch.site is None and self.patch != PatchConfig():
            raise ConfigError("patch needs a site; give patch.site=z, or leave the patch out")

    def settings(self) -> dict[str, Any]:
        """Return the arguments of `lens` other than model, pairs and config, and `removals`.

        `removals`: the arguments of `sublayers`; None: sublayers are not removed.
        """
        removed: Sublayer | None = None
        if self.remove is not None:
            kind, _, layer = self.remove.partition(":")
            removed = cast(Sublayer, (kind, int(layer)))
        arguments, patches = self.patch, []
        if arguments.site is not None:
            patches = [
                Patch(
                    arguments.site,
                    arguments.layer,
                    arguments.pos,
                    arguments.head,
                    self.intervention,
                )
            ]
        return {
            "which": self.which,
            "direction": self.direction,
            "remove": removed,
            "patch": patches,
            "top": self.top,
            "removals": {"runner": self.runner.name, "max_tokens": self.runner.max_tokens}
            if self.sublayers
            else None,
        }
