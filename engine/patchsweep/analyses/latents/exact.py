"""Exact patches of latents: each adds a multiple of one decoder row, as a row of packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from patchsweep.spec.joint import Writes, plan_joint
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.joint import JointPatches, JointRequest


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
    ) -> None:
        self.request, self.dictionaries = request, tuple(dictionaries)
        self.joint = JointPatches(request, runner, max_tokens, cache_budget)

    def run(self, batch: Batch, changes: Sequence[Changes]) -> tuple[list[Values], Values]:
        """Return the metrics `[metric, change]` for each dictionary's changes on pairs of a batch,
        and `[2, metric, pair]` of base and source runs."""
        request = self.request
        device = batch.base.device
        added = [
            LatentRows(
                one.decoder,
                torch.from_numpy(x.latent).to(device),
                torch.from_numpy(x.change).to(device),
            )
            for one, x in zip(self.dictionaries, changes, strict=True)
        ]
        names = [site.name for site in request.sites]
        used = [(one.site, i + 1) for i, one in enumerate(self.dictionaries)]
        runner = self.joint.runner
        loaded = runner.load(batch, {}, [Resample(), *added], used)
        references = [x.cpu().numpy() for x in runner.references(loaded, request.metrics)]
        sizes = [len(x) for x in changes]
        ends = np.cumsum([0, *sizes])
        pair = _joined([x.rows(batch) for x in changes])
        of = np.repeat(np.arange(len(sizes)), sizes)
        writes = Writes(
            row=np.arange(ends[-1]),
            site=np.array([names.index(one.site) for one in self.dictionaries], np.int64)[of],
            layer=np.array([one.layer for one in self.dictionaries], np.int64)[of],
            pos=_joined([x.pos for x in changes]),
            unit=np.arange(ends[-1]) - ends[of],
            value=of + 1,
        )
        plan = plan_joint(
            request.sites,
            request.shape.n_layers,
            batch.reads,
            (batch.base != batch.source).cpu().numpy(),
            pair,
            writes,
            from_source=np.zeros(len(sizes) + 1, bool),
            from_base=np.zeros(len(sizes) + 1, bool),
        )
        found = references[0][:, pair]
        live = np.flatnonzero(plan.live)
        if len(live):
            found[:, live] = runner.run(loaded, plan.part(live), request.metrics).numpy()
        parts = np.split(found, ends[1:-1], axis=1)
        return parts, np.stack(references)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64)
