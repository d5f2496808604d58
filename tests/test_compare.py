"""The comparison of estimates with exact effects: every number on data where it is known."""

from __future__ import annotations

import json
import math

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
from attribution_setup import pairs_of
from patchsweep.errors import StoreError
from patchsweep.results.compare import compare, verdict
from patchsweep.results.render import as_dict, render
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.screen_settings import Screen
from rich.console import Console
from scipy import stats
from subjects import demo_pairs, model


def _dataset(exact: np.ndarray, **estimates: np.ndarray) -> xr.Dataset:
    """Effects `[pair, layer, pos]` at resid_pre over a base metric of 2."""
    dims = ("metric", "pair", "layer", "pos")
    n_pairs, n_layers, n_pos = exact.shape
    arrays = {"resid_pre": (dims, exact[None] + 2.0)}
    arrays |= {f"resid_pre_{name}": (dims, values[None]) for name, values in estimates.items()}
    return xr.Dataset(
        {
            **arrays,
            "base_metric": (("metric", "pair"), np.full((1, n_pairs), 2.0)),
            "source_metric": (("metric", "pair"), np.full((1, n_pairs), 5.0)),
        },
        coords={
            "metric": ["logit_diff"],
            "pair": np.arange(n_pairs),
            "layer": np.arange(n_layers),
            "pos": np.arange(n_pos),
            "base_token": (("pair", "pos"), [[f" t{i}" for i in range(n_pos)]] * n_pairs),
        },
        attrs={
            "plan": {"resid_pre": {"token_layers": 1000}},
            "attribution": {"atp": {"token_layers": 10}},
        },
    )


def _draw(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(6, 5, 8))
    return exact, 0.5 * exact + 0.2 * rng.normal(size=exact.shape)


def test_measures_equal_scipy_on_the_means() -> None:
    exact, estimate = _draw()
    found = compare(_dataset(exact, atp=estimate)).of("resid_pre", "atp")
    x, y = exact.mean(0).ravel(), estimate.mean(0).ravel()
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.kendall.value == pytest.approx(stats.kendalltau(x, y).statistic)
    assert found.slope.value == pytest.approx((x @ y) / (x @ x))
    assert found.sign_agreement.value == pytest.approx((np.sign(x) == np.sign(y)).mean())
    assert found.n_cells == 40
    assert found.pearson_of_pairs == pytest.approx(
        stats.pearsonr(exact.ravel(), estimate.ravel()).statistic
    )
    assert found.cost_ratio == 100.0


def test_recall_and_precision_count_the_largest() -> None:
    exact = np.zeros((1, 5, 10))
    exact[0].flat[:50] = np.arange(50, 0, -1)  # sizes 50..1
    estimate = exact.copy()
    estimate[0].flat[0] = 0.5  # the largest is missed altogether
    estimate[0].flat[1] = 38.5  # another slips to the 12th place
    found = compare(_dataset(exact, atp=estimate), top_k=10).of("resid_pre", "atp")
    assert found.top_k == 10
    assert found.recall.value == 0.9
    assert found.precision.value == 0.8


def test_dead_cells_do_not_count_and_missing_ones_are_told() -> None:
    exact, estimate = _draw()
    exact[:, 0], estimate[:, 0] = 0, 0
    exact[:, 1] = np.nan
    found = compare(_dataset(exact, atp=estimate)).of("resid_pre", "atp")
    assert found.n_cells == 3 * 8
    assert found.n_exact_missing == 8


def test_largest_miss_has_its_name() -> None:
    exact, estimate = _draw()
    estimate[:, 3, 6] += 50
    miss = compare(_dataset(exact, atp=estimate)).of("resid_pre", "atp").misses[0]
    assert (miss.layer, miss.pos, miss.head, miss.token) == (3, 6, None, " t6")
    assert miss.place == "L3 @6 ␣t6"
    assert miss.estimate - miss.exact > 40


