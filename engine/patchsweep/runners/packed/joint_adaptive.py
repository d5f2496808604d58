"""Joint patches within two thresholds of exact: rows of one layer, or of two that share one.

A row that writes at one block is run as a patch of a sweep is (`adaptive`): what it changes
noticeably runs, the rest is multiplied with the base run's gradient. Where a row writes at two
blocks, that gradient is wrong: it follows paths that the second write cuts. So the first write's
run is kept whole, with its own gradient, and the row continues it as others continue the base run.
That pays where many rows share the first write. All other rows run exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.grad import Gradients
from patchsweep.models.moves import Moves, move_together, on_cpu
from patchsweep.runners.packed.adaptive import AdaptiveBlocks, Thresholds
from patchsweep.runners.packed.adaptive_runner import (
    metrics_of,
    read_numbers,
    room_of,
    run_in_parts,
    thresholds_on,
)
from patchsweep.runners.packed.joint import PackedJoint, check_patterns, joint_input
from patchsweep.runners.packed.joint_batch import JointBatch, JointLoaded, JointTargets, JointWrites
from patchsweep.runners.packed.runner import PackedRunner, read_of
from patchsweep.runners.packed.tables import TokenTables
from patchsweep.spec.joint import JointPlan, shared_stems
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints

# rows that share their first write, from which on its own gradient pays: it costs a forward and a
# backward pass over what lies behind the write, about three exact runs of it
LEAST = 8
# what a kept run costs besides itself, in runs of the blocks behind its write: its gradient's
# forward pass, and a backward pass, which takes twice as long
GRADIENT = 3
# kept runs that hold gradients at a time, as a part of those that fit without
_PART = 4

# tokens that enter with one batch, in units of `max_tokens`: most of them sleep after a block
_FULL = 4

# gradients of each metric on the runs in a cache, from a position on; they begin with the writes of
# the plan's rows
GradientsOf = Callable[[JointPlan, ActivationCache, int], Gradients]


@dataclass(frozen=True, eq=False)
class JointValues:
    """The results of the rows of a plan."""

    values: Float[NDArray[np.float32], "metric row"]  # patched metrics
    linear: Float[NDArray[np.float32], "metric row"]  # the part of the effects by gradients
    # tokens times blocks that ran, with the row's part of a run and a gradient that rows share
    token_layers: Float[NDArray[np.float64], " row"]

    @classmethod
    def empty(cls, n_metrics: int, n_rows: int) -> JointValues:
        """Return results to be filled."""
        shape = n_metrics, n_rows
        return cls(
            np.full(shape, np.nan, np.float32), np.zeros(shape, np.float32), np.zeros(n_rows)
        )

    def put(self, rows: Ints, new: JointValues) -> None:
        """Fill in the results of `rows`."""
        self.values[:, rows], self.linear[:, rows] = new.values, new.linear
        self.token_layers[rows] = new.token_layers


class AdaptiveJoint:
    """Runs joint patches within thresholds, on the model and in the batches of a `PackedJoint`."""

    def __init__(self, joint: PackedJoint) -> None:
        self.joint, self.runner = joint, joint.runner

    @torch.no_grad()
    def run(
        self,
        loaded: JointLoaded,
        plan: JointPlan,
        metrics: Sequence[Metric],
        base: Gradients,
        of_kept: GradientsOf,
        theta: NDArray[np.float32],
        tau: NDArray[np.float64],
        least: int = LEAST,
    ) -> JointValues:
        """Return the results of every row; all rows are live.

        Args:
            base: gradients on the base runs.
            of_kept: returns those on other runs, of whose tokens none changes before a position.
            theta: thresholds `[metric, row]` in units of the metric.
            tau: thresholds `[row]`, relative.
            least: rows with the same first write that are run by its own gradient.

        Raises:
            Unsupported: a row patches an attention pattern beside something else.
        """
        check_patterns(plan)
        found = JointValues.empty(len(metrics), plan.n_rows)
        single = np.flatnonzero(plan.n_write_layers == 1)
        if len(single):
            part, limits = plan.part(single), (theta[:, single], tau[single])
            runs = loaded.loaded.base
            found.put(single, self._adaptive(loaded, part, runs, base, *limits, metrics))
        two = np.flatnonzero(plan.n_write_layers == 2)
        alone, stems = shared_stems(plan.part(two), least)
        exactly = np.sort(np.concatenate([two[alone], np.flatnonzero(plan.n_write_layers > 2)]))
        if len(exactly):
            found.put(exactly, self.exact(loaded, plan.part(exactly), metrics))
        for stem, kept in self.joint.kept_stems(loaded, stems, _PART):
            rows = two[stem.rows]
            start = int(min(x.first[:, -1].min() for x in (stem.plan, stem.rest)))
            gradients = of_kept(stem.plan, kept, start)
            limits = theta[:, rows], tau[rows]
            new = self._adaptive(loaded, stem.rest, kept, gradients, *limits, metrics)
            behind = (plan.length - start) * (plan.n_layers - 1 - stem.plan.entry).clip(0)
            shared = GRADIENT * behind + _token_layers(stem.plan)
            n = np.bincount(stem.rest.base, minlength=stem.plan.n_rows)
            own = new.token_layers + (shared / n)[stem.rest.base]
            found.put(rows, replace(new, token_layers=own))
        return found

    def exact(self, loaded: JointLoaded, plan: JointPlan, metrics: Sequence[Metric]) -> JointValues:
        """Return the results of rows that run exactly; all rows are live."""
        values = self.joint.run(loaded, plan, metrics).numpy()
        cost = np.full(plan.n_rows, plan.shared_token_layers / max(1, plan.n_rows))
        return JointValues(values, np.zeros_like(values), cost)

    def _adaptive(
        self,
        loaded: JointLoaded,
        plan: JointPlan,
        base: ActivationCache,
        gradients: Gradients,
        theta: NDArray[np.float32],
        tau: NDArray[np.float64],
        metrics: Sequence[Metric],
    ) -> JointValues:
        """Return the results of rows of one layer, which continue the runs in `base`."""
        found = JointValues.empty(len(metrics), plan.n_rows)
        device = loaded.loaded.base_resid.device
        (read,) = move_together([on_cpu(read_numbers(loaded.loaded.batch))], device)
        resid = read_of(base.resid[-1].to(device), loaded.loaded.batch.reads)
        pair_of = torch.arange(len(resid), device=device)
        if base.captured is not None:
            pair_of = base.captured.to(device)

        def score(resid: Tensor, pairs: Tensor) -> Tensor:
            return self.runner.metrics_of(loaded.loaded, resid, pairs, metrics)

        references = score(resid, pair_of)

        def run(places: Ints) -> None:
            rows = places[np.lexsort((plan.first[places, -1], plan.base[places]))]
            batch = _batch_of(plan, rows)
            thresholds = thresholds_on(device, theta[:, rows], tau[rows])
            blocks = _Blocks(self.runner, batch, base, loaded, gradients, thresholds)
            ran = blocks.run(self.runner.max_tokens, room_of(self.runner.max_tokens, batch))
            at, pair = move_together([on_cpu(plan.base[rows]), on_cpu(plan.pair[rows])], device)
            values, linear, token_layers = metrics_of(
                ran, pair, read, resid, at, references[:, at], score
            )
            found.put(rows, JointValues(values, linear, token_layers.astype(np.float64)))

        most = self.runner.max_tokens
        longest = int((_stop(plan) - plan.first[:, -1]).max(initial=1))
        run_in_parts(
            np.argsort(plan.entry, kind="stable"), min(most, max(1, _FULL * most // longest)), run
        )
        return found


def _batch_of(plan: JointPlan, rows: Ints) -> JointBatch:
    """Return the batch of `rows`, which write at one layer each."""
    writes = plan.writes
    by_token = np.array([s.reach == "token" and not s.shift for s in plan.sites], bool)
    others = np.bincount(writes.row[~by_token[writes.site]], minlength=plan.n_rows)
    return replace(JointBatch.of(plan, rows), stop=_stop(plan)[rows], token_entry=others[rows] == 0)


def _stop(plan: JointPlan) -> Ints:
    """Return `[row]` past the last position that is written."""
    stop = np.zeros(plan.n_rows, np.int64)
    np.maximum.at(stop, plan.writes.row, plan.writes.pos + 1)
    return stop


class _Blocks(AdaptiveBlocks):
    """The awake tokens of joint rows."""

    def __init__(
        self,
        runner: PackedRunner,
        batch: JointBatch,
        base: ActivationCache,
        loaded: JointLoaded,
        gradients: Gradients,
        thresholds: Thresholds,
    ) -> None:
        given = joint_input(runner, batch, base)
        super().__init__(runner.unwrapped, batch, given, gradients, thresholds)
        self._joint = JointWrites(batch, given, loaded)
        self._targets: dict[str, list[JointTargets]] = {}  # of the block call under way

    def write(self, x: Tensor, *sites: str) -> None:
        """See `PackedBlocks`."""
        self._joint.write(x, self.tables.layer, self._targets, sites)

    def _tables(self, layer: int, tokens: Any, on_host: Any) -> TokenTables:
        """See `AdaptiveBlocks`."""
        self._targets = {}
        if on_host is None:
            return super()._tables(layer, tokens, None)
        length = self.packed.length
        place = on_host[0] * length + on_host[1]  # ascending

        def token(row: Ints, pos: Ints) -> Ints:
            wanted = row * length + pos
            at = np.searchsorted(place, wanted).clip(0, max(0, len(place) - 1))
            return np.where(place[at] == wanted, at, -1)

        made = self._joint.at(layer, token)
        moves = Moves()
        moves.add(made)
        moves.start(self.device)
        self._targets = moves.there(made)
        return super()._tables(layer, tokens, None)


def _token_layers(plan: JointPlan) -> NDArray[np.int64]:
    """Return the token-layers `[row]` of exact runs."""
    rows = np.arange(plan.n_rows)
    counts: NDArray[np.int64] = sum(
        (plan.counts(rows, layer) for layer in range(plan.n_layers)), np.zeros_like(rows)
    )
    return counts
