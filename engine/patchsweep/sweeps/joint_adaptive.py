"""Joint patches with a tolerance: the rule, the sample and the stated error of adaptive sweeps.

Rows that write at one block run as patches of a sweep do (`sweeps.adaptive`), but all of them
start: their first block runs, whatever it changes. Rows of two blocks continue a run with their
first write and its own gradient where enough of them share it. The others run exactly, see
`runners.packed.joint_adaptive`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.arguments import check_tolerance
from patchsweep.attribution import Atp
from patchsweep.attribution.base_gradients import STREAM, base_gradients, run_gradients
from patchsweep.attribution.budget import token_layers_per_pass
from patchsweep.attribution.check import check_metric, check_model
from patchsweep.attribution.estimates import Work
from patchsweep.errors import ConfigError
from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.grad import Activations, GradientModel, Gradients
from patchsweep.results.tolerance import in_units
from patchsweep.runners.packed.adaptive_runner import QUERIES
from patchsweep.runners.packed.joint import PackedJoint
from patchsweep.runners.packed.joint_adaptive import LEAST, AdaptiveJoint, JointValues
from patchsweep.runners.packed.joint_batch import JointLoaded
from patchsweep.runners.select import RunnerName
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.joint import JointPlan, joined
from patchsweep.spec.plan import Ints
from patchsweep.sweeps.adaptive import check_first_order, packed_of
from patchsweep.sweeps.calibration import (
    EXACTLY,
    Level,
    Part,
    Ran,
    SampleSummary,
    calibrate,
    n_each,
    sample_rows,
    sampled_pairs,
)
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.joint import JointPatches, JointRequest

LINEARLY = (np.inf, np.inf)  # thresholds at which all that the first block changes is linear
# candidates for the sample, for each patch of it: their effects to first order choose the largest
N_CANDIDATES = 4
EXACT_ROW = -1  # in place of a site's number: the row runs exactly, whatever the thresholds


def check_joint_tolerance(
    request: JointRequest, tolerance: float | str | None, runner: RunnerName
) -> None:
    """Check that the tolerance of joint patches can be met; runs nothing.

    Raises:
        ConfigError: it is no tolerance, a metric or weight has no gradient, the run computes in 16
            bits, or by hooks.
    """
    check_tolerance(tolerance)
    if tolerance is None:
        return
    if runner == "hooked":
        raise ConfigError(
            f"tolerance={tolerance!r} needs the packed runner, but runner=hooked was asked for; "
            "leave the tolerance out"
        )

    def check() -> None:
        for metric in request.metrics:
            check_metric(metric, Atp())
        check_model(request.bridge)

    check_first_order(f"tolerance={tolerance!r}", request.compute_dtype, check, "run")


@dataclass(frozen=True, eq=False)
class Tolerated:
    """A captured batch with the base run's gradients."""

    batch: Batch
    loaded: JointLoaded
    base: Values  # [metric, pair]
    tolerance: Values  # [metric, pair] in units of each metric
    gradients: Gradients
    work: Work


