"""Adaptive sweeps of a trained model: both ends, and the tolerance on patches that nobody saw."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.adaptive import Adaptive
from subjects import model

pytestmark = pytest.mark.slow
NAME = "smollm2-135m"
SITES = ["z", "resid_pre", "attn_out", "mlp_out"]


def test_both_ends() -> None:
    bridge = model(NAME)
    request = make_request(
        bridge, ps.load_task(bridge, "ioi_demo"), SweepSpec(SITES, tolerance=1.0)
    )
    runner = PackedRunner(bridge, request.sites)
    adaptive = Adaptive(request, RunnerChoice(runner, "asked for", None))
    (captured,) = adaptive.captures.of(range(1))
    sets = [PatchSet(plan, plan.live_patches()[::29]) for plan in request.plans]
    exact = adaptive.exact(captured, sets)
    assert max(float(np.abs(values - captured.base).max()) for values in exact) > 5
    errors = {}
    for level in ((0.0, 0.0), (1e-3, 1e-3), (1e-2, 1e-2), (np.inf, np.inf)):
        found = adaptive.run(captured, sets, [level] * len(sets))
        errors[level] = max(
            float(np.abs(values - truth).max())
            for (values, *_), truth in zip(found, exact, strict=True)
        )
    first, second, third, last = errors.values()
    assert first < 1e-4, "rounding of logits of order 20 in sums of another order"
    assert second < third / 5, errors
    assert third < last / 20, errors


def test_the_tolerance_holds_for_patches_that_calibration_did_not_see() -> None:
    bridge = model(NAME)
    pairs = ps.load_task(bridge, "ioi_demo")
    exact = ps.sweep(bridge, pairs, SITES, runner="packed")
    within = ps.sweep(bridge, pairs, SITES, runner="packed", tolerance=0.01)
    sites = attributes(within)["adaptive"]["sites"]
    for name in SITES:
        assert sites[name]["n"] < exact[name].size / 10
        assert float(np.abs(within[name] - exact[name]).max()) <= 0.01
        effects = (abs(ds[name] - ds.base_metric).values.ravel() for ds in (exact, within))
        first, second = (set(np.argsort(-effect)[:20].tolist()) for effect in effects)
        assert first == second
    assert (
        float(within.z_token_layers.sum()) < 0.15 * attributes(within)["plan"]["z"]["token_layers"]
    )


def test_a_plan_estimates_what_the_run_then_reports() -> None:
    bridge = model(NAME)
    pairs = ps.load_task(bridge, "ioi_demo")
    saving = ps.plan(bridge, pairs, SITES, runner="packed", tolerance=0.01, sample=True).saving
    within = ps.sweep(bridge, pairs, SITES, runner="packed", tolerance=0.01)
    assert saving is not None
    assert saving.n_patches < 400
    for name in SITES:
        told = float(np.nansum(within[f"{name}_token_layers"]))
        assert told / 2 < saving.token_layers[name] < 2 * told, name
