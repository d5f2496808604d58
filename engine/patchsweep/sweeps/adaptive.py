"""Adaptive sweeps: exact where a patch acts, to first order where it hardly does.

With `tolerance=` a sweep runs what each patch changes and takes the rest from the base run's
gradient (`runners.packed.adaptive`). `<site>` holds the values, `<site>_linear` the part of each
effect that comes from the gradient, and `<site>_token_layers` what was run for it. The thresholds
come from a sample that is run both ways before the run begins. A store records them with the
sample's errors, so that all processes of a run use the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from patchsweep.attribution import Atp, check_request
from patchsweep.attribution.base_gradients import STREAM, base_gradients
from patchsweep.attribution.estimates import Estimates, n_shared
from patchsweep.attribution.estimates import Work as Attributed
from patchsweep.errors import ConfigError, MethodError
from patchsweep.forward.grad import Activations, GradientModel, Gradients
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.compute import name_of
from patchsweep.results.tolerance import LINEAR, TOKEN_LAYERS, in_units
from patchsweep.runners.packed.adaptive_runner import AdaptiveRunner, AdaptiveSet
from patchsweep.runners.packed.runner import Loaded, PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.batch import Batch
from patchsweep.spec.finite import check_cells
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import PatchSet, SitePlan
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Unit, Variable
from patchsweep.sweeps.calibration import (
    EXACTLY,
    Calibration,
    Part,
    Ran,
    calibrate,
    n_each,
    sample_rows,
    sampled_pairs,
)
from patchsweep.sweeps.exact import Block, Captured, Captures, SiteWork
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.layout import site_variables


def check_adaptive(request: Request, others: Mapping[str, bool]) -> None:
    """Check that the run's tolerance can be met; `others` names settings that exclude it.

    Raises:
        ConfigError: a setting excludes it, or a metric, site or weight has no gradient.
    """
    setting = f"tolerance={request.spec.tolerance!r}"
    for name, is_set in others.items():
        if is_set:
            raise ConfigError(f"{setting} is for method=exact, not {name}; leave one of them out")
    check_first_order(
        setting, request.compute_dtype, lambda: check_request(request, (Atp(),)), "sweep"
    )


def check_first_order(
    setting: str, compute_dtype: torch.dtype, check: Callable[[], None], run: str
) -> None:
    """Check that a run can take to first order what a patch hardly changes.

    Raises:
        ConfigError: it computes in 16 bits, or `check` finds no gradient.
    """
    if compute_dtype in SIXTEEN_BITS:
        raise ConfigError(
            f"{setting} needs numbers without 16-bit rounding, and this {run} computes in "
            f"{name_of(compute_dtype)}; use compute_dtype=float32"
        )
    try:
        check()
    except MethodError as error:
        raise ConfigError(
            f"{setting} takes to first order what a patch hardly changes, and cannot here: "
            f"{error}; leave the tolerance out to run every patch exactly"
        ) from error


def tolerance_of(request: Request, captured: Captured) -> Values:
    """Return the tolerance `[metric, pair of the batch]` in units of each metric."""
    return in_units(request.spec.tolerance, captured.base, captured.source)


def adaptive_variables(request: Request) -> tuple[Variable, ...]:
    """Return the variables of an adaptive sweep besides `<site>`."""
    words = {
        LINEAR: "part of the effect at {} that is linear, from the base run's gradient",
        TOKEN_LAYERS: "tokens times blocks that ran for the patch at {}",
    }
    return site_variables(request, words)


@dataclass(eq=False)
class _Loaded:
    """A captured batch with the base run's gradients."""

    packed: Loaded
    estimates: Estimates  # of the swept sites: atp
    gradients: Gradients

    @property
    def batch(self) -> Batch:
        return self.packed.batch


