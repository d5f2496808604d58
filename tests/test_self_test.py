"""The self-test passes a right runner, and none that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import pytest
from patchsweep.selection.self_test import SelfTest
from patchsweep.selection.trials import Kind
from patchsweep.sites import SITES
from patchsweep.waves import WaveRunner
from subjects import model
from wrong_runners import moved, ways_of

KINDS: tuple[Kind, ...] = ("resample", "zero", "mean", "mean_all", "mean_label", "custom")


# the other sites and values are looked at by the slow tests
QUICK = ("resid_pre", "z", "k", "pattern_cell")


def _cases(cases: Iterable[tuple[str, str]], quick: Callable[[str, str], bool]) -> list[Any]:
    """Parameters of a test, those slow that are not `quick`."""
    slow = pytest.mark.slow
    return [pytest.param(*case, marks=() if quick(*case) else slow) for case in cases]


@cache
def self_test(site: str, kind: Kind = "resample", family: str = "llama") -> SelfTest:
    return SelfTest(model(f"tiny:{family}"), [SITES[site]], kind, joint_layers=True)


@pytest.mark.parametrize(
    ("site", "kind"),
    _cases(((s, k) for s in SITES for k in KINDS), lambda site, kind: kind == "resample"),
)
def test_a_right_runner_passes(site: str, kind: Kind) -> None:
    if (site, kind) == ("result", "custom"):
        pytest.skip("waves refuse it")
    test = self_test(site, kind)
    outcome = test.judge(WaveRunner(test.bridge, test.sites, max_tokens=16))[site]
    assert outcome.passed, outcome.failure
    assert outcome.seen
    assert outcome.error < 2e-4  # a tenth of what is allowed


@pytest.mark.parametrize(
    ("site", "way"),
    _cases(((s, way) for s in SITES for way in ways_of(s)), lambda site, way: site in QUICK),
)
def test_a_wrong_runner_is_caught(site: str, way: str) -> None:
    test = self_test(site)
    runner = ways_of(site)[way]()(test.bridge, test.sites)
    assert not test.judge(runner)[site].passed


@pytest.mark.parametrize(
    ("site", "to"), [("q", "rot_q"), ("k", "rot_k"), ("rot_q", "q"), ("rot_k", "k")]
)
def test_a_patch_on_the_wrong_side_of_rotary_is_caught(site: str, to: str) -> None:
    test = self_test(site, "custom")  # a source's values may stand on either side
    runner = moved(site, to)(test.bridge, test.sites)
    assert not test.judge(runner)[site].passed
