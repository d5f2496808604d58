"""False discoveries: Benjamini-Hochberg against scipy, and placebos that are what they say."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import PatchsweepError, StoreError
from patchsweep.results.accessor import control_level, q_value
from patchsweep.results.resampling import benjamini_hochberg
from patchsweep.spec.placebo import norm_matched_noise
from patchsweep.spec.sites import SITES
from scipy.stats import false_discovery_control
from subjects import model
from test_stability import pairs


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 40)])
def test_adjusted_values_equal_scipys(shape: tuple[int, ...]) -> None:
    p = np.random.default_rng(0).random(shape) ** 3
    wanted = false_discovery_control(p.ravel(), method="bh").reshape(shape)
    np.testing.assert_allclose(benjamini_hochberg(p), wanted)


def test_cells_without_a_value_do_not_count() -> None:
    p = np.array([0.01, np.nan, 0.02, 0.9])
    found = benjamini_hochberg(p)
    assert np.isnan(found[1])
    np.testing.assert_allclose(found[[0, 2, 3]], false_discovery_control(p[[0, 2, 3]]))


def test_q_values_test_live_cells_alone() -> None:
    ds = ps.sweep(model("tiny:gpt2"), pairs(6), ["resid_pre"], direction="noising")
    q, p = q_value(ds, "resid_pre"), ps.summary.p_value(ds, "resid_pre")
    effects = ps.summary.effect(ds, "resid_pre")
    dead = (effects == 0).all("pair").values
    assert dead.any()
    assert (q.values[dead] == 1).all()
    np.testing.assert_allclose(q.values[~dead], benjamini_hochberg(p.values[~dead]))
    assert (q.values >= p.values - 1e-12).all()


def test_noise_has_the_size_of_the_difference_and_another_direction() -> None:
    base, source = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    noise = norm_matched_noise(3)
    value = noise.values(SITES["z"], 1, base, source, [{}])
    change, given = value - base, source - base
    torch.testing.assert_close(change.norm(dim=-1), given.norm(dim=-1))
    for head in range(4):  # head by head too
        one = slice(8 * head, 8 * head + 8)
        torch.testing.assert_close(change[..., one].norm(dim=-1), given[..., one].norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(change, given, dim=-1).abs()
    assert float(cosine.max()) < 0.9
    torch.testing.assert_close(value, noise.values(SITES["z"], 1, base, source, [{}]))
    other = norm_matched_noise(4).values(SITES["z"], 1, base, source, [{}])
    assert not torch.allclose(value, other)


@pytest.mark.parametrize("donor", ["shuffle", norm_matched_noise()], ids=["shuffle", "noise"])
def test_control_levels_are_quantiles_of_a_placebo(donor: object) -> None:
    ds = ps.sweep(model("tiny:gpt2"), pairs(6), ["z"], direction="noising", intervention=donor)
    level = control_level(ds, "z", 0.9)
    sizes = np.abs(ps.summary.effect_mean(ds, "z").values[0]).ravel()
    assert level.item() == pytest.approx(np.quantile(sizes[sizes > 0], 0.9), rel=1e-5)


def test_placebos_that_do_nothing_and_wrong_levels_are_refused() -> None:
    ds = ps.sweep(model("tiny:gpt2"), pairs(2), ["z"], positions=[0], direction="noising")
    with pytest.raises(StoreError, match="does nothing at z"):
        control_level(ds, "z")
    with pytest.raises(PatchsweepError, match="level=1"):
        control_level(ds, "z", 1)
    with pytest.raises(PatchsweepError, match="seed=-1"):
        norm_matched_noise(-1)