class _Loader:
    """Captures batches with their gradients; a `Loader`."""

    def __init__(self, request: Request, runner: PackedRunner) -> None:
        self.request = request
        self.runner = AdaptiveRunner(runner)
        own = [site for site in STREAM if site not in request.sites]
        longest = request.pairs.longest
        self.model = GradientModel(
            request.bridge, request.sites, own, longest, compute_dtype=request.compute_dtype
        )

    def load(self, batch: Batch, intervention: Intervention) -> _Loaded:
        """Return the batch's captures and gradients."""
        request = self.request
        loaded = self.runner.load(batch, intervention)
        start = n_shared(self.model, batch, intervention)
        work = Attributed(
            gradients=self.model,
            batch=batch,
            plans=request.plans,
            metrics=request.metrics,
            intervention=intervention,
            source=Activations(
                {
                    site.name: [
                        x[:, :, start:] if site.is_pattern else x[:, start:]
                        for x in loaded.source.layers_of(site.name)
                    ]
                    for site in request.sites
                },
                self.runner.packed.logits_of(loaded, "source"),
                loaded.source.prefix(start) if start else None,
            ),
        )
        with self.model.frozen():
            return _Loaded(loaded, *base_gradients(work))

    def references(self, loaded: _Loaded, metrics: Sequence[Metric]) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        return self.runner.packed.references(loaded.packed, metrics)


def packed_of(choice: RunnerChoice, tolerance: float | str | None) -> PackedRunner:
    """Return the packed runner, the only one that runs single tokens.

    Raises:
        ConfigError: another one was chosen.
    """
    if not isinstance(choice.runner, PackedRunner):
        raise ConfigError(
            f"tolerance={tolerance!r} needs the packed runner, but {choice.reason}; leave the "
            "tolerance out"
        )
    return choice.runner


class Adaptive:
    """Runs patches of a request at given thresholds.

    Raises:
        ConfigError: the runner is not the packed one, the only one that runs single tokens.
    """

    def __init__(self, request: Request, choice: RunnerChoice) -> None:
        self.request = request
        self.packed = packed_of(choice, request.spec.tolerance)
        self._loader = _Loader(request, self.packed)
        self.captures = Captures(request, self._loader)

    def run(
        self, captured: Captured, sets: Sequence[PatchSet], levels: Sequence[tuple[float, float]]
    ) -> list[Ran]:
        """Return values, linear parts and token-layers of each set, at its level (theta, tau)."""
        loaded: _Loaded = captured.loaded
        tolerance = tolerance_of(self.request, captured)
        results = self._loader.runner.run(
            loaded.packed,
            loaded.gradients,
            [
                AdaptiveSet(
                    chosen,
                    self.estimates(captured, chosen),
                    np.float32(theta) * tolerance,
                    tau,
                )
                for chosen, (theta, tau) in zip(sets, levels, strict=True)
            ],
            self.request.metrics,
        )
        return [(result.values, result.linear, result.token_layers) for result in results]

    def estimates(self, captured: Captured, chosen: PatchSet) -> Values:
        """Return the first-order effects `[metric, patch]` of a set's patches."""
        plan = chosen.plan
        assert isinstance(plan, SitePlan)
        loaded: _Loaded = captured.loaded
        return check_cells(
            loaded.estimates.cells(plan, chosen.patches, captured.batch),
            plan,
            chosen.patches,
            self.request.metrics,
            "the linear estimate",
        )

    def exact(self, captured: Captured, sets: Sequence[PatchSet]) -> list[Values]:
        """Return exact values `[metric, patch]` of each set."""
        loaded: _Loaded = captured.loaded
        results = self.packed.run_together(loaded.packed, sets, self.request.metrics)
        return [
            check_cells(values.numpy(), chosen.plan, chosen.patches, self.request.metrics)  # type: ignore[arg-type]
            for values, chosen in zip(results, sets, strict=True)
        ]

    def calibrate(self) -> Calibration:
        """Return, per site, the loosest thresholds with sample errors within the tolerance."""
        pairs = sampled_pairs(len(self.request.pairs))
        parts: dict[str, list[Part]] = {}
        for captured in [c for pair in pairs for c in self.captures.of(range(pair, pair + 1))]:
            sets = [self._sample(plan, captured, len(pairs)) for plan in self.request.plans]
            for chosen, exact in zip(sets, self.exact(captured, sets), strict=True):
                plan = chosen.plan
                assert isinstance(plan, SitePlan)
                part = Part(
                    captured,
                    chosen,
                    chosen.patches,
                    exact,
                    captured.base_of(plan, chosen.patches),
                    tolerance_of(self.request, captured),
                    int(plan.cost[chosen.patches].sum()),
                )
                parts.setdefault(plan.site.name, []).append(part)
        samples = calibrate(parts, self.run)
        return Calibration({plan.site.name: samples[plan.site.name] for plan in self.request.plans})

    def _sample(self, plan: SitePlan, captured: Captured, n_pairs: int) -> PatchSet:
        """Return a site's part of the sample in one pair, the same in every process."""
        (pair,) = captured.batch.pairs
        live = plan.live_patches([pair])
        n = n_each(plan.n_live, n_pairs)
        estimates = np.abs(self.estimates(captured, PatchSet(plan, live))).max(axis=0)
        return PatchSet(plan, live[sample_rows(plan.site.name, pair, estimates, n)])


