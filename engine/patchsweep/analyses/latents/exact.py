"""Exact patches of latents: each adds a multiple of one decoder row, as a row of packed batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patchsweep.analyses.latents.changes import Changes
from patchsweep.runners.select import RunnerName
from patchsweep.spec.batch import Batch
from patchsweep.spec.dictionary import Dictionary
from patchsweep.spec.directions import Numbered
from patchsweep.spec.interventions import Resample
from patchsweep.spec.joint import JointPlan, Writes, plan_joint
from patchsweep.sweeps.calibration import SampleSummary, n_each, sampled_pairs
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.joint import JointPatches, JointRequest
from patchsweep.sweeps.joint_adaptive import AdaptivePatches


@dataclass
class LatentRows(Numbered):
    """Adds change · decoder row of one latent; a write's number is that of its change."""

    decoder: Float[Tensor, "latent width"]
    latent: Int[Tensor, " change"]
    change: Float[Tensor, " change"]
    name: str = "latent"

    def vectors(self, numbers: Tensor) -> Tensor:
        """See `Numbered`."""
        at = numbers.to(self.decoder.device)
        return self.change[at].unsqueeze(-1) * self.decoder[self.latent[at]]


class LatentPatches:
    """Runs patches of latents on the model and in the batches of joint patches."""

    def __init__(
        self,
        request: JointRequest,
        dictionaries: Sequence[Dictionary],
        runner: RunnerName,
        max_tokens: int | None,
        cache_budget: int | None,
        tolerance: float | str | None = None,
    ) -> None:
        self.request, self.dictionaries = request, tuple(dictionaries)
        room = max_tokens, cache_budget
        self.joint = (
            JointPatches(request, runner, *room)
            if tolerance is None
            else AdaptivePatches(
                request,
                runner,
                *room,
                tolerance,
                [one.name for one in self.dictionaries],
                lambda plan, _: plan.writes.value - 1,  # a row is one write
            )
        )

    def run(self, batch: Batch, changes: Changes) -> tuple[Values, Values]:
        """Return the metrics `[metric, change]` of changes on pairs of a batch, and
        `[2, metric, pair]` of base and source runs.

        With a tolerance, the columns of `AdaptivePatches` instead of the metrics alone.
        """
        loaded, references, plan = self._planned(batch, changes)
        found = np.zeros((self.joint.n_columns, plan.n_rows), np.float32)
        found[: len(references[0])] = references[0][:, plan.pair]
        live = np.flatnonzero(plan.live)
        if len(live):
            found[:, live] = self.joint.rows(loaded, plan.part(live))
        return found, references

    def calibrate(self, changes_of: Callable[[Batch], Changes]) -> dict[str, SampleSummary]:
        """Return the thresholds of each dictionary's latents, and what their sample says."""
        assert isinstance(self.joint, AdaptivePatches)
        request = self.request
        pairs = sampled_pairs(len(request.pairs))
        every = request.batches(range(len(request.pairs)))
        of_all = np.concatenate([changes_of(batch).dictionary for batch in every])
        n_live = int(np.bincount(of_all, minlength=1).max())
        parts = []
        for pair in pairs:
            (batch,) = request.batches([pair])
            loaded, _, plan = self._planned(batch, changes_of(batch))
            live = plan.part(np.flatnonzero(plan.live))
            parts.append(self.joint.parts(loaded, live, n_each(n_live, len(pairs))))
        return self.joint.chosen(parts)

    def _planned(self, batch: Batch, changes: Changes) -> tuple[Any, Values, JointPlan]:
        """Return the captured batch, `[2, metric, pair]` of its runs, and a row for each change."""
        request = self.request
        device, of = batch.base.device, changes.dictionary
        added = []
        for i, one in enumerate(self.dictionaries):
            own = changes.at(of == i)
            latent, change = (torch.from_numpy(x).to(device) for x in (own.latent, own.change))
            added.append(LatentRows(one.decoder, latent, change))
        names = [site.name for site in request.sites]
        used = [(one.site, i + 1) for i, one in enumerate(self.dictionaries)]
        loaded, *references = self.joint.load(batch, {}, [Resample(), *added], used)
        number = np.arange(len(changes))
        writes = Writes(
            row=number,
            site=np.array([names.index(one.site) for one in self.dictionaries], np.int64)[of],
            layer=np.array([one.layer for one in self.dictionaries], np.int64)[of],
            pos=changes.pos,
            unit=number - np.searchsorted(of, of),  # its number among those of its dictionary
            value=of + 1,
        )
        plan = plan_joint(
            request.sites,
            request.shape.n_layers,
            batch.reads,
            batch.differs.cpu().numpy(),
            changes.rows(batch),
            writes,
            from_source=np.zeros(len(added) + 1, bool),
            from_base=np.zeros(len(added) + 1, bool),
        )
        return loaded, np.stack(references), plan
