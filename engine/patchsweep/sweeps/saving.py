"""What a tolerance saves, estimated before the run from a few patches that run both ways."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import ConfigError
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.plan import PatchSet, SitePlan
from patchsweep.spec.shards import blocks_of, site_groups_of
from patchsweep.spec.spec import Request
from patchsweep.sweeps.adaptive import Adaptive
from patchsweep.sweeps.calibration import EXACTLY, sampled_pairs
from patchsweep.sweeps.exact import Captured

N_SPREAD = 48  # patches of each site, besides those that the thresholds come from
OFTEN = 4  # copies of them in one batch, which tell what a larger batch takes


@dataclass(frozen=True)
class Saving:
    """What a sweep with a tolerance takes beside the exact one; an estimate from a few patches."""

    n_patches: int  # patches that ran both ways
    token_layers: Mapping[str, int]  # by site, with the tolerance
    exact_token_layers: Mapping[str, int]  # by site
    seconds: float  # with the tolerance; its gradients and its own sample included
    exact_seconds: float  # of the exact sweep's packed batches

    @property
    def share(self) -> float:
        """Token-layers with the tolerance, as a share of the exact sweep's."""
        return sum(self.token_layers.values()) / max(1, sum(self.exact_token_layers.values()))


def check_sample(request: Request) -> None:
    """Raise ConfigError unless the request has a tolerance, whose saving a sample can tell."""
    if request.spec.tolerance is None:
        raise ConfigError(
            "sample=True runs a few patches to estimate what a tolerance saves, and there is "
            "none; give one, such as tolerance=0.01, or leave the sample out"
        )


def estimate_saving(request: Request, choice: RunnerChoice) -> Saving:
    """Return what the request's tolerance saves, estimated from a few patches of each site.

    The thresholds are those that the run will choose, from the same sample. At these, `N_SPREAD`
    more patches of each site run, from the same pairs, and what they take is scaled to
    all patches.

    Raises:
        ConfigError: the packed runner, which the tolerance needs, cannot run the model.
    """
    adaptive = Adaptive(request, choice)
    start = time.perf_counter()
    samples = adaptive.calibrate().samples
    calibrating = time.perf_counter() - start
    pairs = sampled_pairs(len(request.pairs))
    n_patches = sum(len(sample.patches) for sample in samples.values())
    scaled = dict.fromkeys(samples, 0.0)  # token-layers with the tolerance, of the pairs' patches
    exact_cost, ran = 0, 0
    seconds = np.zeros(4)  # of captures, exact runs, and runs with the tolerance once and often
    for pair in pairs:
        clock = [time.perf_counter()]
        (captured,) = adaptive.captures.of(range(pair, pair + 1))
        clock.append(time.perf_counter())
        drawn = [_drawn(adaptive, plan, captured, len(pairs)) for plan in request.plans]
        adaptive.exact(captured, [chosen for chosen, _ in drawn])
        clock.append(time.perf_counter())
        loose = [d for d in drawn if samples[d[0].plan.site.name].level != EXACTLY]
        sets = [chosen for chosen, _ in loose]
        levels = [samples[chosen.plan.site.name].level for chosen in sets]
        results = adaptive.run(captured, sets, levels) if sets else []
        clock.append(time.perf_counter())
        if sets:
            adaptive.run(captured, sets * OFTEN, levels * OFTEN)
        clock.append(time.perf_counter())
        seconds += np.diff(clock)
        n_patches += sum(len(chosen.patches) for chosen, _ in drawn)
        exact_cost += sum(_cost(chosen) for chosen, _ in drawn)
        for (chosen, weight), (_, _, taken) in zip(loose, results, strict=True):
            ran += int(taken.sum())
            scaled[chosen.plan.site.name] += float(weight @ taken)
    loading, exactly, once, often = seconds
    # a pass of few tokens takes what reading the weights takes, and more for each token-layer
    per_token_layer = max(0.0, often - once) / max(1, (OFTEN - 1) * ran)
    per_pass = max(0.0, once - per_token_layer * ran) / len(pairs)
    total = calibrating + loading / len(pairs) * len(request.pairs)
    total += per_pass * _passes(request)
    token_layers: dict[str, int] = {}
    for plan in request.plans:
        name, cost = plan.site.name, plan.token_layers
        if samples[name].level == EXACTLY:
            token_layers[name] = cost
            total += exactly * cost / max(1, exact_cost)
            continue
        share = scaled[name] / max(1, sum(plan.totals(range(p, p + 1)).token_layers for p in pairs))
        total += per_token_layer * share * cost
        # patches of the sample count with their exact runs, as in what a run says of itself
        of_sample = _cost(PatchSet(plan, samples[name].patches))
        token_layers[name] = round(share * (cost - of_sample) + of_sample)
    exact = {plan.site.name: plan.token_layers for plan in request.plans}
    exact_seconds = exactly * sum(exact.values()) / max(1, exact_cost)
    return Saving(n_patches, token_layers, exact, float(total), float(exact_seconds))


def _passes(request: Request) -> float:
    """Return how many passes over all blocks the run's batches are; later layers skip blocks."""
    blocks, groups = blocks_of(request.plans), site_groups_of(request.plans)
    passes = 0.0
    for plan in {groups[plan.site.name]: plan for plan in request.plans}.values():
        n_pairs, n_layers = blocks[plan.site.name]
        skipped = np.arange(0, plan.shape[1], n_layers) / plan.shape[1]
        passes += -(-plan.shape[0] // n_pairs) * float((1 - skipped).sum())
    return passes


def _drawn(
    adaptive: Adaptive, plan: SitePlan, captured: Captured, n_pairs: int
) -> tuple[PatchSet, NDArray[np.float64]]:
    """Return patches of one pair, and how many live patches each stands for.

    Systematic: patches in the order of their estimates, at even steps of the sum of their sizes.
    A patch counts by the root of its estimate, half of all by their number: the few patches that
    take most token-layers have large estimates.
    """
    live = plan.live_patches(captured.batch.pairs)
    estimates = np.abs(adaptive.estimates(captured, PatchSet(plan, live))).max(axis=0)
    order = np.argsort(estimates, kind="stable")
    size = np.sqrt(estimates[order].astype(np.float64))
    size = size / max(float(size.sum()), 1e-30) + 1 / max(1, len(live))
    ends = np.cumsum(size)
    n = -(-N_SPREAD // n_pairs)
    at = np.searchsorted(ends, (np.arange(n) + 0.5) * (ends[-1] if len(ends) else 0.0) / n)
    at, times = np.unique(at[at < len(live)], return_counts=True)
    patches = live[order[at]]
    weight = times * (ends[-1] / n) / size[at] if len(at) else np.zeros(0)
    by_number = np.argsort(patches)
    return PatchSet(plan, patches[by_number]), weight[by_number]


def _cost(chosen: PatchSet) -> int:
    """Return the token-layers of a set's exact runs."""
    return int(chosen.plan.cost[chosen.patches].sum())
