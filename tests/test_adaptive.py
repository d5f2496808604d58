"""Adaptive sweeps: both ends, what lies between, stores, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ConfigError, StoreError
from patchsweep.models import TINY_FAMILIES
from patchsweep.results.tolerance import allowed_error, tolerance_notes
from patchsweep.runners.packed import adaptive_runner
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.store.store import Store
from patchsweep.sweeps import calibration
from patchsweep.sweeps import saving as saving_module
from patchsweep.sweeps.adaptive import Adaptive
from patchsweep.sweeps.calibration import Calibration
from store_checks import checksums
from subjects import CLEAN, CORRUPTED, demo_pairs, model, quick, reference_pairs

SWEPT = (
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "z",
    "q",
    "k",
    "v",
    "pattern",
)
EXACTLY, LINEARLY = (0.0, 0.0), (np.inf, np.inf)


def sites_of(family: str) -> list[str]:
    hooks = model(f"tiny:{family}").hook_dict
    names = [n for n in SWEPT if SITES[n].hook_name(0) in hooks or SITES[n].in_attention]
    return [*names, "embed"]


def prepared(name: str, sites: Any, **selection: Any) -> tuple[Adaptive, Any, list[PatchSet]]:
    pairs = selection.pop("pairs", None) or demo_pairs(name)
    request = make_request(model(name), pairs, SweepSpec(sites, tolerance=1.0, **selection))
    runner = PackedRunner(request.bridge, request.sites, max_tokens=selection.pop("most", 256))
    one = Adaptive(request, RunnerChoice(runner, "asked for", None))
    (captured,) = one.captures.of(range(len(pairs)))
    return one, captured, [PatchSet(plan, plan.live_patches()) for plan in request.plans]


def at(one: Adaptive, captured: Any, sets: list[PatchSet], level: tuple[float, float]) -> list[Any]:
    return one.run(captured, sets, [level] * len(sets))


@pytest.mark.parametrize("family", TINY_FAMILIES)
@pytest.mark.parametrize("direction", quick(["denoising", "noising"], "denoising"))
def test_both_ends_and_what_lies_between(family: str, direction: str) -> None:
    one, captured, sets = prepared(
        f"tiny:{family}", sites_of(family), metrics=["logit_diff", "log_prob"], direction=direction
    )
    exact = one.exact(captured, sets)
    effects = np.concatenate(exact, axis=1) - captured.base
    assert np.abs(effects).max() > 0.3, "effects of order one, or the test shows nothing"

    for chosen, values, (found, linear, tokens) in zip(
        sets, exact, at(one, captured, sets, EXACTLY), strict=True
    ):
        np.testing.assert_allclose(
            found, values, atol=1e-5, rtol=1e-5, err_msg=chosen.plan.site.name
        )
        assert np.abs(linear).max() < 1e-5
        entry = chosen.plan.entry[chosen.patches]
        assert (tokens[entry == chosen.plan.n_layers] == 0).all()
        assert (tokens[entry < chosen.plan.n_layers] > 0).mean() > 0.5, "few values are equal"

    for chosen, (found, linear, tokens) in zip(
        sets, at(one, captured, sets, LINEARLY), strict=True
    ):
        estimate = one.estimates(captured, chosen)
        np.testing.assert_array_equal(linear, estimate)
        np.testing.assert_allclose(found, captured.base + estimate, rtol=1e-6)
        assert (tokens == 0).all()

    errors, costs = [], []
    for level in ((0.3, 0.3), (0.03, 0.03), (0.003, 0.003), (3e-4, 3e-4)):
        results = at(one, captured, sets, level)
        errors.append(max(np.abs(r[0] - e).max() for r, e in zip(results, exact, strict=True)))
        costs.append(sum(int(r[2].sum()) for r in results))
    assert costs == sorted(costs)
    assert errors[-1] <= max(2e-5, errors[0] / 10), errors


def test_atp_is_the_other_end() -> None:
    one, captured, sets = prepared("tiny:llama", ["z", "resid_pre", "mlp_out"])
    estimates = ps.sweep(
        model("tiny:llama"), demo_pairs("tiny:llama"), one.request.spec.sites, method="atp"
    )
    for chosen in sets:
        name = chosen.plan.site.name
        cells = estimates[f"{name}_atp"].values[0].ravel()[chosen.plan.cell[chosen.patches]]
        ((found, *_),) = at(one, captured, [chosen], LINEARLY)
        np.testing.assert_allclose(found[0], captured.base[0] + cells, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("intervention", ["zero", 0.5])
def test_other_interventions_and_spans(intervention: Any) -> None:
    one, captured, sets = prepared(
        "tiny:gemma2",
        ["z", "mlp_out"],
        intervention=intervention,
        heads=[(0, 1), 2],
        positions="all",
    )
    exact = one.exact(captured, sets)
    for values, (found, *_) in zip(exact, at(one, captured, sets, EXACTLY), strict=True):
        np.testing.assert_allclose(found, values, atol=1e-5, rtol=1e-5)


def test_small_batches_and_divided_ones_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    one, captured, sets = prepared("tiny:llama", ["z", "resid_pre", "k"])
    wanted = at(one, captured, sets, (1e-3, 1e-3))
    one.packed.max_tokens = 7
    monkeypatch.setattr(adaptive_runner, "_ROOM", 1)
    for a, b in zip(at(one, captured, sets, (1e-3, 1e-3)), wanted, strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-5)


def several_answers(name: str) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        model(name),
        clean=[CLEAN],
        corrupted=[CORRUPTED],
        answers=[(" Mary and John went", " John and Mary went")],
        multi_token=True,
    )


@pytest.mark.parametrize(
    ("pairs", "selection"),
    [(reference_pairs, {}), (reference_pairs, {"read": -3}), (several_answers, {})],
    ids=["four pairs", "an earlier read", "answers of several tokens"],
)
def test_several_pairs_and_reads(pairs: Any, selection: dict[str, Any]) -> None:
    name = "tiny:qwen3"
    one, captured, sets = prepared(name, ["z", "resid_pre"], pairs=pairs(name), **selection)
    exact = one.exact(captured, sets)
    for level in (EXACTLY, (1e-4, 1e-4)):
        for values, (found, *_) in zip(exact, at(one, captured, sets, level), strict=True):
            np.testing.assert_allclose(found, values, atol=1e-4, rtol=1e-5)


def test_a_sweep_keeps_its_tolerance_and_says_so() -> None:
    arguments = (model("tiny:llama"), demo_pairs("tiny:llama"), ["z", "resid_pre"])
    exact = ps.sweep(*arguments)
    within = ps.sweep(*arguments, tolerance=0.01)
    recorded = attributes(within)["adaptive"]
    for name in ("z", "resid_pre"):
        assert np.abs(within[name] - exact[name]).max() <= 0.01
        site = recorded["sites"][name]
        assert 0 < site["sample_token_layers"] < 1
        assert max(site["largest_error"].values()) <= 0.0034
        # a value that did not run is the base metric plus its linear part
        idle = within[f"{name}_token_layers"] == 0
        np.testing.assert_allclose(
            (within[name] - within.base_metric).where(idle).fillna(0),
            within[f"{name}_linear"].where(idle).fillna(0),
            atol=1e-5,
        )
        # values of the sample are the exact ones
        assert np.isin(np.float32(site["values"][0]), within[name].values).all()
    assert len(tolerance_notes(within)) == 2
    assert tolerance_notes(exact) == []
    assert (allowed_error(exact) == 0).all()


def test_a_share_of_the_gap() -> None:
    arguments = (model("tiny:llama"), demo_pairs("tiny:llama"), "z")
    within = ps.sweep(*arguments, tolerance="1%")
    gap = float(abs(within.source_metric - within.base_metric)[0, 0])
    np.testing.assert_allclose(allowed_error(within), 0.01 * gap, rtol=1e-6)
    assert np.abs(within.z - ps.sweep(*arguments).z).max() <= 0.01 * gap


def test_what_cannot_be_met_runs_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (model("tiny:llama"), demo_pairs("tiny:llama"), "resid_pre")
    monkeypatch.setattr(calibration, "MARGIN", -1.0)
    within = ps.sweep(*arguments, tolerance=1e-3)
    np.testing.assert_allclose(within.resid_pre, ps.sweep(*arguments).resid_pre, atol=1e-5)
    assert (within.resid_pre_linear == 0).all()
    assert "exact" in tolerance_notes(within)[0]


def test_slices_resumes_and_one_process_give_the_same_bytes(tmp_path: Path) -> None:
    name = "tiny:llama"
    arguments: Any = (model(name), ps.load_task(model(name), "ioi", 6), ["z", "resid_pre"])
    ps.sweep(*arguments, tolerance=0.01, store=tmp_path / "one.zarr")
    for i in (1, 0):
        ps.sweep(*arguments, tolerance=0.01, store=tmp_path / "two.zarr", slice_index=i, n_slices=2)
    assert checksums(tmp_path / "one.zarr") == checksums(tmp_path / "two.zarr")
    again = ps.sweep(*arguments, tolerance=0.01, store=tmp_path / "two.zarr")
    assert len(tolerance_notes(again)) == 2
    with pytest.raises(StoreError, match="tolerance"):
        ps.sweep(*arguments, tolerance=0.02, store=tmp_path / "two.zarr")
    with pytest.raises(StoreError, match="tolerance"):
        ps.sweep(*arguments, store=tmp_path / "two.zarr")


def test_all_processes_use_the_recorded_thresholds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tiny:llama"
    arguments: Any = (model(name), ps.load_task(model(name), "ioi", 6), "z")
    ps.sweep(*arguments, tolerance=0.01, store=tmp_path / "a.zarr", slice_index=0, n_slices=2)
    recorded = Store.open(tmp_path / "a.zarr").attrs["adaptive"]
    monkeypatch.setattr(Adaptive, "calibrate", lambda self: pytest.fail("decided again"))
    ps.sweep(*arguments, tolerance=0.01, store=tmp_path / "a.zarr", slice_index=1, n_slices=2)
    assert Store.open(tmp_path / "a.zarr").attrs["adaptive"] == recorded


@pytest.mark.parametrize("damage", [{}, {"sites": {}}, {"sites": {"z": {"patches": "x"}}}, 3])
def test_damaged_thresholds_are_refused(damage: Any) -> None:
    request = make_request(
        model("tiny:llama"), demo_pairs("tiny:llama"), SweepSpec("z", tolerance=0.1)
    )
    with pytest.raises(ConfigError, match="new store"):
        Calibration.of_attributes(damage, request)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tolerance": 0}, "positive"),
        ({"tolerance": -0.1}, "positive"),
        ({"tolerance": True}, "positive"),
        ({"tolerance": float("nan")}, "positive"),
        ({"tolerance": "one"}, "positive"),
        ({"tolerance": "x%"}, "positive"),
        ({"metrics": "rank"}, "jumps"),
        ({"metrics": "kl_base"}, "its gradient is zero"),
        ({"method": "atp"}, "method='atp'"),
        ({"precision": "bf16"}, "precision=bf16"),
        ({"runner": "hooked"}, "runner=hooked"),
        ({"layers": [(0, 1)]}, "layers one by one"),
        ({"sites": "pattern_cell"}, "single cells"),
    ],
)
def test_what_is_refused(
    arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a pass ran"))
    with pytest.raises(ConfigError, match=words):
        ps.sweep(bridge, pairs, **{"sites": "z", "tolerance": 0.01} | arguments)


def test_a_plan_estimates_what_the_tolerance_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, sites = model("tiny:llama"), ["z", "resid_pre"]
    pairs = ps.load_task(bridge, "ioi", 6)
    saving = ps.plan(bridge, pairs, sites, tolerance=0.01, sample=True).saving
    within = ps.sweep(bridge, pairs, sites, tolerance=0.01)
    recorded = attributes(within)
    assert saving is not None
    for name in sites:
        assert saving.exact_token_layers[name] == recorded["plan"][name]["token_layers"]
        told = float(np.nansum(within[f"{name}_token_layers"]))
        assert told / 2 < saving.token_layers[name] < 2 * told
    of_samples = sum(site["n"] for site in recorded["adaptive"]["sites"].values())
    assert of_samples < saving.n_patches <= of_samples + 2 * saving_module.N_SPREAD
    assert 0 < saving.share < 1
    assert saving.seconds > 0
    assert ps.plan(bridge, pairs, sites, tolerance=0.01).saving is None

    monkeypatch.setattr(calibration, "MARGIN", -1.0)  # no thresholds are enough
    saving = ps.plan(bridge, pairs, sites, tolerance=0.01, sample=True).saving
    assert saving is not None
    assert saving.share == 1


def test_a_sample_without_a_tolerance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a pass ran"))
    with pytest.raises(ConfigError, match=r"give one, such as tolerance=0\.01"):
        ps.plan(bridge, pairs, "z", sample=True)
    with pytest.raises(ConfigError, match="jumps"):
        ps.plan(bridge, pairs, "z", "rank", tolerance=0.01, sample=True)


def test_experts_hold_their_tolerance() -> None:
    arguments = (model("tiny:mixtral"), demo_pairs("tiny:mixtral"), ["z", "resid_pre", "mlp_out"])
    exact, within = ps.sweep(*arguments), ps.sweep(*arguments, tolerance=0.02)
    for name in arguments[2]:
        assert np.abs(within[name] - exact[name]).max() <= 0.02
