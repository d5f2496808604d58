"""Joint patches by hooks, and the choice between these and packed batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.runners.base import Runner
from patchsweep.runners.hook_points import writing
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.packed.joint import PackedJoint
from patchsweep.runners.packed.joint_batch import JointLoaded
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.batch import Batch
from patchsweep.spec.directions import Live, Numbered
from patchsweep.spec.interventions import Intervention, values_of
from patchsweep.spec.joint import WHOLE, JointPlan, Writes
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints
from patchsweep.spec.sites import Site


class HookedJoint:
    """Runs joint patches by hooks: each row of a forward pass is one set of patches."""

    def __init__(self, runner: HookedRunner) -> None:
        self.runner = runner

    @torch.no_grad()
    def load(
        self,
        batch: Batch,
        sources: Mapping[int, Batch],
        interventions: Sequence[Intervention],
        used: Sequence[tuple[str, int]],
    ) -> JointLoaded:
        """See `PackedJoint`."""
        loaded = self.runner.load(batch, interventions[0])
        base = self.runner.activations(batch.base)
        source = self.runner.source(batch)
        others = {i: self.runner.source(other) for i, other in sources.items()}
        sites = {site.name: site for site in self.runner.sites}
        live = {i: x for i, x in enumerate(interventions) if isinstance(x, Live)}
        values: dict[tuple[str, int], Sequence[Tensor]] = {}
        for name, i in used:
            if isinstance(interventions[i], Numbered):
                continue  # it needs no values
            theirs = others.get(i, source)[name]
            if i in live:
                values[name, i] = theirs
                continue
            values[name, i] = [
                values_of(interventions[i], sites[name], layer, b, s, batch.spans)
                for layer, (b, s) in enumerate(zip(base[name], theirs, strict=True))
            ]
        return JointLoaded(loaded, values, live)

    def references(
        self, loaded: JointLoaded, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """See `PackedJoint`."""
        return self.runner.references(loaded.loaded, metrics)

    @torch.no_grad()
    def run(
        self, loaded: JointLoaded, plan: JointPlan, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric row"]:
        """See `PackedJoint`."""
        values = torch.empty(len(metrics), plan.n_rows, device="cpu")
        size = self.runner.rows_of(loaded.loaded.batch.length)
        for first in range(0, plan.n_rows, size):
            rows = np.arange(first, min(first + size, plan.n_rows))
            part = plan.part(rows)
            hooks = self._hooks(loaded, part)
            values[:, rows] = self.runner.run_rows(loaded.loaded, part.pair, hooks, metrics)
        return values

    def _hooks(self, loaded: JointLoaded, plan: JointPlan) -> list[Any]:
        """Return hooks that write all rows of `plan` in one pass."""
        writes = plan.writes
        hooks = []
        for i, layer in np.unique(np.stack([writes.site, writes.layer]), axis=1).T.tolist():
            here = np.flatnonzero((writes.site == i) & (writes.layer == layer))
            site = plan.sites[i]
            write = self._write(loaded, site, layer, writes.at(here), plan.pair)
            hooks.append(writing(site.hook_name(layer), write))
        return hooks

    def _write(
        self, loaded: JointLoaded, site: Site, layer: int, writes: Writes, pair: Ints
    ) -> Callable[[Tensor], None]:
        """Return a function that makes `writes` in a site's tensor, in place."""
        n_units = self.runner.shape.n_units(site)
        parts = []
        numbered = []
        for value in np.unique(writes.value).tolist():
            live = loaded.live.get(value)
            if isinstance(live, Numbered):
                numbered.append((live, writes.at(np.flatnonzero(writes.value == value))))
                continue
            for whole in (True, False):
                mine = np.flatnonzero((writes.value == value) & ((writes.unit == WHOLE) == whole))
                if len(mine):
                    parts.append((value, whole, writes.at(mine)))

        def write(x: Tensor) -> None:
            for adds, part in numbered:
                row, pos = (torch.from_numpy(i).to(x.device) for i in (part.row, part.pos))
                target = x.view(*x.shape[:2], -1)
                target[row, pos] += adds.vectors(torch.from_numpy(part.unit)).to(target)
            for value, whole, part in parts:
                new = loaded.values[site.name, value][layer].to(x)
                row, pos, unit = (
                    torch.from_numpy(i).to(x.device) for i in (part.row, part.pos, part.unit)
                )
                of = torch.from_numpy(pair[part.row]).to(x.device)
                if site.is_pattern:
                    if whole:
                        x[row, :, pos] = new[of, :, pos]
                    else:
                        x[row, unit, pos] = new[of, unit, pos]
                else:
                    shape = (*x.shape[:2], *(() if whole else (n_units,)), -1)
                    index = (row, pos) if whole else (row, pos, unit)
                    cell = (of, *index[1:])
                    target = x.view(shape)
                    given = new.reshape(len(new), *shape[1:])[cell]
                    if value in loaded.live:
                        given = loaded.live[value].applied(site, layer, target[index], given)
                    target[index] = given

        return write


JointRunner = PackedJoint | HookedJoint


def joint_runner(runner: Runner) -> JointRunner:
    """Return what runs joint patches in the way of `runner`."""
    return PackedJoint(runner) if isinstance(runner, PackedRunner) else HookedJoint(runner)  # type: ignore[arg-type]
