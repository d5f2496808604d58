"""Effects, fractions and statistics computed from a sweep's Dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from patchsweep.errors import MetricError, PlanError, SiteError, StoreError
from patchsweep.results import accessor as summary
from patchsweep.results import resampling
from report_data import synthetic, write
from transformer_lens.utilities.statistics import bootstrap_ci, sign_flip_permutation_pvalue


def tiny(values: object, base: object, source: object, *, site: str = "resid_pre") -> xr.Dataset:
    """One metric; `values` [pair, layer], `base` and `source` [pair]."""
    array = np.asarray(values, dtype=np.float32)[None]
    return xr.Dataset(
        {
            site: (["metric", "pair", "layer"], array),
            "base_metric": (["metric", "pair"], np.asarray(base, dtype=np.float32)[None]),
            "source_metric": (["metric", "pair"], np.asarray(source, dtype=np.float32)[None]),
        },
        coords={
            "metric": np.array(["logit_diff"], dtype=object),
            "pair": np.arange(array.shape[1]),
            "layer": np.arange(array.shape[2]),
        },
    )


def test_effect_and_recovered_are_value_minus_base_and_its_share_of_the_gap() -> None:
    ds = tiny([[1.0, -1.0, 5.0]], base=[1.0], source=[3.0])
    np.testing.assert_array_equal(summary.effect(ds, "resid_pre").values, [[[0, -2, 4]]])
    np.testing.assert_array_equal(summary.recovered(ds, "resid_pre").values, [[[0, -1, 2]]])


def test_recovered_mean_is_a_ratio_of_means() -> None:
    # fractions 0.5 and 4 average to 2.25; sums of effects over sums of gaps give (2 + 0.4) / 4.1
    ds = tiny([[2.0], [0.4]], base=[0.0, 0.0], source=[4.0, 0.1])
    assert summary.recovered_mean(ds, "resid_pre").item() == pytest.approx(2.4 / 4.1, abs=1e-6)


def test_a_pair_that_has_not_run_leaves_both_sums() -> None:
    ds = tiny([[2.0, np.nan, np.nan], [np.nan, 1.0, np.nan]], base=[0.0, 0.0], source=[4.0, 10.0])
    found = summary.recovered_mean(ds, "resid_pre").values[0]
    np.testing.assert_allclose(found, [0.5, 0.1, np.nan], rtol=1e-6)
    np.testing.assert_allclose(summary.effect_mean(ds, "resid_pre").values[0], [2, 1, np.nan])


def test_no_gap_gives_nan_not_infinity() -> None:
    ds = tiny([[2.0]], base=[1.0], source=[1.0])
    assert np.isnan(summary.recovered(ds, "resid_pre").item())
    assert np.isnan(summary.recovered_mean(ds, "resid_pre").item())


def test_small_gaps_are_flagged_against_the_median() -> None:
    gaps = np.array([1.0, -1.2, 0.09, 0.11, 0.0, np.nan, 0.9, 1.1, 1.0])
    ds = tiny(np.zeros((9, 1)), base=np.zeros(9), source=gaps)
    flags = summary.small_gaps(ds).values[0]
    assert np.flatnonzero(flags).tolist() == [2, 4, 5]
    assert not summary.small_gaps(ds, threshold=0.05).values[0][2]


def test_the_only_pair_is_flagged_only_without_a_gap() -> None:
    flags = [
        bool(summary.small_gaps(tiny([[0.0]], base=[0.0], source=[gap])).item())
        for gap in (0.01, 0.0)
    ]
    assert flags == [False, True]


def test_estimates_are_told_from_sites_by_name() -> None:
    ds = synthetic(n_layers=2, methods=["atp", "atp_star"])
    ds = ds.rename(resid_pre="made_up", resid_pre_atp="made_up_atp").drop_vars("resid_pre_atp_star")
    assert summary.estimates(ds) == {
        "attn_out_atp": ("attn_out", "atp"),
        "attn_out_atp_star": ("attn_out", "atp_star"),
        "made_up_atp": ("made_up", "atp"),
        "mlp_out_atp": ("mlp_out", "atp"),
        "mlp_out_atp_star": ("mlp_out", "atp_star"),
        "z_atp": ("z", "atp"),
        "z_atp_star": ("z", "atp_star"),
    }
    assert summary.sites(ds) == ("attn_out", "mlp_out", "z", "made_up")


def test_variables_with_other_axes_are_no_sites() -> None:
    ds = synthetic(n_layers=2, sites=["resid_pre"])
    ds["noise_floor"] = ds["base_metric"] * 0
    ds["done"] = ("unit", np.ones(4, dtype=bool))
    ds["edges"] = (["metric", "pair", "layer", "src"], np.zeros((1, 1, 2, 3)))
    assert summary.sites(ds) == ("resid_pre",)


def test_sites_come_in_the_same_order_from_any_folder(tmp_path: Path) -> None:
    ds = synthetic(n_layers=2)
    write(ds, tmp_path / "run.zarr")
    stored = xr.open_zarr(tmp_path / "run.zarr", consolidated=False)
    assert summary.sites(stored) == summary.sites(ds) == ("resid_pre", "attn_out", "mlp_out", "z")


def test_an_estimate_is_an_effect_already() -> None:
    ds = synthetic(n_layers=3, n_pairs=2, sites=["z"], methods=["atp"])
    np.testing.assert_array_equal(summary.effect(ds, "z_atp").values, ds["z_atp"].values)
    lifted = summary.value(ds, "z_atp") - ds["base_metric"]
    # one fp32 addition and subtraction at size 3
    np.testing.assert_allclose(lifted.values, ds["z_atp"].transpose(*lifted.dims).values, atol=1e-6)


@pytest.mark.parametrize(
    ("site", "positions", "dims"),
    [
        ("resid_pre", True, ("layer", "pos")),
        ("resid_pre", False, ("layer",)),
        ("z", True, ("layer", "pos", "head")),
        ("k", False, ("layer", "kv_head")),
        ("mlp_post", True, ("layer", "pos", "neuron")),
    ],
)
def test_every_layout_keeps_its_dims(site: str, positions: bool, dims: tuple[str, ...]) -> None:
    ds = synthetic(n_pairs=3, n_layers=4, sites=[site], positions=positions)
    for function in (summary.effect, summary.recovered):
        assert function(ds, site).dims == ("metric", "pair", *dims)
    for function in (summary.effect_mean, summary.recovered_mean, summary.p_value):
        assert function(ds, site).dims == ("metric", *dims)
    assert summary.interval(ds, site).dims == ("bound", "metric", *dims)
    top = summary.largest(ds, site, n=3)
    assert len(top) == 3
    for e in top:
        assert (e.pos is None) == ("pos" not in dims)
        assert (e.head is None) == (dims[-1] in ("layer", "pos"))


def test_the_embedding_has_no_layer() -> None:
    ds = synthetic(sites=["resid_pre"])
    ds["embed"] = ds["resid_pre"].isel(layer=0, drop=True)
    assert summary.sites(ds) == ("embed", "resid_pre")
    (top,) = summary.largest(ds, "embed", n=1)
    assert (top.layer, top.pos, top.token) == (None, 11, " Mary")


def test_largest_ranks_by_size_and_leaves_out_zeros_and_cells_not_run() -> None:
    ds = tiny([[1.0, np.nan, -4.0, 2.0, 1.0]], base=[1.0], source=[2.0])
    top = summary.largest(ds, "resid_pre")
    assert [(e.layer, e.effect, e.value, e.recovered) for e in top] == [
        (2, -5.0, -4.0, -5.0),
        (3, 1.0, 2.0, 1.0),
    ]
    assert summary.largest(ds, "resid_pre", n=1) == top[:1]


def test_largest_names_a_token_only_where_the_pairs_agree() -> None:
    ds = synthetic(n_pairs=2)
    mean = {e.pos: e.token for e in summary.largest(ds, "resid_pre", n=60)}
    assert mean[11] is None
    assert mean[16] == " to"
    one = {e.pos: e.token for e in summary.largest(ds, "resid_pre", n=60, pair=1)}
    assert one[11] == " Anna"


def test_largest_of_one_pair_is_that_pair_alone() -> None:
    ds = synthetic(n_pairs=3, sites=["z"], metrics=["logit_diff", "prob"])
    (top,) = summary.largest(ds, "z", "prob", 1, pair=2)
    alone = summary.largest(ds.isel(pair=[2]), "z", "prob", 1)[0]
    assert (top.layer, top.pos, top.head, top.effect) == (
        alone.layer, alone.pos, alone.head, alone.effect
    )  # fmt: skip
    cell = ds["z"].sel(metric="prob", pair=2, layer=top.layer, pos=top.pos, head=top.head)
    assert top.value == pytest.approx(cell.item())
    assert top.pair == 2


def test_labels_are_coordinates_not_indices() -> None:
    ds = synthetic(sites=["z"]).isel(layer=[20, 28], pos=[11, 16], head=[8, 6])
    (top,) = summary.largest(ds, "z", n=1)
    assert (top.layer, top.pos, top.head, top.token) == (28, 16, 8, " to")


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    ds = synthetic(n_layers=2, n_pairs=2)
    with pytest.raises(SiteError, match=r"site='zz' is not in the store; it has resid_pre, attn"):
        summary.effect(ds, "zz")
    with pytest.raises(MetricError, match="metric='kl' is not in the store; it has logit_diff"):
        summary.largest(ds, "z", "kl")
    with pytest.raises(PlanError, match=r"pair=7 is not in the store; it has \[0, 1\]"):
        summary.largest(ds, "z", pair=7)
    with pytest.raises(StoreError, match="no 'base_metric'"):
        summary.effect(ds.drop_vars("base_metric"), "z")


def test_interval_and_p_value_equal_transformer_lens_on_the_pairs_that_ran() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 4)).astype(np.float32)
    values[4:, 1] = np.nan  # ran in four pairs
    values[1:, 2] = np.nan  # ran in one: no interval
    ds = tiny(values, base=np.zeros(6), source=np.ones(6))
    bounds = summary.interval(ds, "resid_pre").values[:, 0]
    p = summary.p_value(ds, "resid_pre").values[0]
    for cell, n in ((0, 6), (1, 4), (3, 6)):
        ran = torch.from_numpy(values[:n, cell]).double()
        low, high = bootstrap_ci(ran)
        np.testing.assert_allclose(bounds[:, cell], [low, high], rtol=1e-6)
        assert p[cell] == pytest.approx(sign_flip_permutation_pvalue(ran).item())
    assert np.isnan(bounds[:, 2]).all()
    assert np.isnan(p[2])


def test_drawn_sign_flips_are_those_of_transformer_lens() -> None:
    effects = np.random.default_rng(2).normal(0.2, 1.0, size=(20, 30))
    wanted = sign_flip_permutation_pvalue(torch.from_numpy(effects), dim=0, n_permutations=700)
    found = resampling.sign_flip(effects, n_permutations=700)
    np.testing.assert_allclose(found, wanted)
    assert np.ptp(found) > 0.1


def test_means_over_pairs_have_a_q_value_and_single_pairs_have_none() -> None:
    values = np.array([[3.0, 0.1, 0.0], [3.1, -0.1, 0.0], [2.9, 0.1, 0.0], [3.0, 0.1, 0.0]])
    ds = tiny(values, base=np.zeros(4), source=np.ones(4))
    p = summary.p_value(ds, "resid_pre").values[0]
    found = summary.largest(ds, "resid_pre")
    assert [e.q for e in found] == pytest.approx([2 * p[0], max(p[1], 2 * p[0])])
    assert summary.largest(ds, "resid_pre", pair=0)[0].q is None
    assert "<th>q</th>" in found._repr_html_().replace(' class="n"', "")


def test_a_placebo_ends_the_list_at_its_control_level() -> None:
    ds = tiny([[3.0, 0.1, 1.0], [3.0, 0.1, 1.0]], base=np.zeros(2), source=np.ones(2))
    placebo = tiny([[0.5, 0.2, 0.0], [0.5, 0.2, 0.0]], base=np.zeros(2), source=np.ones(2))
    found = summary.largest(ds, "resid_pre", placebo=placebo)
    assert [e.effect for e in found] == [3.0, 1.0]
    assert found[0].control == pytest.approx(np.quantile([0.5, 0.2], 0.95))
    with pytest.raises(PlanError, match="leave pair out"):
        summary.largest(ds, "resid_pre", pair=0, placebo=placebo)


def test_p_value_of_three_pairs_that_agree_is_a_quarter() -> None:
    # two of the eight sign patterns are as extreme
    ds = tiny([[1.0], [2.0], [3.0]], base=np.zeros(3), source=np.ones(3))
    assert summary.p_value(ds, "resid_pre").item() == pytest.approx(0.25)


def test_blocks_of_cells_do_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    effects = np.random.default_rng(1).normal(size=(5, 63))
    whole = summary.bootstrap(effects), summary.sign_flip(effects)
    monkeypatch.setattr(resampling, "_FLOATS_PER_BLOCK", 5 * 256 * 7)
    parts = summary.bootstrap(effects), summary.sign_flip(effects)
    np.testing.assert_array_equal(whole[0], parts[0])
    np.testing.assert_array_equal(whole[1], parts[1])


def test_missing_counts_only_positions_that_the_prompts_have() -> None:
    ds = synthetic(lengths=[17, 14], n_layers=4, sites=["resid_pre", "z"])
    assert summary.missing(ds, "resid_pre") == (0, 4 * 31)
    ds["resid_pre"][0, 1, 2] = np.nan
    assert summary.missing(ds, "resid_pre") == (14, 4 * 31)
    assert summary.missing(ds, "z") == (0, 4 * 31 * 9)
    whole = synthetic(lengths=[17, 14], n_layers=4, sites=["z"], positions=False)
    assert summary.missing(whole, "z") == (0, 2 * 4 * 9)


def test_accessor_gives_what_the_functions_give() -> None:
    ds = synthetic(n_pairs=2, n_layers=3)
    xr.testing.assert_identical(ds.patchsweep.effect("z"), summary.effect(ds, "z"))
    xr.testing.assert_identical(ds.patchsweep.recovered("z"), summary.recovered(ds, "z"))
    assert ds.patchsweep.largest("z", n=4) == summary.largest(ds, "z", n=4)
