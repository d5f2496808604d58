"""Adaptive sweeps: exact where a patch acts, to first order where it hardly does.

With `tolerance=` a sweep runs what each patch changes and takes the rest from the base run's
gradient (`runners.packed.adaptive`). `<site>` holds the values, `<site>_linear` the part of each
effect that comes from the gradient, and `<site>_token_layers` what was run for it; 0 means that the
value is the estimate of `atp`. The thresholds come from a sample that is run both ways before the
run begins, and a store records them with the sample's errors, so that all processes use the same.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.attribution import Atp, check_request
from patchsweep.attribution.base_gradients import STREAM, BaseGradients, base_gradients
from patchsweep.attribution.estimates import Work as Attributed
from patchsweep.errors import ConfigError, MethodError
from patchsweep.forward.grad import GradientModel
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.compute import name_of
from patchsweep.runners.packed.adaptive import Gradients
from patchsweep.runners.packed.adaptive_runner import AdaptiveRunner, AdaptiveSet
from patchsweep.runners.packed.runner import Loaded, PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.batch import Batch
from patchsweep.spec.finite import check_cells
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, PatchSet, SitePlan
from patchsweep.spec.spec import Request, blocks_of, site_groups_of
from patchsweep.store.difference import DECIDED
from patchsweep.store.layout import Unit, Variable
from patchsweep.sweeps.exact import Block, Captured, Captures, references_of
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.layout import dims_of, shape_of

LINEAR, TOKEN_LAYERS = "_linear", "_token_layers"
(ADAPTIVE,) = DECIDED  # the attribute with the thresholds and the errors of the sample

# (theta in units of the tolerance, tau) from loose to strict; the loosest whose largest error on
# the sample is within `MARGIN` times the tolerance is taken
LEVELS = ((0.5, 0.1), (0.5, 0.03), (0.3, 0.01), (0.1, 3e-3), (0.03, 1e-3), (0.01, 3e-4))
MARGIN = 0.5
N_AT_ONCE = 3  # levels that are tried first, together; the others follow if none is enough
# patches of the sample, per site: the largest estimates, and random live ones
N_LARGEST = 12
N_RANDOM = 12
# pairs that the sample comes from, evenly spread over the run's
N_PAIRS = 4


@dataclass(frozen=True)
class Sample:
    """Patches of one site that were run both ways."""

    patches: Ints  # [patch] numbers in the site's plan, ascending
    values: Values  # [metric, patch] exact
    effect: Values  # [metric, patch] exact - base
    error: Values  # [metric, patch] adaptive - exact, at the chosen thresholds


@dataclass(frozen=True)
class Calibration:
    """The thresholds of a run, and the sample that decided them."""

    theta: float  # in units of the tolerance
    tau: float
    samples: Mapping[str, Sample]  # by site
    share: float  # of the exact sweep's token-layers, over the sample

    @property
    def is_exact(self) -> bool:
        """Whether no thresholds met the tolerance, so that every patch runs exactly."""
        return self.tau == 0.0

    def attributes(self, request: Request) -> dict[str, Any]:
        """Return what a store records."""
        return {
            "tolerance": request.spec.tolerance,
            "theta": self.theta,
            "tau": self.tau,
            "within": "the tolerance on a sample"
            if not self.is_exact
            else "exact: no thresholds met the tolerance on the sample, so every patch was run",
            "sample_token_layers": self.share,
            "sample": {
                name: {
                    "n": len(sample.patches),
                    "largest_error": _by_metric(request, np.abs(sample.error).max(axis=1)),
                    "median_error": _by_metric(request, np.median(np.abs(sample.error), axis=1)),
                    "error_by_effect": _by_effect(request, sample),
                    "patches": sample.patches.tolist(),
                    "values": sample.values.tolist(),
                    "effect": sample.effect.tolist(),
                    "error": sample.error.tolist(),
                }
                for name, sample in self.samples.items()
            },
        }

    @classmethod
    def of_attributes(cls, recorded: Mapping[str, Any]) -> Calibration:
        """Return the calibration that `attributes` recorded.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            samples = {
                str(name): Sample(
                    np.array(sample["patches"], np.int64),
                    np.array(sample["values"], np.float32),
                    np.array(sample["effect"], np.float32),
                    np.array(sample["error"], np.float32),
                )
                for name, sample in recorded["sample"].items()
            }
            theta, tau = float(recorded["theta"]), float(recorded["tau"])
            return cls(theta, tau, samples, float(recorded["sample_token_layers"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise ConfigError(
                "the store does not hold the thresholds of its tolerance; write to a new store"
            ) from None


def check_tolerance(request: Request, others: Mapping[str, bool]) -> None:
    """Check that the run's tolerance can be met; `others` names settings that exclude it.

    Raises:
        ConfigError: a setting excludes it, or a metric, site or weight has no gradient.
    """
    given = f"tolerance={request.spec.tolerance!r}"
    for name, is_set in others.items():
        if is_set:
            raise ConfigError(f"{given} is for method=exact, not {name}; leave one of them out")
    if request.compute_dtype in SIXTEEN_BITS:
        raise ConfigError(
            f"{given} needs numbers without 16-bit rounding, and this sweep computes in "
            f"{name_of(request.compute_dtype)}; use compute_dtype=float32"
        )
    try:
        check_request(request, (Atp(),))
    except MethodError as error:
        raise ConfigError(
            f"{given} takes to first order what a patch hardly changes, and cannot here: {error}; "
            "leave the tolerance out to run every patch exactly"
        ) from error


def tolerance_of(request: Request, captured: Captured) -> Values:
    """Return the tolerance `[metric, pair of the batch]` in units of each metric."""
    given = request.spec.tolerance
    if isinstance(given, str):
        share = float(given.removesuffix("%")) / 100
        return (share * np.abs(captured.source - captured.base)).astype(np.float32)
    assert given is not None
    return np.full(captured.base.shape, float(given), np.float32)


def adaptive_variables(request: Request) -> tuple[Variable, ...]:
    """Return the variables of an adaptive sweep besides `<site>`."""
    blocks = blocks_of(request.plans)
    words = {
        LINEAR: "part of the effect at {} that is linear, from the base run's gradient",
        TOKEN_LAYERS: "tokens times blocks that ran for the patch at {}; 0: the value is linear",
    }
    return tuple(
        Variable(
            name=plan.site.name + suffix,
            dims=dims_of(plan),
            shape=shape_of(plan, len(request.metrics)),
            unit=blocks[plan.site.name],
            attrs={
                "long_name": text.format(plan.site.name),
                "role": suffix.removeprefix("_"),
                "site": plan.site.name,
            },
        )
        for plan in request.plans
        for suffix, text in words.items()
    )


@dataclass(eq=False)
class _Loaded:
    """A captured batch with the base run's gradients."""

    packed: Loaded
    gradients: BaseGradients

    @property
    def batch(self) -> Batch:
        return self.packed.batch


class _Loader:
    """Captures batches with their gradients; a `Runner` as far as `Captures` needs one."""

    def __init__(self, request: Request, runner: PackedRunner) -> None:
        self.request = request
        self.runner = AdaptiveRunner(runner)
        own = [site for site in STREAM if site not in request.sites]
        longest = max(int(plan.full_lengths.max()) for plan in request.plans)
        self.model = GradientModel(
            request.bridge, request.sites, own, longest, compute_dtype=request.compute_dtype
        )

    def load(self, batch: Batch, intervention: Intervention) -> _Loaded:
        """Return the batch's captures and gradients."""
        request = self.request
        loaded = self.runner.load(batch, intervention)
        work = Attributed(
            tape=self.model,
            batch=batch,
            plans=request.plans,
            shape=request.shape,
            metrics=request.metrics,
            intervention=intervention,
            source={
                name: loaded.source.layers_of(name)
                for name in (plan.site.name for plan in request.plans)
            },
            source_logits=self.runner.packed.logits_of(loaded, "source"),
        )
        with self.model.frozen():
            return _Loaded(loaded, base_gradients(work))

    def references(self, loaded: _Loaded, metrics: Sequence[Metric]) -> tuple[Tensor, Tensor]:
        """See `Runner`."""
        return self.runner.packed.references(loaded.packed, metrics)


Ran = tuple[Values, Values, Ints]  # values, linear parts, token-layers of one set


@dataclass(frozen=True, eq=False)
class _Part:
    """The sample's patches of one pair, one set per site, with their exact values."""

    captured: Captured
    sets: list[PatchSet]
    truth: list[Values]
    tolerance: Values  # [metric, 1]

    @property
    def token_layers(self) -> int:
        """Token-layers of the exact runs."""
        return sum(int(chosen.plan.cost[chosen.patches].sum()) for chosen in self.sets)

    def worst(self, results: Sequence[Ran]) -> float:
        """Return the largest error, in units of the tolerance."""
        least = np.maximum(self.tolerance, np.finfo(np.float32).tiny)
        errors = [
            np.abs(values - truth) / least
            for (values, _, _), truth in zip(results, self.truth, strict=True)
        ]
        return max((float(error.max()) for error in errors if error.size), default=0.0)

    def exactly(self) -> list[Ran]:
        """Return the exact values as results."""
        return [(values, np.zeros_like(values), np.zeros(0, np.int64)) for values in self.truth]


def _samples(parts: Sequence[_Part], results: Sequence[Sequence[Ran]]) -> dict[str, Sample]:
    """Return the sample of each site, with the errors of `results`, by part and set."""
    by_site: dict[str, list[tuple[NDArray[Any], ...]]] = {}
    for part, found in zip(parts, results, strict=True):
        for chosen, truth, (values, _, _) in zip(part.sets, part.truth, found, strict=True):
            plan = chosen.plan
            assert isinstance(plan, SitePlan)
            effect = truth - part.captured.base_of(plan, chosen.patches)
            columns = (chosen.patches, truth, effect, values - truth)
            by_site.setdefault(plan.site.name, []).append(columns)
    return {
        name: Sample(*(np.concatenate(column, axis=-1) for column in zip(*columns, strict=True)))
        for name, columns in by_site.items()
    }


class Adaptive:
    """Runs patches of a request at given thresholds.

    Raises:
        ConfigError: the runner is not the packed one, the only one that runs single tokens.
    """

    def __init__(self, request: Request, choice: RunnerChoice) -> None:
        if not isinstance(choice.runner, PackedRunner):
            raise ConfigError(
                f"tolerance={request.spec.tolerance!r} needs the packed runner, but "
                f"{choice.reason}; leave the tolerance out"
            )
        self.request = request
        self.packed = choice.runner
        self._loader = _Loader(request, choice.runner)
        self.captures = Captures(request, self._loader)  # type: ignore[arg-type]

    def run(
        self, captured: Captured, sets: Sequence[PatchSet], levels: Sequence[tuple[float, float]]
    ) -> list[Ran]:
        """Return values, linear parts and token-layers of each set, at its level (theta, tau)."""
        loaded: _Loaded = captured.loaded
        tolerance = tolerance_of(self.request, captured)
        results = self._loader.runner.run(
            loaded.packed,
            Gradients(loaded.gradients.stream, loaded.gradients.z),
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
            loaded.gradients.estimates.cells(plan, chosen.patches, captured.batch),
            plan,
            chosen.patches,
            self.request.metrics,
            "the linear estimate",
        )

    def exact(self, captured: Captured, sets: Sequence[PatchSet]) -> list[Values]:
        """Return exact values `[metric, patch]` of each set."""
        loaded: _Loaded = captured.loaded
        found = self.packed.run_together(loaded.packed, sets, self.request.metrics)
        return [
            check_cells(values.numpy(), chosen.plan, chosen.patches, self.request.metrics)  # type: ignore[arg-type]
            for values, chosen in zip(found, sets, strict=True)
        ]

    def calibrate(self) -> Calibration:
        """Return the loosest thresholds whose errors on a sample are within the tolerance."""
        parts = [self._part(captured) for captured in self._spread()]
        for group in (LEVELS[:N_AT_ONCE], LEVELS[N_AT_ONCE:]):
            for (theta, tau), results in zip(group, self._at_levels(parts, group), strict=True):
                ratios = [part.worst(found) for part, found in zip(parts, results, strict=True)]
                if max(ratios) <= MARGIN:
                    ran = sum(int(one[2].sum()) for found in results for one in found)
                    share = ran / max(1, sum(part.token_layers for part in parts))
                    return Calibration(theta, tau, _samples(parts, results), share)
        return Calibration(0.0, 0.0, _samples(parts, [part.exactly() for part in parts]), 1.0)

    def _spread(self) -> list[Captured]:
        """Return the captures of the pairs that the sample comes from."""
        last = len(self.request.pairs) - 1
        pairs = sorted({round(i * last / max(1, N_PAIRS - 1)) for i in range(N_PAIRS)})
        return [c for pair in pairs for c in self.captures.of(range(pair, pair + 1))]

    def _part(self, captured: Captured) -> _Part:
        n_pairs = min(N_PAIRS, len(self.request.pairs))
        sets = [self._sample(plan, captured, n_pairs) for plan in self.request.plans]
        tolerance = tolerance_of(self.request, captured)
        return _Part(captured, sets, self.exact(captured, sets), tolerance)

    def _at_levels(
        self, parts: Sequence[_Part], levels: Sequence[tuple[float, float]]
    ) -> list[list[list[Ran]]]:
        """Return the results of the sample by level, part and set; all levels share batches."""
        by_level: list[list[list[Ran]]] = [[] for _ in levels]
        for part in parts:
            n = len(part.sets)
            results = self.run(
                part.captured,
                part.sets * len(levels),
                [level for level in levels for _ in part.sets],
            )
            for i, of_level in enumerate(by_level):
                of_level.append(results[i * n : (i + 1) * n])
        return by_level

    def _sample(self, plan: SitePlan, captured: Captured, n_pairs: int) -> PatchSet:
        """Return a site's part of the sample in one pair, the same in every process."""
        (pair,) = captured.batch.pairs
        live = plan.live_patches([pair])
        estimates = np.abs(self.estimates(captured, PatchSet(plan, live))).max(axis=0)
        largest = live[np.argsort(-estimates, kind="stable")[: -(-N_LARGEST // n_pairs)]]
        rng = np.random.default_rng([zlib.crc32(plan.site.name.encode()), pair])
        random = rng.choice(live, min(-(-N_RANDOM // n_pairs), len(live)), replace=False)
        return PatchSet(plan, np.unique(np.concatenate([largest, random])))


class AdaptiveWork:
    """Fills `<site>`, `<site>_linear` and `<site>_token_layers`."""

    def __init__(self, adaptive: Adaptive, calibration: Calibration) -> None:
        self.adaptive, self.calibration = adaptive, calibration
        request = self.request = adaptive.request
        self.plans = {plan.site.name: plan for plan in request.plans}
        self.site_groups = site_groups_of(request.plans)

    def __contains__(self, variable: str) -> bool:
        return site_of(variable) in self.plans

    def cost(self, unit: Unit) -> int:
        """See `Work`: the exact sweep's token-layers, times the sample's share."""
        if unit.variable not in self.plans:
            return 0
        total = self.plans[unit.variable].totals(unit.pairs, unit.layers).token_layers
        return math.ceil(total * self.calibration.share)

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        if unit.variable not in self.plans:
            return 0
        return self.plans[unit.variable].totals(unit.pairs, unit.layers).n_live

    def together(self, unit: Unit) -> Hashable:
        """See `Work`: a site's variables belong to one work item."""
        return self.site_groups[site_of(unit.variable)], unit.pair_block, unit.layer_block

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`."""
        return references_of(self.adaptive.captures, unit, len(self.request.metrics))

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`."""
        metrics, pairs = self.request.metrics, units[0].pairs
        blocks = {
            unit.variable: Block(self.plans[site_of(unit.variable)], unit, len(metrics))
            for unit in units
        }
        for captured in self.adaptive.captures.of(pairs):
            live = [
                PatchSet(self.plans[name], block.fill_dead(captured))
                for name, block in blocks.items()
                if name in self.plans
            ]
            for chosen, found in zip(live, self._run(captured, live), strict=True):
                plan, patches = chosen.plan, chosen.patches
                name = plan.site.name
                values, linear, token_layers = found
                assert isinstance(plan, SitePlan)
                blocks[name].put(patches, check_cells(values, plan, patches, metrics))
                for suffix, numbers in ((LINEAR, linear), (TOKEN_LAYERS, token_layers)):
                    blocks[name + suffix].fill_dead(captured, 0.0)
                    blocks[name + suffix].put(patches, np.broadcast_to(numbers, values.shape))
        return [blocks[unit.variable].values() for unit in units]

    def _run(self, captured: Captured, live: Sequence[PatchSet]) -> list[Ran]:
        """Return the results of the sets; patches of the sample have their exact values."""
        calibration = self.calibration
        if calibration.is_exact:
            found = [
                (values, np.zeros_like(values), chosen.plan.cost[chosen.patches])
                for chosen, values in zip(live, self.adaptive.exact(captured, live), strict=True)
            ]
        else:
            level = (calibration.theta, calibration.tau)
            found = self.adaptive.run(captured, live, [level] * len(live))
        for chosen, (values, linear, token_layers) in zip(live, found, strict=True):
            sample = calibration.samples[chosen.plan.site.name]
            _, at, of_sample = np.intersect1d(
                chosen.patches, sample.patches, assume_unique=True, return_indices=True
            )
            values[:, at], linear[:, at] = sample.values[:, of_sample], 0.0
            token_layers[at] = chosen.plan.cost[chosen.patches[at]]
        return found


def site_of(variable: str) -> str:
    """Return the site of a variable of an adaptive sweep."""
    return variable.removesuffix(TOKEN_LAYERS).removesuffix(LINEAR)


def _by_metric(request: Request, numbers: Values) -> dict[str, float]:
    return {m.name: float(x) for m, x in zip(request.metrics, numbers, strict=True)}


def _by_effect(request: Request, sample: Sample) -> dict[str, list[float]]:
    """Return, per metric, the largest error in each quarter of the sample, by size of effect."""
    parts = {}
    for i, metric in enumerate(request.metrics):
        order = np.argsort(np.abs(sample.effect[i]))
        quarters = np.array_split(np.abs(sample.error[i])[order], 4)
        parts[metric.name] = [float(quarter.max(initial=0.0)) for quarter in quarters]
    return parts
