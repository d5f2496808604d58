"""Joint patches equal a loop of forward passes with several hooks each."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import torch
from attribution_setup import pairs_of
from oracle import hook_of, site_values
from patchsweep import Patch
from patchsweep.analyses.joint.interactions import largest_interactions
from patchsweep.analyses.stages import Stages
from patchsweep.errors import PatchsweepError, PlanError
from patchsweep.models import TINY_FAMILIES
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.joint import shared_stems
from patchsweep.spec.sites import SITES
from patchsweep.sweeps.joint import joint_request
from subjects import demo_pairs, model, quick

# fp32 logits of order 10 carry about 1e-6 each; a dozen products and norms stay far below this
TOLERANCE = 1e-4
# in the order in which a block computes them
ORDER = (
    "embed resid_pre k v q rot_q rot_k pattern z attn_out resid_mid mlp_post mlp_out resid_post"
).split()


def joint_loop(name, pairs, sets, direction, sites=ORDER) -> np.ndarray:
    """logit_diff `[pair, set]`, one forward pass each; nothing is proven dead, nothing shared."""
    bridge = model(name)
    results = np.empty((len(pairs), len(sets)))
    for i, pair in enumerate(pairs):
        base, source = (torch.tensor([x]) for x in base_and_source(pair, direction))
        used = {patch.site for patches in sets for patch in patches}
        acts = {
            site: [site_values(bridge, SITES[site], tokens) for tokens in (base, source)]
            for site in used
        }
        for j, patches in enumerate(sets):
            hooks = []
            for patch in sorted(patches, key=lambda p: sites.index(p.site)):
                for layer in _tuple(0 if patch.layer is None else patch.layer):
                    hooks.append(
                        (
                            hook_of(bridge, SITES[patch.site], layer),
                            _writer(patch, acts[patch.site], layer, pair),
                        )
                    )
            with torch.no_grad():
                logits = bridge.run_with_hooks(base, fwd_hooks=hooks)[0, -1]
            results[i, j] = float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]])
    return results


def _writer(patch, acts, layer, pair):
    base, source = (x[layer] for x in acts)
    new = (
        {"resample": source, "zero": torch.zeros_like(base), "base": base}[patch.intervention]
        if isinstance(patch.intervention, str)
        else torch.full_like(base, patch.intervention)
    )
    where = (
        [*range(base.shape[1])]
        if patch.pos == "all"
        else [
            q
            for p in _tuple(patch.pos)
            for q in (range(*pair.labels[p]) if isinstance(p, str) else [p])
        ]
    )
    where = torch.tensor(where)

    def write(x, hook):
        if patch.head is None:
            x[:, where] = new[:, where]
        elif x.ndim == 4:
            for head in _tuple(patch.head):
                x[:, where, head] = new[:, where, head]
        else:
            for unit in _tuple(patch.head):
                x[:, where, unit] = new[:, where, unit]
        return x

    return write


def _tuple(given):
    return given if isinstance(given, list | tuple) else (given,)


def random_sets(name: str, n: int, seed: int, sites: list[str]) -> list[list[Patch]]:
    """Sets of two to five patches over layers, sites, positions and heads, without overlaps."""
    rng = np.random.default_rng(seed)
    cfg = model(name).cfg
    n_pos, n_layers = len(demo_pairs(name)[0]), cfg.n_layers
    units = {"head": cfg.n_heads, "neuron": cfg.d_mlp}
    units["kv_head"] = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    sets = []
    for _ in range(n):
        patches, taken = [], set()
        for _ in range(int(rng.integers(2, 6))):
            site = sites[int(rng.integers(len(sites)))]
            layer = int(rng.integers(n_layers)) if SITES[site].layered else None
            if (site, layer) in taken:
                continue
            taken.add((site, layer))
            pos = (
                "all"
                if rng.random() < 0.3
                else sorted(rng.choice(n_pos, size=int(rng.integers(1, 4)), replace=False).tolist())
            )
            unit = SITES[site].unit
            head = None
            if unit is not None and rng.random() < 0.8:
                head = sorted(rng.choice(units[unit], size=2, replace=False).tolist())
            value = ["resample", "resample", "resample", "zero", "base"][int(rng.integers(5))]
            patches.append(Patch(site, layer, pos, head, value))
        sets.append(patches)
    return sets


def sites_of(name: str) -> list[str]:
    bridge = model(name)
    known = bridge.hook_dict
    out = [
        s
        for s in (
            "embed",
            "resid_pre",
            "resid_mid",
            "resid_post",
            "attn_out",
            "mlp_out",
            "z",
            "q",
            "k",
            "v",
            "mlp_post",
        )
        if SITES[s].hook_name(0) in known
    ]
    return [s for s in out if not (s == "mlp_post" and "mixtral" in name)]


@pytest.mark.parametrize("direction", quick(["denoising", "noising"], "denoising"))
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_random_sets_equal_a_loop_of_many_hooks(family: str, direction: str) -> None:
    name = f"tiny:{family}"
    pairs = pairs_of(name, 2)
    sets = random_sets(name, 10, 1, sites_of(name))
    expected = joint_loop(name, pairs, sets, direction)
    sizes = []
    for runner in ("packed", "hooked"):
        ds = ps.run_patches(
            model(name), pairs, sets, direction=direction, runner=runner, max_tokens=64
        )
        assert ds.attrs["runner"] == runner
        difference = np.abs(ds["patched"].values[0] - expected)
        assert difference.max() < TOLERANCE, (runner, np.argwhere(difference > TOLERANCE))
        sizes.append(np.abs((ds["patched"] - ds["base_metric"]).values).max())
    assert min(sizes) > 0.5


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_rows_that_share_their_lowest_patches_equal_the_loop(family, monkeypatch) -> None:
    """Rows continue kept runs: at the same position, before it and after it, on several pairs."""
    monkeypatch.setattr("patchsweep.runners.packed.joint.STEM_BYTES", 60_000)
    name = f"tiny:{family}"
    pairs = pairs_of(name, 2)
    low = [
        Patch("z", 0, "all", 1),
        Patch("resid_pre", 0, [4, 12], None, "zero"),
        Patch("mlp_out", 0, [10]),
    ]
    high = [
        Patch("z", 1, "all", 0),
        Patch("z", 2, [16], 3),
        Patch("resid_post", 1, [2, 11], None, "zero"),
        Patch("attn_out", 2, [11, 13]),
        Patch("mlp_out", 2, "all", None, "base"),
        Patch("v", 1, [3, 12], [0], "zero"),
    ]
    sets = [[a, b] for a in low for b in high] + [[a, b, high[4]] for a in low for b in high[:2]]
    expected = joint_loop(name, pairs, sets, "denoising")
    ds = ps.run_patches(
        model(name), pairs, sets, direction="denoising", runner="packed", max_tokens=40
    )
    assert np.abs(ds["patched"].values[0] - expected).max() < TOLERANCE
    assert np.abs((ds["patched"] - ds["base_metric"]).values).max() > 0.5


def test_stems_run_shared_blocks_once() -> None:
    name = "tiny:llama"
    sets = [[Patch("z", 0, "all", 0), Patch("z", 1, "all", i)] for i in range(4)]
    request = joint_request(
        model(name), demo_pairs(name), sets, "logit_diff", direction=None, read=-1,
        means_from=None, compute_dtype="auto",
    )  # fmt: skip
    plan = request.plan(request.batches([0])[0], range(4))
    alone, (stem,) = shared_stems(plan)
    assert len(alone) == 0
    assert stem.plan.n_rows == 1
    suffix = plan.length - plan.first[0, -1]
    assert plan.token_layers == 4 * 3 * suffix
    assert stem.plan.token_layers + stem.rest.token_layers == (3 + 4 * 2) * suffix


def test_sets_that_differ_in_dead_patches_alone_run_once() -> None:
    name = "tiny:llama"
    noise = Patch("resid_pre", 0, [12], None, 0.5)
    sets = [[noise, Patch("mlp_out", 1, [pos], None, "base")] for pos in (3, 5, 13)] + [noise]
    request = joint_request(
        model(name), demo_pairs(name), sets, "logit_diff", direction="noising", read=-1,
        means_from=None, compute_dtype="auto",
    )  # fmt: skip
    first, of = request.plan(request.batches([0])[0], range(4)).distinct()
    assert first.tolist() == [0, 2]
    assert of.tolist() == [0, 0, 1, 0]


def test_a_base_value_freezes_what_no_other_patch_reaches_for_nothing() -> None:
    """Dead beside patches that come later or at later positions, live behind an earlier one."""
    name = "tiny:gpt2"
    first = 10  # the prompts differ from here on
    sets = {
        "before the difference": Patch("resid_pre", 1, [3]),
        "frozen alone": Patch("mlp_out", 1, "all", None, "base"),
        "frozen above": [Patch("z", 2, [first], 0), Patch("mlp_out", 1, "all", None, "base")],
        "frozen below": [Patch("z", 0, [first], 0), Patch("mlp_out", 1, "all", None, "base")],
        "z0": Patch("z", 0, [first], 0),
        "z2": Patch("z", 2, [first], 0),
        "restored": [Patch("resid_pre", 0, [2], None, 0.5), Patch("resid_pre", 1, "all")],
    }
    ds = ps.run_patches(model(name), demo_pairs(name), sets, direction="denoising")
    value = {key: float(ds["patched"].sel(patch=key).squeeze()) for key in sets}
    base, source = float(ds["base_metric"].squeeze()), float(ds["source_metric"].squeeze())
    assert value["before the difference"] == value["frozen alone"] == base
    assert value["frozen above"] == value["z2"]
    assert abs(value["frozen below"] - value["z0"]) > 1e-3
    assert abs(value["restored"] - source) < TOLERANCE


def test_equal_patches_of_a_set_are_one_and_different_ones_are_refused() -> None:
    name = "tiny:gpt2"
    pairs = demo_pairs(name)
    twice = [Patch("z", 1, "all", 0), Patch("z", 1, [12], [0, 1])]
    once = [Patch("z", 1, "all", 0), Patch("z", 1, [12], 1)]
    ds = ps.run_patches(model(name), pairs, [twice, once])
    assert ds["patched"].values[0, 0, 0] == ds["patched"].values[0, 0, 1]
    with pytest.raises(PlanError, match=r"patches\[1\] gives z at layer 1, position 12, head 0"):
        ps.run_patches(
            model(name), pairs, [once, [*once, Patch("z", 1, [12], None, 0.0)]],
            direction="noising",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("patches", "says"),
    [
        ([], "patches is empty"),
        (Patch("z", 1), "is one Patch; give a list"),
        ([[]], r"patches\[0\]=\[\] must be a Patch or a list of them"),
        (["z"], "must be a Patch"),
        ([[("z", 1)]], "is no Patch; write Patch"),
        ([Patch("z", 7)], "layer=7 is none of the 3 that the model has; use 0..2"),
        ([Patch("z")], "a patch of z needs a layer"),
        ([Patch("embed", 0)], "site embed has no layers"),
        ([Patch("z", 0, head=4)], "head=4 is none of the 4"),
        ([Patch("mlp_out", 0, head=0)], "site mlp_out has no heads"),
        ([Patch("z", 0, pos=17)], r"pos=17 is no position of the shortest prompt; use -17..16"),
        ([Patch("z", 0, pos="S9")], "pos='S9' is no label"),
        ([Patch("pattern_cell", 0)], "not cells"),
        ([Patch("z", 0), Patch("z", 1, intervention="zero")], "different default directions"),
        ([Patch("z", 0, intervention="shuffel")], "intervention 'shuffel' is not known"),
        ([Patch("z", 0, intervention="mean")], "needs 4 behind each"),
    ],
)
def test_bad_sets_are_refused_before_anything_runs(patches, says, monkeypatch) -> None:
    name = "tiny:gpt2"
    pairs = demo_pairs(name)
    monkeypatch.setattr("patchsweep.analyses.joint.patches.JointPatches", None)
    with pytest.raises(PatchsweepError, match=says):
        ps.run_patches(model(name), pairs, patches)


def test_a_pattern_beside_another_patch_runs_by_hooks() -> None:
    name = "tiny:llama"
    sets = [[Patch("pattern", 1, [12], 0), Patch("z", 0, [11], 1)], [Patch("pattern", 2)]]
    ds = ps.run_patches(model(name), demo_pairs(name), sets)
    assert ds.attrs["runner"] == "hooked"
    with pytest.raises(PatchsweepError, match="attention pattern is patched beside"):
        ps.run_patches(model(name), demo_pairs(name), sets, runner="packed")


def test_a_store_keeps_the_sets_and_refuses_others(tmp_path) -> None:
    name = "tiny:gpt2"
    pairs = demo_pairs(name)
    sets = {"a": Patch("z", 1, "all", 0), "b": [Patch("z", 0, "all", 0), Patch("mlp_out", 1)]}
    place = tmp_path / "p.zarr"
    first = ps.run_patches(model(name), pairs, sets, stages=Stages(place))
    again = ps.run_patches(model(name), pairs, sets, stages=Stages(place))
    assert first["patched"].identical(again["patched"])
    with pytest.raises(PatchsweepError, match="other results"):
        ps.run_patches(model(name), pairs, {**sets, "b": Patch("z", 1)}, stages=Stages(place))


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_sets_of_smollm2_equal_the_loop(direction: str) -> None:
    name = "smollm2-135m"
    pairs = demo_pairs(name)
    sites = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "k", "v", "mlp_post"]
    sets = random_sets(name, 6, 3, sites)
    expected = joint_loop(name, pairs, sets, direction)
    for runner in ("packed", "hooked"):
        ds = ps.run_patches(model(name), pairs, sets, direction=direction, runner=runner)
        assert np.abs(ds["patched"].values[0] - expected).max() < TOLERANCE, runner
    assert np.abs(expected - ds["base_metric"].values).max() > 0.5


def test_interactions_equal_a_loop() -> None:
    name = "tiny:llama"
    pairs = pairs_of(name, 2)
    heads = [(0, 1), (1, 0), (1, 2), (2, 3)]
    ds = ps.interactions(model(name), pairs, heads=[(0, 1), "a1.h0", (-2, 2), "a2.h3"])
    alone = [Patch("z", layer, "all", head) for layer, head in heads]
    sets = [[a, b] if a is not b else [a] for a in alone for b in alone]
    expected = joint_loop(name, pairs, sets, "denoising").reshape(2, 4, 4)
    assert np.abs(ds["patched"].values[0] - expected).max() < TOLERANCE
    effect = expected - ds["base_metric"].values[0][:, None, None]
    single = np.einsum("pii->pi", effect)
    change = effect - single[:, :, None] - single[:, None, :]
    change[:, range(4), range(4)] = 0
    assert np.abs(change).max() > 0.05
    assert np.abs(ds["interaction"].values[0] - change).max() < 3 * TOLERANCE


def test_a_planted_redundant_pair_is_the_largest_interaction() -> None:
    """Two heads of layer 0 ask the same and write the same, so loudly that either is enough: the
    norms behind them leave of their sum little but its direction."""
    planted = ps.load_model("tiny:llama", device="cpu")
    attention = planted.original_model.model.layers[0].self_attn
    attention = getattr(attention, "original_component", attention)
    q, o = (getattr(attention, x) for x in ("q_proj", "o_proj"))
    q, o = (getattr(x, "original_component", x).weight for x in (q, o))
    with torch.no_grad():
        q[8:16] = q[:8]  # both read the first key head
        o[:, :8] *= 30
        o[:, 8:16] = o[:, :8]
    ds = ps.interactions(planted, demo_pairs("tiny:llama"), intervention="zero")
    top = largest_interactions(ds, n=2)
    assert (top[0].head, top[0].other) == ("a0.h0", "a0.h1")
    assert abs(top[0].both) > 1
    assert abs(top[0].alone) < 0.2 * abs(top[0].both)
    assert abs(top[0].other_alone) < 0.2 * abs(top[0].both)
    assert abs(top[1].interaction) < 0.7 * abs(top[0].interaction)


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ([(0, 1)], "at least two heads"),
        ([(0, 1), "a0.h1"], "each once"),
        ([(0, 1), (3, 0)], r"\(3, 0\) is no head of 3 layers of 4"),
        (["a0.h1", "a9.h0"], "'a9.h0' is no head"),
        ("a0.h1", "must be a list of heads"),
    ],
)
def test_bad_heads_are_refused_before_anything_runs(heads, says) -> None:
    with pytest.raises(PlanError, match=says):
        ps.interactions(model("tiny:llama"), demo_pairs("tiny:llama"), heads=heads)


@pytest.mark.slow
def test_200_pairs_of_smollm2s_heads_equal_hooks() -> None:
    from benchmarks.joint_patches import by_hooks

    name = "smollm2-135m"
    pairs = demo_pairs(name)
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(270, k=1)
    chosen = rng.choice(len(first), size=200, replace=False)
    first, second = first[chosen], second[chosen]
    expected = by_hooks(model(name), pairs[0], first, second)
    head = [Patch("z", i // 9, "all", i % 9) for i in range(270)]
    sets = [[head[i], head[j]] for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    ds = ps.run_patches(model(name), pairs, sets)
    assert np.abs(ds["patched"].values[0, 0] - expected).max() < TOLERANCE
    assert np.abs(expected - ds["base_metric"].values[0, 0]).max() > 0.5
