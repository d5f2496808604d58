"""The interface of runners: compute the metrics of patched runs for a batch and a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from patchsweep.models.moves import Arriving
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, PatchSet, SitePlan


@runtime_checkable
class Loader(Protocol):
    """Captures batches."""

    def load(self, batch: Batch, intervention: Intervention) -> Any:
        """Return what all patches of this batch share: caches and patch values."""

    def references(
        self, loaded: Any, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """Return the metrics of the unpatched base runs and of the source runs."""


@runtime_checkable
class Runner(Loader, Protocol):
    """Runs patches of some sites on one model. Both runners return the same numbers."""

    name: str
    joins: bool  # whether patches of several sites share forward passes

    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """Return, per site and layer, activations `[prompt, pos, width]`.

        Those of `pattern` are `[prompt, head, dest, src]`.
        """

    def run_together(
        self,
        loaded: Any,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> list[Float[Tensor, "metric patch"]]:
        """Return what `run` returns for each of `sets`, then for each of `null`.

        Sets share forward passes where possible. `null` holds identity patches: they write back the
        base run's own values with their last bit flipped (see `patchsweep.sweeps.noise`).
        """

    def start_together(
        self,
        loaded: Any,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> Arriving[list[Float[Tensor, "metric patch"]]]:
        """Launch what `run_together` does; a GPU may still run it when this returns."""
        results = self.run_together(loaded, sets, metrics, null)
        return Arriving(lambda: results, ready=True)

    def run(
        self, loaded: Any, plan: SitePlan, patches: Ints, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric patch"]:
        """Return the metrics of the runs with `patches` (numbers in `plan`), in that order."""
        return self.run_together(loaded, [PatchSet(plan, patches)], metrics)[0]
