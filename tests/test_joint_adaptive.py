"""Joint patches with a tolerance: close to exact ones, at both ends and between, and cheaper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
from attribution_setup import pairs_of
from patchsweep import Patch
from patchsweep.analyses.joint import patches as patches_module
from patchsweep.analyses.stages import Stages, Unfinished
from patchsweep.errors import StoreError
from patchsweep.results.tolerance import allowed_error, tolerance_notes
from patchsweep.sweeps.joint import joint_request
from patchsweep.sweeps.joint_adaptive import LINEARLY, AdaptivePatches
from subjects import demo_pairs, model

ALMOST = (1e-30, 1e-30)  # nothing sleeps that changes at all
FAMILIES = ["tiny:llama", "tiny:gemma2"]


def prepared(name: str, sets: list[Any], pairs: ps.PromptPairs) -> tuple[AdaptivePatches, Any, Any]:
    request = joint_request(
        model(name),
        pairs,
        sets,
        ["logit_diff", "log_prob"],
        direction="denoising",
        read=-1,
        means_from=ps.SweepSpec.means_from,
        compute_dtype="auto",
    )
    found = AdaptivePatches(
        request,
        "packed",
        256,
        None,
        1.0,
        ["patched"],
        lambda plan, _: np.zeros(plan.n_rows, np.int64),
    )
    (batch,) = request.batches(range(len(pairs)))
    loaded, *_ = found._of(batch)
    plan = request.plan(batch, range(len(request.sets)))
    return found, loaded, plan.part(np.flatnonzero(plan.live))


def at(found: AdaptivePatches, loaded: Any, plan: Any, level: tuple[float, float]) -> Any:
    return found._run(loaded, plan, np.full((plan.n_rows, 2), level), 1)


def sets_of(name: str) -> list[Any]:
    """Sets of one layer, of two that share one, of two that do not, of three."""
    head = Patch("z", layer=1, head=1)
    one = [
        Patch("z", layer=0, head=0),
        [Patch("z", layer=0, head=0), Patch("z", layer=0, head=2)],
        [Patch("z", layer=1, head=0, pos=[9, 12]), Patch("mlp_out", layer=1, pos=11)],
        Patch("resid_pre", layer=1, pos=9),
        Patch("resid_post", layer=model(name).cfg.n_layers - 1, pos=[10, 16]),
        [Patch("k", layer=0, pos=[9]), Patch("z", layer=0, head=1, pos=13)],
        Patch("embed", pos="all"),
        Patch("resid_mid", layer=0, pos=12, intervention=ps.Scale(0.5)),
    ]
    two = [
        [Patch("z", layer=0, head=0), head],
        [Patch("z", layer=0, head=0), Patch("z", layer=1, head=2)],
        [Patch("z", layer=0, head=0), Patch("mlp_out", layer=1, pos=[10, 12])],
        [Patch("z", layer=0, head=1), Patch("mlp_out", layer=1, intervention="base")],
        [Patch("resid_pre", layer=0, pos=9), Patch("resid_pre", layer=1, pos=[4, 11])],
    ]
    last = model(name).cfg.n_layers - 1
    three = [[Patch("z", layer=0, head=0), head, Patch("mlp_out", layer=last, pos=16)]]
    return [*one, *two, *(three if last > 1 else [])]


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_thresholds_equal_exact_ones(name: str) -> None:
    found, loaded, plan = prepared(name, sets_of(name), demo_pairs(name))
    exact = found.adaptive.exact(loaded.loaded, plan, found.request.metrics)
    effects = exact.values - loaded.base[:, plan.pair]
    assert np.abs(effects).max() > 0.3, "effects of order one, or the test shows nothing"
    almost = at(found, loaded, plan, ALMOST)
    np.testing.assert_allclose(almost.values, exact.values, atol=2e-5, rtol=1e-5)
    assert np.abs(almost.linear).max() < 1e-5
    errors, costs = [], []
    for level in ((0.3, 0.3), (0.03, 0.03), (0.003, 0.003), (3e-4, 3e-4)):
        ran = at(found, loaded, plan, level)
        errors.append(np.abs(ran.values - exact.values).max())
        costs.append(ran.token_layers.sum())
    assert costs == sorted(costs)
    assert errors[-1] <= max(2e-5, errors[0] / 10), errors


@pytest.mark.parametrize("name", FAMILIES)
def test_a_second_patch_is_linear_on_the_run_with_the_first(name: str) -> None:
    # what is left of a change of 1 % is second order: of the base run's gradient it would not be
    def sets(factor: float) -> list[Any]:
        return [
            [Patch("z", layer=0), Patch("z", layer=1, head=head, intervention=ps.Scale(factor))]
            for head in range(3)
        ]

    errors, changes = [], []
    for factor in (1.04, 1.01):
        found, loaded, plan = prepared(name, sets(factor), pairs_of(name, 2))
        exact = found.adaptive.exact(loaded.loaded, plan, found.request.metrics).values
        one, base, first = prepared(name, [Patch("z", layer=0)], pairs_of(name, 2))
        alone = one.adaptive.exact(base.loaded, first, one.request.metrics).values
        changes.append(np.abs(exact - np.repeat(alone, 3, axis=1)).max())
        errors.append(np.abs(at(found, loaded, plan, LINEARLY).values - exact).max())
    assert changes[1] > 1e-3
    assert errors[0] < 0.05 * changes[0]
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("name", FAMILIES)
def test_interactions_with_a_tolerance_are_within_it(name: str) -> None:
    pairs = pairs_of(name, 2)
    exact = ps.interactions(model(name), pairs)
    ds = ps.interactions(model(name), pairs, tolerance=0.05)
    effects = (exact["patched"] - exact["base_metric"]).values
    assert np.abs(effects).max() > 0.5, "effects of order one, or the test shows nothing"
    assert np.abs(exact["interaction"]).max() > 0.2
    error = np.abs(ds["patched"].values - exact["patched"].values)
    assert error.max() <= 0.05
    n = np.arange(len(ds["head"]))
    assert error[..., n, n].max() < 1e-4, "each head alone is exact"
    assert np.abs(ds["interaction"] - exact["interaction"]).max() <= 0.05
    assert (ds["patched_linear"].values[..., n, n] == 0).all()
    assert np.quantile(np.abs(ds["patched_linear"].values), 0.9) > 1e-5, "nothing is linear"
    (note,) = tolerance_notes(ds)
    assert "patched: tolerance 0.05; on a sample of" in note


def test_sets_with_a_tolerance_are_stored_and_go_on(tmp_path: Path) -> None:
    name = "tiny:llama"
    pairs = pairs_of(name, 3)
    sets = [Patch("z", layer=layer, head=head, pos=pos)
            for layer in range(2) for head in range(4) for pos in (9, 12)]  # fmt: skip
    exact = ps.run_patches(model(name), pairs, sets)
    within = ps.run_patches(model(name), pairs, sets, tolerance="5%")
    allowed = allowed_error(within)[..., None]
    assert (np.abs(within["patched"].values - exact["patched"].values) <= allowed).all()
    assert within["patched_token_layers"].values.sum() > 0
    place = tmp_path / "sets.zarr"
    stored = ps.run_patches(model(name), pairs, sets, tolerance="5%", stages=Stages(place))
    np.testing.assert_array_equal(stored["patched"], within["patched"])
    again = Stages(place)
    ps.run_patches(model(name), pairs, sets, tolerance="5%", stages=again)
    assert again.known
    for other in (None, "4%"):
        with pytest.raises(StoreError):
            ps.run_patches(model(name), pairs, sets, tolerance=other, stages=Stages(place))


def test_slices_divide_sets_with_a_tolerance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "tiny:llama"
    monkeypatch.setattr(patches_module, "SETS", 20)  # several stages, a pair a unit
    pairs = pairs_of(name, 3)
    sets = [Patch("z", layer=layer, head=head, pos=pos)
            for layer in range(2) for head in range(4) for pos in range(10, 16)]  # fmt: skip

    def run(stages: Stages | None) -> Any:
        return ps.run_patches(model(name), pairs, sets, tolerance="5%", stages=stages)

    known, place = run(None), str(tmp_path / "a.zarr")
    with pytest.raises(Unfinished):
        run(Stages(place, slice_index=0, n_slices=2))
    found = run(Stages(place, slice_index=1, n_slices=2))
    np.testing.assert_array_equal(found["patched"], known["patched"])


def test_sets_that_no_gradient_fits_run_exactly() -> None:
    name = "tiny:llama"
    frozen = Patch("mlp_out", layer=[1, 2], intervention="base")
    sets = [[Patch("z", layer=0, head=head), frozen] for head in range(4)]
    exact = ps.run_patches(model(name), demo_pairs(name), sets)
    within = ps.run_patches(model(name), demo_pairs(name), sets, tolerance=0.1)
    np.testing.assert_array_equal(within["patched"], exact["patched"])
    assert "no patch is one that a tolerance makes cheaper" in tolerance_notes(within)[0]
