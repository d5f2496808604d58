"""The self-test passes a right runner, and none that is wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from patchsweep.models import load_model
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.self_test import SelfTest
from patchsweep.runners.trials import AMPLIFIED, N_SHARED, SPAN, Kind
from patchsweep.spec.sites import SITES
from subjects import model
from transformer_lens.model_bridge import TransformerBridge
from wrong_runners import WRONG, moved, ways_of

KINDS: tuple[Kind, ...] = ("resample", "zero", "mean", "mean_all", "mean_label", "custom")


# every way to be wrong at these sites, one in four at the others; slow tests look at the rest
QUICK = ("resid_pre", "z", "k", "pattern_cell")


def _case(a: str, b: str, quick: bool) -> Any:
    """Parameters of a test, slow unless `quick`."""
    return pytest.param(a, b, marks=() if quick else pytest.mark.slow)


WAYS = [
    _case(site, way, site in QUICK or (i + j) % 4 == 0)
    for i, site in enumerate(SITES)
    for j, way in enumerate(ways_of(site))
]


def make_test(bridge: TransformerBridge, site: str, kind: Kind) -> SelfTest:
    """A self-test of one site, amplified for it by a right runner."""
    test = SelfTest(bridge, [SITES[site]], kind, joint_layers=True)
    outcome = test.judge(batches(test))[site]
    assert outcome.passed, outcome.failure
    assert outcome.seen
    return test


def batches(test: SelfTest, cls: type[PackedRunner] = PackedRunner) -> PackedRunner:
    return cls(test.bridge, test.sites, compute_dtype=test.compute_dtype)


@cache
def self_test(site: str, kind: Kind = "resample") -> SelfTest:
    return make_test(model("tiny:llama"), site, kind)


@pytest.mark.parametrize(
    ("site", "kind"),
    [_case(site, kind, kind == "resample") for site in SITES for kind in KINDS],
)
def test_a_right_runner_passes(site: str, kind: Kind) -> None:
    if (site, kind) == ("result", "custom"):
        pytest.skip("packed batches refuse it")
    test = self_test(site, kind)
    few = PackedRunner(test.bridge, test.sites, max_tokens=16)
    outcome = test.judge(few)[site]
    assert outcome.passed, outcome.failure
    assert outcome.error < 2e-4  # a tenth of what is allowed


@pytest.mark.parametrize(("site", "way"), WAYS)
def test_a_wrong_runner_is_caught(site: str, way: str) -> None:
    test = self_test(site)
    assert not test.judge(batches(test, ways_of(site)[way]()))[site].passed


@pytest.mark.parametrize(
    ("site", "to"), [("q", "rot_q"), ("k", "rot_k"), ("rot_q", "q"), ("rot_k", "k")]
)
def test_a_patch_on_the_wrong_side_of_rotary_is_caught(site: str, to: str) -> None:
    test = self_test(site, "custom")  # a source's values may stand on either side
    assert not test.judge(batches(test, moved(site, to)))[site].passed


@pytest.mark.parametrize("way", ["ignores-the-patch", "returns-nan", "effect-of-the-other-sign"])
@pytest.mark.parametrize("site", ["z", "q", "mlp_post"])
def test_a_wrong_runner_is_caught_that_says_how_far_to_amplify(site: str, way: str) -> None:
    test = SelfTest(model("tiny:llama"), [SITES[site]], "resample")
    assert not test.judge(batches(test, WRONG[way]()))[site].passed


@pytest.mark.parametrize("site", ["q", "mlp_post", "pattern_cell"])
def test_weights_of_16_bits_are_tested_in_fp32(site: str) -> None:
    bridge = load_model("tiny:llama", device="cpu", dtype="bfloat16")
    test = make_test(bridge, site, "resample")
    assert test.compute_dtype == torch.float32
    wrong = WRONG["effect-too-large-by-1-percent"]()
    assert not test.judge(batches(test, wrong))[site].passed


def test_one_wrong_site_does_not_fail_the_others() -> None:
    class OneWrong(PackedRunner):
        def run_together(self, loaded, sets, metrics, null=()):
            found = super().run_together(loaded, sets, metrics)
            names = [chosen.plan.site.name for chosen in sets]
            return [2 * x if name == "k" else x for name, x in zip(names, found, strict=True)]

    sites = [SITES[name] for name in ("resid_pre", "k", "z")]
    test = SelfTest(model("tiny:llama"), sites, "resample")
    outcomes = test.judge(batches(test, OneWrong))
    assert [name for name, outcome in outcomes.items() if not outcome.passed] == ["k"]
    assert "pair 0, layer 0" in outcomes["k"].failure


def test_a_site_without_any_effect_is_called_unseen() -> None:
    bridge = load_model("tiny:llama", device="cpu")
    with torch.no_grad():
        for block in bridge.original_model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    test = SelfTest(bridge, [SITES["resid_pre"], SITES["v"]], "resample")
    # hooks that change nothing are refused, unless they were tried before the weights were edited
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HookedRunner, "check", lambda self, tokens: None)
        outcomes = test.judge(batches(test))
    assert outcomes["resid_pre"].seen
    assert not outcomes["v"].seen
    assert outcomes["v"].passed


@pytest.mark.parametrize("site", SITES)
def test_trials_cover_layers_positions_and_heads(site: str) -> None:
    test = SelfTest(model("tiny:llama"), [SITES[site]], "resample")
    layers, positions, units, dead = set(), set(), set(), 0
    for trial in test.trials:
        (live,) = trial.live
        plan = live.plan
        _, layer, pos, unit = np.unravel_index(plan.cell[live.patches], plan.shape)
        assert set(plan.pair[live.patches]) == set(range(AMPLIFIED))
        layers |= {plan.axes.layers[n] for n in layer}
        positions |= {plan.axes.positions[n] for n in pos}
        units |= {None if plan.axes.units is None else plan.axes.units[n] for n in unit}
        # the last layer, and a position that is not read, in trials of either length
        assert plan.axes.layers[max(layer)] == ((2,) if plan.site.layered else (0,))
        assert plan.start[live.patches].min() >= N_SHARED
        dead += sum(len(chosen.patches) for chosen in trial.dead)
    assert layers == ({(0,), (1,), (2,)} if SITES[site].layered else {(0,)})
    assert len(positions) >= 3
    assert SPAN in positions or site == "pattern_cell"
    if SITES[site].unit is not None:
        assert units == set(test.trials[0].live[0].plan.axes.units)  # single ones, and several
        assert {len(unit) > 1 for unit in units} == {False, True}
    assert dead >= 2