def test_interval_holds_the_value_and_needs_pairs() -> None:
    exact, estimate = _draw()
    found = compare(_dataset(exact, atp=estimate)).of("resid_pre", "atp")
    for measure in (found.pearson, found.slope, found.sign_agreement):
        assert measure.low <= measure.value <= measure.high
        assert measure.low < measure.high
    alone = compare(_dataset(exact[:1], atp=estimate[:1])).of("resid_pre", "atp")
    assert math.isnan(alone.pearson.low)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # the slope of y on x is 0.5 in truth; the cells share one size in all pairs
    hits = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        signal = rng.normal(size=(1, 4, 6))
        exact = np.repeat(signal, 24, axis=0)
        estimate = 0.5 * exact + 0.3 * rng.normal(size=exact.shape)
        slope = compare(_dataset(exact, atp=estimate), n_resamples=100).of("resid_pre", "atp").slope
        hits += slope.low <= 0.5 <= slope.high
    assert hits >= 48  # 95 % of 60 is 57; a percentile interval of 24 pairs covers a little less


def test_calibration_bins_hold_every_cell() -> None:
    exact, estimate = _draw()
    found = compare(_dataset(exact, atp=estimate)).of("resid_pre", "atp")
    assert sum(b.n_cells for b in found.calibration) == found.n_cells
    assert found.calibration[-1].estimate < found.calibration[-1].exact  # half as large


@pytest.mark.parametrize(
    ("pearson", "slope", "kind"),
    [
        (0.96, 1.0, "good"),
        (0.96, 0.25, "screen"),
        (0.85, 1.0, "screen"),
        (0.5, 1.0, "poor"),
        (math.nan, math.nan, "unknown"),
    ],
)
def test_verdict_follows_its_thresholds(pearson: float, slope: float, kind: str) -> None:
    assert verdict(100, pearson, slope)[0] == kind
    assert verdict(19, pearson, slope)[0] == "unknown"


def test_unsigned_estimates_meet_sizes() -> None:
    exact, _ = _draw()
    found = compare(_dataset(exact, atp_star_drop=np.abs(exact))).of("resid_pre", "atp_star_drop")
    assert found.pearson.value == pytest.approx(1.0)


def test_store_without_both_is_refused() -> None:
    exact, _ = _draw()
    with pytest.raises(StoreError, match=r"method=\[exact,atp\]"):
        compare(_dataset(exact))


def test_a_stored_run_is_compared_site_by_site_and_over_all(tmp_path) -> None:
    name = "tiny:llama"
    store = tmp_path / "run.zarr"
    ps.sweep(
        model(name),
        pairs_of(name, 3),
        ["resid_pre", "z"],
        ["logit_diff", "log_prob"],
        method=["exact", "atp", "relp"],
        store=store,
    )
    found = compare(store, n_resamples=20)
    assert {(a.metric, a.site, a.method) for a in found.sites} == {
        (metric, site, method)
        for metric in ("logit_diff", "log_prob")
        for site in ("resid_pre", "z")
        for method in ("atp", "relp")
    }
    assert len(found.overall) == 4
    everything = found.of("all sites", "atp")
    assert everything.n_cells == found.of("resid_pre", "atp").n_cells + found.of("z", "atp").n_cells
    text = json.dumps(as_dict(found), allow_nan=False)
    assert "Verdicts" in text
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(found))
    shown = console.export_text()
    for word in ("resid_pre", "relp", "Largest misses", "all sites"):
        assert word in shown


def test_a_screened_run_compares_what_was_run() -> None:
    name = "tiny:llama"
    ds = ps.sweep(model(name), pairs_of(name, 2), ["z"], method=Screen(k=20, subsets=8))
    found = compare(ds).of("z", "atp")
    assert found.n_cells == 20
    assert found.n_exact_missing > 0


def test_random_exact_sample_holds_what_the_whole_sweep_holds() -> None:
    from patchsweep.sweeps.sample import sample_exact

    name = "tiny:llama"
    whole = ps.sweep(model(name), demo_pairs(name), "z")
    sample = sample_exact(model(name), demo_pairs(name), "z", n=20, seed=1)
    ran = ~np.isnan(sample["z"].values)
    plan = attributes(whole)["plan"]["z"]
    assert ran.sum() == plan["n_dead"] + 20
    np.testing.assert_allclose(sample["z"].values[ran], whole["z"].values[ran], atol=1e-5)
    estimates = ps.sweep(model(name), demo_pairs(name), "z", method="atp")
    found = compare(estimates.merge(sample, compat="override"))
    assert found.sites[0].site == "z"
