"""What a runner is: given a batch and a plan, the metrics of every patched run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, PatchSet, SitePlan


@runtime_checkable
class Runner(Protocol):
    """Runs patches of some sites on one model. Both runners give the same numbers."""

    name: str
    joins: bool  # whether patches of several sites share passes

    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """Per site and layer `[prompt, pos, width]`; `pattern`: `[prompt, head, dest, src]`."""

    def load(self, batch: Batch, intervention: Intervention) -> Any:
        """Everything that patches of this batch share: caches and the values patched in."""

    def references(
        self, loaded: Any, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """The metrics of the unpatched base runs and of the source runs."""

    def run(
        self, loaded: Any, plan: SitePlan, patches: Ints, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric patch"]:
        """The metrics of the patched runs `patches` (indices into `plan`), in that order."""

    def run_together(
        self,
        loaded: Any,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> list[Float[Tensor, "metric patch"]]:
        """`run` for each of `sets`, in one go where that saves passes; then for each of `null`,
        whose patches change the last bit of what is there (see `patchsweep.sweeps.noise`)."""
