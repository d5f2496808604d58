"""Interventions on directions equal hooks that do the same, and their controls are seeded."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import torch
from attribution_setup import pairs_of
from oracle import hook_of, site_values
from patchsweep import Patch
from patchsweep.errors import PatchsweepError
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.sites import SITES
from patchsweep.sweeps.identity import intervention_words
from subjects import demo_pairs, model

TOLERANCE = 1e-4  # of logits of order 10, as in test_joint
D_MODEL, D_HEAD = 32, 8
generator = torch.Generator().manual_seed(5)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("runner", ["packed", "hooked"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "mlp_out", "z", "v"])
def test_a_full_basis_is_resample_and_an_empty_one_changes_nothing(site: str, runner: str) -> None:
    name = "tiny:llama"
    width = D_HEAD if site in ("z", "v") else D_MODEL
    options = {"runner": runner, "positions": [2, 10, 16]}
    found = {
        key: ps.sweep(model(name), demo_pairs(name), site, intervention=x, **options)
        for key, x in {
            "resample": "resample",
            "full": ps.Project(draw(width + 3, width)),
            "empty": ps.Project(torch.zeros(0, width)),
        }.items()
    }
    effect = (found["resample"][site] - found["resample"]["base_metric"]).values
    assert np.abs(effect).max() > 0.05
    assert np.abs((found["full"][site] - found["resample"][site]).values).max() < TOLERANCE
    empty = found["empty"]
    assert np.abs((empty[site] - empty["base_metric"]).values).max() < TOLERANCE


def loop(name: str, pairs, sets, direction: str) -> np.ndarray:
    """logit_diff `[pair, set]`; a set is a list of (site, layer, positions, head, function)."""
    bridge = model(name)
    values = np.empty((len(pairs), len(sets)))
    for i, pair in enumerate(pairs):
        base, source = (torch.tensor([x]) for x in base_and_source(pair, direction))
        for j, patches in enumerate(sets):
            hooks = []
            for site, layer, where, head, function in patches:
                theirs = site_values(bridge, SITES[site], source)[layer]

                def write(x, hook, where=where, head=head, function=function, theirs=theirs):
                    at = (slice(None), where) if head is None else (slice(None), where, head)
                    x[at] = function(x[at], theirs[at])
                    return x

                hooks.append((hook_of(bridge, SITES[site], layer), write))
            with torch.no_grad():
                logits = bridge.run_with_hooks(base, fwd_hooks=hooks)[0, -1]
            values[i, j] = float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]])
    return values


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_interventions_on_directions_equal_hooks_that_act_one_after_the_other(family: str) -> None:
    name = f"tiny:{family}"
    pairs = pairs_of(name, 2)
    d, e, two = draw(D_MODEL), draw(D_HEAD), draw(2, D_HEAD)
    plane = draw(3, D_MODEL)
    q, _ = torch.linalg.qr(plane.T)
    r, _ = torch.linalg.qr(two.T)
    everywhere = slice(None)
    functions = {
        "add": (ps.Add(d, 1.5), lambda x, s: x + 1.5 * d),
        "add to heads": (ps.Add(e, -2.0), lambda x, s: x - 2 * e),
        "project": (ps.Project(plane), lambda x, s: x + (s - x) @ q @ q.T),
        "project heads": (ps.Project(two), lambda x, s: x + (s - x) @ r @ r.T),
        "ablate": (ps.Ablate(plane), lambda x, s: x - x @ q @ q.T),
        "scale": (ps.Scale(0.25), lambda x, s: 0.25 * x),
    }
    sets = [
        [("resid_pre", 0, everywhere, None, "add"), ("resid_pre", 1, everywhere, None, "add")],
        [("z", 0, [4, 12], 1, "add to heads"), ("resid_pre", 2, everywhere, None, "project")],
        [("mlp_out", 0, [11], None, "project"), ("mlp_out", 1, everywhere, None, "ablate")],
        [("z", 1, everywhere, 2, "project heads"), ("z", 2, everywhere, 0, "project heads")],
        [("resid_post", 0, [3], None, "ablate"), ("attn_out", 1, everywhere, None, "scale")],
        [("resid_post", 2, [16], None, "add"), ("z", 0, [12], 3, "scale")],
        [("resid_pre", 1, [12], None, "ablate")],
    ]
    expected = loop(
        name, pairs, [[(*p[:4], functions[p[4]][1]) for p in s] for s in sets], "denoising"
    )
    given = [
        [
            Patch(site, layer, "all" if where == everywhere else where, head, functions[key][0])
            for site, layer, where, head, key in patches
        ]
        for patches in sets
    ]
    for runner in ("packed", "hooked"):
        ds = ps.run_patches(
            model(name), pairs, given, direction="denoising", runner=runner, max_tokens=50
        )
        assert np.abs(ds["patched"].values[0] - expected).max() < TOLERANCE, runner
    effects = np.abs((ds["patched"] - ds["base_metric"]).values[0])
    assert (effects.max(axis=0) > 1e-3).all()


def test_a_sweep_equals_the_hooks() -> None:
    name = "tiny:gpt2"
    by_layer = {0: draw(D_MODEL), 2: draw(D_MODEL)}
    ds = ps.sweep(
        model(name), demo_pairs(name), "resid_pre", intervention=ps.Add(by_layer, 0.5),
        layers=[0, 2], positions=[3, 12],
    )  # fmt: skip
    sets = [
        [("resid_pre", layer, [pos], None, lambda x, s, d=by_layer[layer]: x + 0.5 * d)]
        for layer in (0, 2)
        for pos in (3, 12)
    ]
    expected = loop(name, demo_pairs(name), sets, "noising").reshape(2, 2)
    assert ds.attrs["direction"] == "noising"
    assert np.abs(ds["resid_pre"].values[0, 0] - expected).max() < TOLERANCE


def test_a_placebo_takes_the_next_pairs_source() -> None:
    name = "tiny:llama"
    pairs = pairs_of(name, 3)
    basis = torch.eye(D_MODEL)
    options = {"layers": [1], "positions": [10, 16], "direction": "denoising"}
    placebo = ps.sweep(model(name), pairs, "resid_pre", intervention=ps.Project(basis, placebo=True), **options)  # fmt: skip  # noqa: E501
    shuffled = ps.sweep(model(name), pairs, "resid_pre", intervention="shuffle", **options)
    assert np.abs((placebo["resid_pre"] - shuffled["resid_pre"]).values).max() < TOLERANCE


def test_controls_have_the_norms_and_their_seeds_are_kept() -> None:
    table = {0: draw(D_MODEL), 1: 3 * draw(D_MODEL)}
    add = ps.Add(table, 2.0)
    one, again, two = add.random_like(1), add.random_like(1), add.random_like(2)
    for layer in table:
        assert torch.equal(one.direction[layer], again.direction[layer])
        assert not torch.allclose(one.direction[layer], two.direction[layer])
        assert torch.allclose(one.direction[layer].norm(), table[layer].norm())
    assert not torch.allclose(
        one.direction[0] / one.direction[0].norm(), one.direction[1] / one.direction[1].norm()
    )
    assert "seed=1" in intervention_words(one)
    assert intervention_words(one) == intervention_words(again) != intervention_words(two)
    plane = draw(2, D_MODEL)
    for kind in (ps.Project, ps.Ablate):
        control = kind(plane).random_like(7)
        assert control.seed == 7
        assert torch.allclose(control.directions.norm(dim=1), plane.norm(dim=1))


def test_a_dose_curve_is_its_runs_and_is_stored(tmp_path) -> None:
    name = "tiny:llama"
    pairs = pairs_of(name, 2)
    towards = ps.difference_of_means(model(name), pairs, "resid_pre", pos=12)
    acts = [
        [
            site_values(model(name), SITES["resid_pre"], torch.tensor([tokens]))[1][0, 12]
            for tokens in (pair.clean, pair.corrupted)
        ]
        for pair in pairs
    ]
    mean = torch.stack([clean - corrupted for clean, corrupted in acts]).mean(dim=0)
    assert torch.allclose(towards[1], mean, atol=1e-5)

    from patchsweep.analyses.stages import Stages

    settings = {"layers": [1, 2], "positions": [12, 16], "controls": 2, "seed": 3}
    ds = ps.dose(
        model(name), pairs, "resid_pre", towards, [-1, 0, 2.5],
        stages=Stages(tmp_path / "dose.zarr"), **settings,
    )  # fmt: skip
    assert dict(ds["patched"].sizes) == {
        "metric": 1, "pair": 2, "vector": 3, "coefficient": 3, "layer": 2, "place": 2
    }  # fmt: skip
    assert ds["control_seed"].values.tolist() == [-1, 3, 4]
    zero = ds["patched"].sel(coefficient=0) - ds["base_metric"]
    assert np.abs(zero.values).max() < TOLERANCE
    control = ps.Add(towards, 2.5).random_like(4)
    one = ps.sweep(
        model(name), pairs, "resid_pre", intervention=control, layers=[2], positions=[16]
    )
    cell = ds["patched"].sel(vector="random 4", coefficient=2.5, layer=2, place="16")
    assert np.abs(cell.values - one["resid_pre"].values[:, :, 0, 0]).max() < TOLERANCE
    assert np.abs((ds["patched"] - ds["base_metric"]).values).max() > 0.5


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ps.Add(torch.zeros(D_MODEL)), "direction must have a norm above 0"),
        (lambda: ps.Project(torch.eye(3)[[0, 1]] * torch.tensor([1.0, 0, 0])), "number 1 has"),
        (lambda: ps.Add(draw(2, D_MODEL)), r"direction has the shape \(2, 32\); give \[width\]"),
        (lambda: ps.Ablate(draw(D_MODEL)), r"give \[direction, width\]"),
        (lambda: ps.Add(torch.full((D_MODEL,), torch.nan)), "must be finite"),
        (lambda: ps.Add("up"), "direction must be a tensor"),
        (lambda: ps.Add(draw(4), float("inf")), "coefficient=inf must be a number"),
        (lambda: ps.Scale("half"), "factor='half' must be a number"),
        (lambda: ps.Add({"a": draw(4)}), "must map layers"),
        (lambda: ps.Add(draw(4)).random_like(-1), "seed=-1 must be a whole number"),
    ],
)
def test_bad_directions_are_refused_when_they_are_made(make, says: str) -> None:
    with pytest.raises(PatchsweepError, match=says):
        make()


@pytest.mark.parametrize(
    ("site", "intervention", "options", "says"),
    [
        ("resid_pre", ps.Add(draw(D_HEAD)), {}, "of the width 8, and resid_pre has vectors of 32"),
        ("z", ps.Add(draw(5)), {}, "of the width 5, and z has vectors of 8 or 32"),
        ("pattern", ps.Scale(0.5), {}, "is an attention pattern"),
        ("resid_pre", ps.Add({1: draw(D_MODEL)}), {}, "has no direction for layer 0"),
        ("resid_pre", ps.Scale(0.5), {"layers": [(0, 1)]}, "several layers at once with"),
    ],
)
def test_directions_that_do_not_fit_are_refused_before_anything_runs(
    site, intervention, options, says, monkeypatch
) -> None:
    monkeypatch.setattr("patchsweep.sweeps.api.select_runner", None)
    with pytest.raises(PatchsweepError, match=says):
        ps.sweep(
            model("tiny:llama"), demo_pairs("tiny:llama"), site, intervention=intervention,
            **options,
        )  # fmt: skip


def test_edges_refuse_them() -> None:
    for intervention in (ps.Scale(0.5), ps.Project(torch.eye(8), placebo=True)):
        with pytest.raises(PatchsweepError, match=intervention.name):
            ps.edges(model("tiny:llama"), pairs_of("tiny:llama", 2), intervention=intervention)
