"""Screening: what it runs, what it writes, and whether its bound holds."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
from attribution_setup import block, pairs_of
from patchsweep.forward.grad import GradientModel
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.store.layout import Unit
from patchsweep.sweeps.api import prepare_runner
from patchsweep.sweeps.screen import ScreenWork
from patchsweep.sweeps.screen_bound import Subsets, draw_members, upper_bound
from patchsweep.sweeps.screen_settings import Screen
from scipy import stats
from scipy.stats import binom
from subjects import demo_pairs, model

NAME = "tiny:llama"


def _effects(ds: xr.Dataset, site: str) -> np.ndarray:
    return (ds[site] - ds.base_metric).transpose(*ds[site].dims).values


def test_exact_cells_are_exact_and_the_rest_is_nan() -> None:
    whole = ps.sweep(model(NAME), pairs_of(NAME, 2), ["z", "resid_pre"], method=["exact", "atp"])
    ds = ps.sweep(model(NAME), pairs_of(NAME, 2), ["z", "resid_pre"], method=Screen(k=6, subsets=0))
    for site in ("z", "resid_pre"):
        found, exact = ds[site].values, whole[site].values
        ran = np.isfinite(found)
        np.testing.assert_allclose(found[ran], exact[ran], atol=1e-5)
        np.testing.assert_allclose(ds[f"{site}_atp"].values, whole[f"{site}_atp"].values, atol=1e-5)
        effects = np.abs(found - ds.base_metric.values[..., *[None] * (found.ndim - 2)])
        changed = (np.nan_to_num(effects) > 0).any(axis=(0, 1))
        assert changed.sum() == 6  # the same six on both pairs
        # they are the six with the largest mean estimate
        size = np.abs(whole[f"{site}_atp"].values[0]).mean(axis=0)
        assert set(np.flatnonzero(changed)) == set(np.argsort(-size, axis=None)[:6])
    assert ds.attrs["method"] == "screen"
    assert "z_bound" not in ds


def test_margin_goes_on_until_the_top_is_safe() -> None:
    options = {"sites": ["z"], "intervention": "zero"}
    few = ps.sweep(model(NAME), pairs_of(NAME, 1), method=Screen(k=5, subsets=0), **options)
    many = ps.sweep(
        model(NAME), pairs_of(NAME, 1), method=Screen(k=5, margin=0.0, subsets=0), **options
    )
    n_few, n_many = (int(np.isfinite(ds.z.values).sum()) for ds in (few, many))
    assert n_many >= n_few
    effects = np.abs(_effects(many, "z")).ravel()
    left = np.abs(many.z_atp.values).ravel()[np.isnan(effects)]
    assert np.sort(effects[np.isfinite(effects)])[-5] >= left.max(initial=0)


def test_screened_store_resumes_to_the_same_numbers(tmp_path) -> None:
    store = tmp_path / "screen.zarr"
    screen = Screen(k=6, subsets=16)
    first = ps.sweep(model(NAME), pairs_of(NAME, 2), ["z"], method=screen, store=store).load()
    again = ps.sweep(model(NAME), pairs_of(NAME, 2), ["z"], method=screen, store=store)
    xr.testing.assert_identical(first, again.load())
    assert first.z_bound.dims == ("metric", "pair")
    assert np.isfinite(first.z_bound.values).all()
    assert "assumption" in attributes(first)["screen"]


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "gemma3", "opt"])
@pytest.mark.parametrize("site", ["resid_pre", "z", "k", "pattern", "mlp_out"])
def test_a_subset_of_one_is_the_exact_patch(family: str, site: str) -> None:
    name = f"tiny:{family}"
    request, batch = block(name, [site])
    plan = request.plans[0]
    runner = prepare_runner(request, "packed", 4096).runner
    live = plan.live_patches()
    chosen = live[np.random.default_rng(0).permutation(len(live))[:8]]
    loaded = runner.load(batch, request.intervention)
    expected = runner.run(loaded, plan, np.sort(chosen), request.metrics).numpy()
    subsets = Subsets(request, GradientModel(request.bridge, [plan.site]), plan, Screen())
    run = subsets.capture(batch)
    start = int(min(plan.start[chosen].min(), batch.reads[0]))
    assert start > 0  # the shared tokens are read, not run again
    found = subsets.patched(batch, 0, np.sort(chosen), np.eye(8, dtype=bool), run, start)
    assert np.abs(found - expected).max() < 1e-4  # logits of order 10 in fp32


def test_a_joint_patch_of_all_positions_is_the_layer_patch() -> None:
    request, batch = block(NAME, ["resid_pre"])
    plan = request.plans[0]
    together = ps.sweep(model(NAME), pairs_of(NAME, 1), ["resid_pre"], positions="all")
    subsets = Subsets(request, GradientModel(request.bridge, [plan.site]), plan, Screen())
    run = subsets.capture(batch)
    live = plan.live_patches(layers=range(1, 2))
    start = int(plan.start[live].min())
    found = subsets.patched(batch, 0, live, np.ones((1, len(live)), bool), run, start)
    assert float(found[0, 0]) == pytest.approx(float(together.resid_pre[0, 0, 1]), abs=1e-4)


def test_every_patch_is_in_the_same_number_of_subsets() -> None:
    member = draw_members(np.random.default_rng(0), 40, 300, 0.25)
    assert (member.sum(axis=0) == 10).all()
    assert abs(member.mean(axis=1).std()) < 0.1


def test_upper_bound_equals_welchs_test() -> None:
    rng = np.random.default_rng(0)
    member = draw_members(rng, 32, 5, 0.25)
    metric = rng.normal(size=32) + member @ np.array([3.0, 0, 0, -1.0, 0])
    bound = upper_bound(metric, member, 0.05)
    p_values = []
    for column in member.T:
        inside, outside = metric[column], metric[~column]
        effect = abs(inside.mean() - outside.mean())
        # H0: |effect| >= bound
        shift = np.sign(inside.mean() - outside.mean()) * bound
        test = stats.ttest_ind(inside, outside + shift, equal_var=False)
        p_values.append(stats.t.cdf(-abs(test.statistic) * np.sign(bound - effect), test.df))
    assert max(p_values) == pytest.approx(0.05, abs=1e-6)


def test_bound_of_an_additive_metric_holds_as_often_as_it_says() -> None:
    # additive: the assumption holds, so the level must too
    violated = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        effects = 0.2 * rng.normal(size=30)
        effects[0] = 1.0
        member = draw_members(rng, 64, 30, 0.25)
        violated += upper_bound(member @ effects, member, 0.05) < 1.0
    assert violated <= binom.ppf(0.99, 400, 0.05)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bound_is_violated_no_more_often_than_its_level(family: str) -> None:
    name = f"tiny:{family}"
    options = {"sites": ["z"]}
    whole = ps.sweep(model(name), pairs_of(name, 1), **options)
    effects = np.abs(_effects(whole, "z")).ravel()
    violated = 0
    for seed in range(50):
        ds = ps.sweep(
            model(name),
            pairs_of(name, 1),
            runner="packed",
            method=Screen(k=8, seed=seed),
            **options,
        )
        left = effects[np.isnan(ds.z.values.ravel())]
        violated += left.max() > float(ds.z_bound[0, 0])
    assert violated <= 0.05 * 50


@pytest.mark.slow
def test_screen_finds_the_top_of_the_z_sweep_of_smollm2(smollm2) -> None:
    pairs = demo_pairs("smollm2-135m")
    exact = ps.sweep(smollm2, pairs, ["z"])
    effects = np.abs(_effects(exact, "z")).ravel()
    top = set(np.argsort(-effects)[:20].tolist())
    screen = Screen(by="atp", k=60, subsets=32, inclusion=0.1)
    ds = ps.sweep(smollm2, pairs, ["z"], method=screen, runner="packed")
    ran = np.nan_to_num(np.abs(_effects(ds, "z")).ravel())
    assert len(top & set(np.argsort(-ran)[:20].tolist())) >= 19
    request = make_request(smollm2, pairs, SweepSpec(["z"]))
    plan = request.plans[0]
    finite = np.isfinite(ds.z.values).ravel()
    live = plan.live_patches()
    cost = int(plan.cost[live[finite[plan.cell[live]]]].sum())
    work = ScreenWork(request, prepare_runner(request, "packed", None), screen)
    cost += work.cost(Unit("z_bound", 0, 0, range(1), range(1)))
    assert cost <= 0.1 * plan.token_layers  # patches and subsets together
    left = effects[~finite]
    assert left.max() <= float(ds["z_bound"][0, 0])


def test_a_screen_that_was_stopped_runs_the_missing_patches_alone(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"sites": ["z"], "method": Screen(k=40, subsets=8), "runner": "packed"}
    pairs = pairs_of(NAME, 3)
    monkeypatch.setattr("patchsweep.spec.shards.UNIT_TOKENS", 40)  # several units
    whole = ps.sweep(model(NAME), pairs, **options, store=tmp_path / "whole.zarr").load()
    asked: list[int] = []
    run = PackedRunner.run

    def counted(self, loaded, plan, patches, metrics):
        asked.append(len(patches))
        return run(self, loaded, plan, patches, metrics)

    class Stop:
        """Ends the run after its first unit of exact patches."""

        def begin(self, n_units: int, total: int, done: int) -> None: ...

        def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
            if unit.variable == "z":
                raise KeyboardInterrupt

        def item_done(self) -> None: ...

        def waiting(self, n_units: int, holders: object) -> None: ...

    monkeypatch.setattr(PackedRunner, "run", counted)
    cut = tmp_path / "cut.zarr"
    with pytest.raises(KeyboardInterrupt):
        ps.sweep(model(NAME), pairs, **options, store=cut, progress=Stop())
    before = sum(asked)
    assert before > 0
    ps.sweep(model(NAME), pairs, **options, store=cut)
    assert sum(asked) == int(np.isfinite(whole.z.values).sum() - _dead(whole))
    found = xr.open_zarr(cut, consolidated=False).load()
    np.testing.assert_array_equal(found.z.values, whole.z.values)


def _dead(ds: xr.Dataset) -> int:
    """Cells of z known without running."""
    return int(attributes(ds)["plan"]["z"]["n_dead"])
