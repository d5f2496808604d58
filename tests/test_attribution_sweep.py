"""Attribution through `sweep`: what lands in the Dataset and in the store."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
from attribution_setup import pairs_of
from patchsweep.attribution import METHODS, Attribution, IntegratedSite, get_methods
from patchsweep.attribution.run import token_layers
from patchsweep.data.pairs import PromptPairs
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, model

NAME = "tiny:llama"


def _mixed_pairs() -> PromptPairs:
    """Pairs of two lengths, in turn."""
    longer = [text.replace("When", "After a long war When") for text in (CLEAN, CORRUPTED)]
    return PromptPairs.from_strings(
        model(NAME),
        clean=[CLEAN, longer[0], CLEAN],
        corrupted=[CORRUPTED, longer[1], CORRUPTED],
        answers=[(" Mary", " John")] * 3,
    )


def test_every_method_has_its_variable_and_dead_cells_are_zero() -> None:
    names = ["atp", "atp_star", "atp_star_drop", "relp", "ig_inputs", "ig"]
    ds = ps.sweep(model(NAME), _mixed_pairs(), ["z", "k"], method=names)
    assert "z" not in ds
    request = make_request(model(NAME), _mixed_pairs(), SweepSpec(["z"]))
    plan = request.plans[0]
    dead = np.zeros(int(np.prod(plan.shape)), bool)
    patches = plan.patches()
    dead[plan.cell[patches[~plan.live[patches]]]] = True
    outside = np.ones_like(dead)
    outside[plan.cell[patches]] = False
    for name in names:
        found = ds[f"z_{name}"]
        assert found.dims == ("metric", "pair", "layer", "pos", "head")
        assert ds[f"k_{name}"].dims[-1] == "kv_head"
        assert found.dtype == np.float32
        values = found.values[0].ravel()
        assert (values[dead] == 0).all()
        assert np.isnan(values[outside]).all()  # beyond the shorter prompts
        assert np.abs(values[~dead & ~outside]).max() > 0
    assert np.isfinite(ds.base_metric.values).all()
    assert ds.attrs["method"] == ", ".join(names)
    # the source run, and forward and backward passes from the first difference on
    shared = [
        next(i for i, (a, b) in enumerate(zip(pair.clean, pair.corrupted, strict=True)) if a != b)
        for pair in _mixed_pairs()
    ]
    assert attributes(ds)["attribution"]["atp"]["token_layers"] == sum(
        3 * (3 * len(pair.clean) - 2 * n) for pair, n in zip(_mixed_pairs(), shared, strict=True)
    )


def test_a_pair_has_the_same_estimates_alone_and_among_others() -> None:
    together = ps.sweep(model(NAME), _mixed_pairs(), ["resid_mid"], method="relp")
    first = PromptPairs(_mixed_pairs().pairs[:1])
    alone = ps.sweep(model(NAME), first, ["resid_mid"], method="relp")
    n = alone.sizes["pos"]
    np.testing.assert_allclose(
        together.resid_mid_relp.values[:, :1, :, -n:], alone.resid_mid_relp.values, atol=1e-5
    )


def test_slices_write_what_one_process_writes(tmp_path) -> None:
    options = {"sites": ["resid_pre", "z"], "method": ["exact", "atp", "atp_star"]}
    whole = ps.sweep(model(NAME), _mixed_pairs(), store=tmp_path / "whole.zarr", **options).load()
    for index in range(2):
        sliced = ps.sweep(
            model(NAME),
            _mixed_pairs(),
            store=tmp_path / "sliced.zarr",
            slice_index=index,
            n_slices=2,
            **options,
        )
    xr.testing.assert_identical(whole, sliced.load())


def test_an_estimated_store_is_taken_up_again(tmp_path) -> None:
    options = {"sites": ["z"], "method": "atp", "store": tmp_path / "run.zarr"}
    first = ps.sweep(model(NAME), _mixed_pairs(), **options).load()
    again = ps.sweep(model(NAME), _mixed_pairs(), **options).load()
    xr.testing.assert_identical(first, again)
    with pytest.raises(ps.PatchsweepError, match="belongs to another run"):
        ps.sweep(model(NAME), _mixed_pairs(), **{**options, "method": "relp"})


def test_estimates_of_a_small_step_are_its_effect() -> None:
    # to first order every method at the base that keeps gradients must agree with exact
    def nudge(site, layer, base, source):
        return base + 1e-3 * (source - base)

    ds = ps.sweep(
        model(NAME),
        pairs_of(NAME, 2),
        ["resid_pre", "z", "q", "k", "v"],
        intervention=nudge,
        direction="denoising",
        method=["exact", "atp", IntegratedSite(1)],
    )
    for site in ("resid_pre", "z", "q", "k", "v"):
        effect = (ds[site] - ds.base_metric).values
        # a thousandth of an effect of order one, against fp32 logits of order ten
        for method in ("atp", "ig"):
            np.testing.assert_allclose(ds[f"{site}_{method}"].values, effect, atol=3e-5, rtol=0.02)


def test_mean_ablation_uses_the_mean_of_the_clean_prompts() -> None:
    pairs = pairs_of(NAME, 4)
    ds = ps.sweep(
        model(NAME),
        pairs,
        ["mlp_out"],
        intervention="mean",
        positions="all",
        method=["exact", IntegratedSite(100)],
    )
    effect = (ds.mlp_out - ds.base_metric).values
    assert np.abs(ds.mlp_out_ig.values - effect).max() < 0.02 * np.abs(effect).max()


def test_half_precision_accumulates_in_fp32() -> None:
    bridge = ps.load_model(NAME, dtype="bfloat16", device="cpu")
    pairs = PromptPairs(pairs_of(NAME, 1).pairs)
    request = make_request(bridge, pairs, SweepSpec(["resid_pre"]))
    methods = get_methods(["atp"])
    found = Attribution(request, methods).run(methods[0], range(1)).cells["resid_pre"]
    full = ps.sweep(model(NAME), pairs, ["resid_pre"], method="atp").resid_pre_atp.values
    assert found.dtype == np.float32
    # bf16 activations through three random layers: a few per cent
    live = np.abs(full) > 0
    assert np.corrcoef(found.ravel()[live.ravel()], full.ravel()[live.ravel()])[0, 1] > 0.95


def test_cost_counts_passes_and_layers() -> None:
    pairs = pairs_of(NAME, 2)
    request = make_request(model(NAME), pairs, SweepSpec(["resid_pre"], layers=[2]))
    tokens = sum(len(pair.clean) for pair in pairs)
    live = tokens - 2 * 10  # the prompts differ from token 10 on
    # source and base, then through the last block alone: a forward and a backward pass per step,
    # and the path's end
    expected = round(3 * (tokens + live * (1 + (1 + 4 * 2) / 3)))
    assert token_layers(request, IntegratedSite(4)) == expected
    drop = METHODS["atp_star_drop"]()
    assert token_layers(request, drop) == 3 * (tokens + live * (1 + 3))