class AdaptivePatches(JointPatches):
    """Runs sets of patches within a tolerance. `rows` returns, for each row, `columns` in order.

    `sites` names what has thresholds of its own; `site_of` numbers a plan's rows by them, given the
    numbers of their sets, if they have such.
    """

    columns = ("values", "linear", "token_layers", "exact_token_layers")

    def __init__(
        self,
        request: JointRequest,
        runner: RunnerName,
        max_tokens: int | None,
        cache_budget: int | None,
        tolerance: float | str,
        sites: Sequence[str],
        site_of: Callable[[JointPlan, Ints | None], Ints],
    ) -> None:
        super().__init__(request, runner, max_tokens, cache_budget)
        packed_of(self.choice, tolerance)
        assert isinstance(self.runner, PackedJoint)
        self.tolerance, self.sites, self.site_of = tolerance, tuple(sites), site_of
        self.adaptive = AdaptiveJoint(self.runner)
        self.summaries: Mapping[str, SampleSummary] = {}  # by site, before anything runs by it
        longest = request.pairs.longest
        self._model = GradientModel(
            request.bridge, (), STREAM, longest, compute_dtype=request.compute_dtype
        )

    @property
    def n_columns(self) -> int:
        """See `JointPatches`: each of `columns`, by metric."""
        return len(self.columns) * len(self.request.metrics)

    def load(
        self,
        batch: Batch,
        sources: Mapping[int, Batch],
        interventions: Sequence[Intervention],
        used: Sequence[tuple[str, int]],
    ) -> tuple[Tolerated, Values, Values]:
        """See `JointPatches`."""
        request, runner = self.request, self.adaptive.joint
        loaded = runner.load(batch, sources, interventions, used, QUERIES)
        base, source = (x.cpu().numpy() for x in runner.references(loaded, request.metrics))
        work = Work(
            gradients=self._model,
            batch=batch,
            plans=(),
            metrics=request.metrics,
            intervention=interventions[0],
            source=Activations({}, runner.runner.logits_of(loaded.loaded, "source"), None),
        )
        with self._model.frozen():
            gradients = base_gradients(work)[1]
        tolerance = in_units(self.tolerance, base, source)
        return Tolerated(batch, loaded, base, tolerance, gradients, work), base, source

    def rows(self, loaded: Tolerated, plan: JointPlan, numbers: Ints | None = None) -> Values:
        """See `JointPatches`: values, linear parts, token-layers, those of exact runs."""
        site = self.site_of(plan, numbers)
        levels = np.array([*(self.summaries[name].level for name in self.sites), EXACTLY])[site]
        ran = self._run(loaded, plan, levels)
        shape = ran.values.shape
        exact = plan.shared_token_layers / max(1, plan.n_rows)
        return np.concatenate(
            [
                ran.values,
                ran.linear,
                np.broadcast_to(ran.token_layers, shape),
                np.full(shape, exact),
            ]
        ).astype(np.float32)

    def calibrate(self) -> dict[str, SampleSummary]:
        """Return the thresholds of all sets, from a sample of them, and what it says."""
        n_sets = len(self.request.sets)
        pairs = sampled_pairs(len(self.request.pairs))
        n = n_each(n_sets * len(self.request.pairs), len(pairs))
        parts: list[dict[str, Part]] = []
        for pair in pairs:
            (batch,) = self.request.batches([pair])
            loaded, *_ = self._of(batch)
            rng = np.random.default_rng(pair)
            drawn = np.sort(rng.choice(n_sets, min(n_sets, N_CANDIDATES * n), replace=False))
            plan = self.request.plan(batch, drawn.tolist())
            live = np.flatnonzero(plan.live)
            first = live[plan.part(live).distinct()[0]] if len(live) else live
            parts.append(self.parts(loaded, plan.part(first), n, drawn[first]))
        return self.chosen(parts)

    def parts(
        self, loaded: Tolerated, plan: JointPlan, n: int, numbers: Ints | None = None
    ) -> dict[str, Part]:
        """Return the sample of one pair by site: `n` of the largest rows, and as many random ones.

        `plan` holds the candidates, of which rows of more than two blocks are none.
        """
        site = self.site_of(plan, numbers)
        site[plan.n_write_layers > 2] = EXACT_ROW
        (pair,) = loaded.batch.pairs
        chosen = []
        for number, name in enumerate(self.sites):
            mine = np.flatnonzero(site == number)
            part = plan.part(mine)
            linearly = self._run(loaded, part, np.full((len(mine), 2), LINEARLY[0]), 1)
            size = np.abs(linearly.values - loaded.base[:, part.pair]).max(axis=0, initial=0.0)
            chosen.append(mine[sample_rows(name, pair, size, n)])
        ran = self.adaptive.exact(
            loaded.loaded, plan.part(np.concatenate(chosen)), self.request.metrics
        )
        ends = np.cumsum([len(rows) for rows in chosen])[:-1]
        parts = {}
        for name, rows, exact in zip(
            self.sites, chosen, np.split(ran.values, ends, axis=1), strict=True
        ):
            part = plan.part(rows)
            parts[name] = Part(
                captured=loaded,
                chosen=part,
                patches=np.arange(len(rows)),
                exact=exact,
                base=loaded.base[:, part.pair],
                tolerance=loaded.tolerance[:, part.pair],
                token_layers=part.shared_token_layers,
            )
        return parts

    def chosen(self, of_pairs: Sequence[Mapping[str, Part]]) -> dict[str, SampleSummary]:
        """Return the thresholds that the samples of some pairs decide."""

        def run(loaded: Any, plans: Sequence[JointPlan], levels: Sequence[Level]) -> list[Ran]:
            sizes = [plan.n_rows for plan in plans]
            of_rows = np.repeat(np.array(levels), sizes, axis=0)
            ran = self._run(loaded, joined(plans), of_rows, 1)
            ends = np.cumsum(sizes)[:-1]
            columns = [
                np.split(x, ends, axis=-1) for x in (ran.values, ran.linear, ran.token_layers)
            ]
            return [*zip(*columns, strict=True)]

        by_site = {name: [parts[name] for parts in of_pairs] for name in self.sites}
        sampled = {
            name: parts for name, parts in by_site.items() if any(len(p.patches) for p in parts)
        }
        samples = calibrate(sampled, run) if sampled else {}
        none = np.zeros((len(self.request.metrics), 6), np.float32)
        return {
            name: SampleSummary.of(samples[name])
            if name in samples
            else SampleSummary(EXACTLY, 1.0, 0, none)
            for name in self.sites
        }

    def _run(
        self, loaded: Tolerated, plan: JointPlan, levels: NDArray[np.float64], least: int = LEAST
    ) -> JointValues:
        """Return the results of live rows at their levels `[row, 2]`, theta and tau."""
        metrics = self.request.metrics
        found = JointValues.empty(len(metrics), plan.n_rows)
        exactly = (levels == EXACTLY).all(axis=1)
        for rows in (np.flatnonzero(exactly), np.flatnonzero(~exactly)):
            if not len(rows):
                continue
            part, level = plan.part(rows), levels[rows]
            if exactly[rows[0]]:
                found.put(rows, self.adaptive.exact(loaded.loaded, part, metrics))
                continue
            theta = level[:, 0] * loaded.tolerance[:, part.pair]

            def of_kept(stems: JointPlan, kept: ActivationCache, start: int) -> Gradients:
                return self._of_kept(loaded, stems, kept, start)

            found.put(
                rows,
                self.adaptive.run(
                    loaded.loaded,
                    part,
                    metrics,
                    loaded.gradients,
                    of_kept,
                    theta.astype(np.float32),
                    level[:, 1],
                    least,
                ),
            )
        return found

    def _of_kept(
        self, loaded: Tolerated, plan: JointPlan, kept: ActivationCache, start: int
    ) -> Gradients:
        """Return the gradients on kept runs, from the block behind each run's writes on.

        Before position `start` the runs are the base runs, and their gradients are 0.
        """
        start = start if self._model.takes_positions else 0
        prefix = loaded.loaded.loaded.base.prefix(start) if start else None
        shared = replace(loaded.work, source=replace(loaded.work.source, prefix=prefix))
        length, n_layers = plan.length, plan.n_layers
        n_metrics = len(self.request.metrics)
        base = loaded.gradients
        # rows whose writes are in the last block read no gradient
        found = Gradients(
            *(
                [x.new_zeros(n_metrics, plan.n_rows, *x.shape[2:]) for x in of_layers]
                for of_layers in (base.stream, base.z)
            )
        )
        logits = self.adaptive.runner.logits_of(loaded.loaded.loaded, "base")
        keys = np.stack([plan.pair, plan.entry + 1])
        for pair, layer in np.unique(keys, axis=1).T.tolist():
            if layer >= n_layers:
                continue
            mine = np.flatnonzero((plan.pair == pair) & (plan.entry + 1 == layer))
            work = shared.rows([pair])
            per_pass = token_layers_per_pass(self.request.bridge, length) // (length - start)
            most = max(1, per_pass // (n_layers - layer))
            for rows in np.array_split(mine, -(-len(mine) // most)):
                with self._model.frozen():
                    resid = kept.resid[layer][rows, start:]
                    new = run_gradients(work, layer, resid, logits[pair : pair + 1])
                for into, of_layers in ((found.stream, new.stream), (found.z, new.z)):
                    for x, y in zip(into[layer:], of_layers[layer:], strict=True):
                        x[:, rows] = y
        return found