class AdaptiveWork(SiteWork):
    """Fills `<site>`, `<site>_linear` and `<site>_token_layers`."""

    suffixes = (LINEAR, TOKEN_LAYERS)

    def __init__(self, adaptive: Adaptive, calibration: Calibration) -> None:
        super().__init__(adaptive.request, adaptive.captures)
        self.adaptive, self.calibration = adaptive, calibration

    def cost(self, unit: Unit) -> int:
        """See `Work`: the exact sweep's token-layers, times the sample's share."""
        share = self.calibration.samples[self.site_of[unit.variable]].share
        return math.ceil(super().cost(unit) * share)

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        metrics, pairs = self.request.metrics, units[0].pairs
        blocks = {
            unit.variable: Block(self.plans[self.site_of[unit.variable]], unit, len(metrics))
            for unit in units
        }
        for captured in self.captures.of(pairs):
            live = [
                PatchSet(self.plans[name], block.fill_dead(captured))
                for name, block in blocks.items()
                if name in self.plans
            ]
            for chosen, result in zip(live, self._run(captured, live), strict=True):
                plan, patches = chosen.plan, chosen.patches
                name = plan.site.name
                values, linear, token_layers = result
                assert isinstance(plan, SitePlan)
                blocks[name].put(patches, check_cells(values, plan, patches, metrics))
                for suffix, numbers in ((LINEAR, linear), (TOKEN_LAYERS, token_layers)):
                    blocks[name + suffix].fill_dead(captured, 0.0)
                    cells = np.broadcast_to(numbers, values.shape).astype(np.float32)
                    blocks[name + suffix].put(patches, cells)
        return [blocks[unit.variable].values() for unit in units]

    def _run(self, captured: Captured, live: Sequence[PatchSet]) -> list[Ran]:
        """Return the results of the sets; patches of the sample have their exact values."""
        samples = [self.calibration.samples[chosen.plan.site.name] for chosen in live]
        loose = [i for i, sample in enumerate(samples) if sample.level != EXACTLY]
        strict = [i for i, sample in enumerate(samples) if sample.level == EXACTLY]
        results: dict[int, Ran] = {}
        if loose:
            sets, levels = [live[i] for i in loose], [samples[i].level for i in loose]
            results.update(zip(loose, self.adaptive.run(captured, sets, levels), strict=True))
        if strict:
            for i, values in zip(
                strict, self.adaptive.exact(captured, [live[i] for i in strict]), strict=True
            ):
                cost = live[i].plan.cost[live[i].patches]
                results[i] = (values, np.zeros_like(values), cost)
        for i, (chosen, sample) in enumerate(zip(live, samples, strict=True)):
            values, linear, token_layers = results[i]
            _, at, of_sample = np.intersect1d(
                chosen.patches, sample.patches, assume_unique=True, return_indices=True
            )
            values[:, at], linear[:, at] = sample.values[:, of_sample], 0.0
            token_layers[at] = chosen.plan.cost[chosen.patches[at]]
        return [results[i] for i in range(len(live))]
