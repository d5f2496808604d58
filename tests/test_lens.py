"""The lens equals TransformerLens's, also of patched runs, and removing a write removes it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import patchsweep
import pytest
import torch
import xarray as xr
from patchsweep.analyses.logit_lens import Patch, describe, lens, sublayers
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, MethodError, PlanError
from patchsweep.spec.interventions import Mean
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model, reference_pairs
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_lens

# learned and rotary positions, sandwich norms with a soft-cap, experts
FAMILIES = ["gpt2", "llama", "gemma2", "gemma3", "mixtral", "opt"]


@pytest.mark.parametrize("which", ["base", "source"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lens_equals_logit_lens(family: str, which: Any) -> None:
    name = f"tiny:{family}"
    bridge, pair = model(name), demo_pairs(name)[0]
    found = lens(bridge, demo_pairs(name), which=which, direction="denoising", top=3).isel(
        run=0, pair=0
    )
    tokens = torch.tensor([pair.corrupted if which == "base" else pair.clean])
    options: dict[str, Any] = {"incl_mid": True, "positions": None}
    for kind, ids in (("answer", pair.answer), ("wrong", pair.wrong_answer)):
        theirs = logit_lens(bridge, tokens, targets=ids[0], return_type="log_probs", **options)
        ranks = theirs.rank_trajectory()
        for i, label in enumerate(theirs.labels):
            mine = found.sel(place_of(label, bridge))
            expected = theirs.values[i, 0, :, 0].numpy()
            np.testing.assert_allclose(mine[f"{kind}_log_prob"], expected, atol=1e-4)
            np.testing.assert_allclose(mine[f"{kind}_prob"], np.exp(expected), atol=1e-4)
            # two logits within rounding may change places
            assert np.abs(mine[f"{kind}_rank"].values - ranks[i, 0].numpy()).max() <= 1
    best = logit_lens(bridge, tokens, top_k=3, return_type="probs", **options)
    for i, label in enumerate(best.labels):
        mine = found.sel(place_of(label, bridge))
        np.testing.assert_allclose(mine["top_prob"], best.values[i, 0].numpy(), atol=1e-4)
        words = best.top_tokens(bridge.tokenizer)[label][0]
        assert mine["top_token"].values[-1].tolist() == words[-1]


def place_of(label: str, bridge: TransformerBridge) -> dict[str, Any]:
    layer, _, point = label.partition("_")
    at = bridge.cfg.n_layers - 1 if layer == "final" else int(layer)
    return {"layer": at, "point": f"resid_{point}"}


def test_last_place_is_the_models_prediction() -> None:
    name = "tiny:gpt_neox"
    bridge, pair = model(name), demo_pairs(name)[0]
    found = lens(bridge, demo_pairs(name), which="clean")
    assert np.isnan(found["answer_prob"].sel(point="resid_mid")).all()  # parallel blocks
    with torch.no_grad():
        expected = bridge(torch.tensor([pair.clean]))[0].log_softmax(-1)[:, pair.answer[0]]
    last = found["answer_log_prob"].sel(run="unpatched", pair=0, layer=2, point="resid_post")
    np.testing.assert_allclose(last, expected.numpy(), atol=1e-4)
    assert found["token"].values[0].tolist() == list(pair.clean_tokens)


@pytest.mark.parametrize("remove", [("mlp", 1), ("attn", 1), ("mlp", 2)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt"])
def test_removed_write_equals_a_hook(family: str, remove: Any) -> None:
    name = f"tiny:{family}"
    bridge, pair = model(name), demo_pairs(name)[0]
    found = lens(bridge, demo_pairs(name), remove=remove).isel(pair=0)
    assert found["run"].values.tolist() == ["unpatched", "patched"]
    whole, without = (found.sel(run=run) for run in found["run"].values)
    xr.testing.assert_equal(whole, lens(bridge, demo_pairs(name)).isel(pair=0, run=0))
    kind, layer = remove
    hook = (f"blocks.{layer}.hook_{kind}_out", lambda x, hook: x * 0)
    with torch.no_grad():
        logits = bridge.run_with_hooks(torch.tensor([pair.clean]), fwd_hooks=[hook])[0]
    expected = logits.log_softmax(-1)[:, pair.answer[0]].numpy()
    last = {"layer": 2, "point": "resid_post"}
    np.testing.assert_allclose(without.sel(last)["answer_log_prob"], expected, atol=1e-4)
    name = "answer_log_prob"
    assert np.abs(without.sel(last)[name] - whole.sel(last)[name]).max() > 0.01
    before = {"layer": layer, "point": "resid_pre"}
    np.testing.assert_array_equal(without.sel(before)[name], whole.sel(before)[name])
    if family != "gpt_neox":
        ends = ("resid_pre", "resid_mid") if kind == "attn" else ("resid_mid", "resid_post")
        x, y = (without.sel(layer=layer, point=point)["top_prob"] for point in ends)
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_pairs_of_several_lengths_equal_each_alone(monkeypatch: Any) -> None:
    bridge = model("tiny:llama")
    clean, corrupted = [CLEAN, f"Then {CLEAN}"], [CORRUPTED, f"Then {CORRUPTED}"]
    pairs = PromptPairs.from_strings(
        bridge, clean=clean, corrupted=corrupted, answers=[(" Mary", " John")] * 2
    )
    together = lens(bridge, pairs)
    monkeypatch.setattr(
        "patchsweep.analyses.logit_lens.stream.CHUNK_BYTES", 7 * 4 * bridge.cfg.d_vocab
    )
    for i in range(2):
        alone = lens(bridge, PromptPairs((pairs[i],)))
        n_pos = alone.sizes["pos"]
        for name in ("answer_log_prob", "wrong_log_prob", "top_prob"):
            mine = together[name][0, i, :, :, :n_pos]
            np.testing.assert_allclose(mine, alone[name][0, 0], atol=1e-4)
        assert together["answer_pos"][i] == n_pos - 1
        assert (together["top_token"][0, i, :, :, n_pos:] == "").all()
        assert np.isnan(together["answer_prob"][0, i, :, :, n_pos:]).all()


# Patched runs


def by_hand(bridge: TransformerBridge, name: str, patch: Any, pair: Any) -> Any:
    """A hook that does `patch` in the corrupted run, written for each shape by itself."""
    hook_name = f"blocks.{patch.layer}.{name}"
    kept = []
    with torch.no_grad():
        bridge.run_with_hooks(
            torch.tensor([pair.clean]),
            fwd_hooks=[(hook_name, lambda x, hook: kept.append(x.clone()))],
        )
    where = slice(None) if patch.pos == "all" else patch.pos

    def hook(x: torch.Tensor, hook: Any) -> torch.Tensor:
        new, x = kept[0] if patch.intervention == "resample" else kept[0] * 0, x.clone()
        if patch.head is None:
            x[:, where] = new[:, where]
        elif x.ndim == 4 or patch.site == "mlp_post":
            x[:, where, patch.head] = new[:, where, patch.head]
        else:
            d = bridge.cfg.d_head
            which = slice(patch.head * d, (patch.head + 1) * d)
            x[:, where, which] = new[:, where, which]
        return x

    return hook_name, hook


PATCHES = {
    "head": ("attn.hook_z", Patch("z", 1, head=3)),
    "key": ("attn.hook_k", Patch("k", 1, 10, 0)),
    "stream": ("hook_resid_pre", Patch("resid_pre", 1, 10)),
    "attention": ("hook_attn_out", Patch("attn_out", 0)),
    "neuron": ("mlp.hook_post", Patch("mlp_post", 1, head=5, intervention="zero")),
}


@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_lens_of_a_patched_run_equals_logit_lens_under_a_hook(family: str, kind: str) -> None:
    check_patched(f"tiny:{family}", *PATCHES[kind])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "patch"),
    [
        ("attn.hook_z", Patch("z", 23, 16, 3)),
        ("hook_resid_pre", Patch("resid_pre", 14, 10)),
        ("hook_mlp_out", Patch("mlp_out", 19, intervention="zero")),
    ],
)
def test_lens_of_a_patched_smollm2_equals_logit_lens_under_a_hook(hook: str, patch: Patch) -> None:
    check_patched("smollm2-135m", hook, patch)


def check_patched(name: str, hook: str, patch: Patch) -> None:
    bridge, pair = model(name), demo_pairs(name)[0]
    found = lens(bridge, demo_pairs(name), which="corrupted", patch=patch).isel(pair=0)
    tokens = torch.tensor([pair.corrupted])
    with torch.no_grad(), bridge.hooks(fwd_hooks=[by_hand(bridge, hook, patch, pair)]):
        logits = bridge(tokens)
        theirs = logit_lens(
            bridge,
            tokens,
            targets=pair.answer[0],
            return_type="log_probs",
            incl_mid=True,
            positions=None,
        )
    patched = found.sel(run="patched")["answer_log_prob"]
    for i, label in enumerate(theirs.labels):
        expected = theirs.values[i, 0, :, 0].numpy()
        np.testing.assert_allclose(patched.sel(place_of(label, bridge)), expected, atol=1e-4)
    expected = logits[0].log_softmax(-1)[:, pair.answer[0]].numpy()
    last = {"layer": bridge.cfg.n_layers - 1, "point": "resid_post"}
    np.testing.assert_allclose(patched.sel(last), expected, atol=1e-4)
    unpatched = found.sel(run="unpatched", **last)["answer_log_prob"]
    # a patch that does nothing would pass all of the above
    assert abs(patched.sel(last) - unpatched).max() > 1e-3


@pytest.mark.parametrize("site", ["resid_post", "v", "q", "resid_mid", "z", "result", "embed"])
@pytest.mark.parametrize("intervention", ["resample", "mean", "zero"])
def test_the_end_of_a_patched_run_is_the_value_of_the_sweep(site: str, intervention: Any) -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    if intervention == "mean":
        intervention = Mean(reference=reference_pairs("tiny:llama"))
    layer = None if site == "embed" else 1
    head = 1 if site in ("q", "v", "z", "result") else None
    swept = patchsweep.sweep(
        bridge,
        pairs,
        site,
        "log_prob",
        direction="denoising",
        intervention=intervention,
        layers=None if layer is None else [layer],
        heads=None if head is None else [head],
        positions=[10],
        runner="hooked",
    )
    patch = Patch(site, layer, 10, head, intervention)
    found = lens(bridge, pairs, which="base", direction="denoising", patch=patch)
    end = found["answer_log_prob"].sel(run="patched", layer=2, point="resid_post", pos=16)
    np.testing.assert_allclose(end.values.item(), swept[site].values.item(), atol=1e-5)


def test_several_patches_act_in_one_run() -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    two = [Patch("resid_pre", 1, 10), Patch("z", 2, head=(0, 2), intervention="zero")]
    found = lens(bridge, pairs, patch=two, remove=("mlp", 2)).isel(pair=0)
    assert found.attrs["prompt"] == "corrupted"
    assert [patch["site"] for patch in attributes(found)["patches"]] == [
        "resid_pre",
        "z",
        "mlp_out",
    ]
    assert attributes(found)["patches"][1]["head"] == [0, 2]
    pair = pairs[0]

    def zero(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x = x.clone()
        heads = x if x.ndim == 4 else x.view(*x.shape[:2], -1, bridge.cfg.d_head)
        heads[:, :, [0, 2]] = 0
        return x

    hooks = [
        by_hand(bridge, "hook_resid_pre", two[0], pair),
        ("blocks.2.attn.hook_z", zero),
        ("blocks.2.hook_mlp_out", lambda x, hook: x * 0),
    ]
    with torch.no_grad():
        logits = bridge.run_with_hooks(torch.tensor([pair.corrupted]), fwd_hooks=hooks)[0]
    expected = logits.log_softmax(-1)[:, pair.answer[0]].numpy()
    last = found["answer_log_prob"].sel(run="patched", layer=2, point="resid_post")
    np.testing.assert_allclose(last, expected, atol=1e-4)


def test_a_position_that_a_shorter_prompt_lacks_is_not_patched_there() -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, f"Then {CLEAN}"],
        corrupted=[CORRUPTED, f"Then {CORRUPTED}"],
        answers=[(" Mary", " John")] * 2,
    )
    longest = max(len(pair) for pair in pairs) - 1
    patch = Patch("mlp_out", 1, longest, intervention="zero")
    found = lens(bridge, pairs, patch=patch)["answer_log_prob"]
    change = abs(found.sel(run="patched") - found.sel(run="unpatched"))
    largest = change.max(["layer", "point", "pos"]).values
    assert largest[0] == 0
    assert largest[1] > 1e-3


# Which sublayer


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_sublayers_equal_removals_one_by_one(family: str) -> None:
    bridge, pairs = model(f"tiny:{family}"), demo_pairs(f"tiny:{family}")
    found = sublayers(bridge, pairs).isel(pair=0)
    for kind in ("attn", "mlp"):
        for layer in range(3):
            ds = lens(bridge, pairs, remove=(kind, layer))
            ds = ds.isel(pair=0, layer=-1, point=-1, pos=-1)
            without = found["without"].sel(sublayer=kind, layer=layer)
            for run, mine in (("unpatched", found["whole"]), ("patched", without)):
                for metric in ("prob", "log_prob", "rank"):
                    expected = ds[f"answer_{metric}"].sel(run=run)
                    np.testing.assert_allclose(mine.sel(metric=metric), expected, atol=1e-4)
                gap = (ds["answer_log_prob"] - ds["wrong_log_prob"]).sel(run=run)
                np.testing.assert_allclose(mine.sel(metric="logit_diff"), gap, atol=1e-4)
    assert abs(found["without"] - found["whole"]).sel(metric="log_prob").min() > 0


def test_every_name_of_a_prompt_leads_to_it() -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    for arguments, prompt in (
        ({}, "clean"),
        ({"which": "base"}, "clean"),
        ({"which": "source", "direction": "noising"}, "corrupted"),
        ({"which": "source", "direction": "denoising"}, "clean"),
        ({"which": "clean", "direction": "denoising"}, "clean"),
        ({"which": "corrupted"}, "corrupted"),
        ({"patch": Patch("z", 1)}, "corrupted"),
        ({"patch": Patch("z", 1), "which": "clean"}, "clean"),
        ({"patch": Patch("z", 1, intervention="zero")}, "clean"),
        ({"remove": ("mlp", 1)}, "clean"),
    ):
        assert describe(bridge, pairs, **arguments)["prompt"] == prompt


def test_description_is_what_the_results_carry() -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    arguments: dict[str, Any] = {
        "patch": Patch("z", 1, 3, (0, 1)),
        "remove": ("mlp", 2),
        "top": 2,
        "config": {"seed": 3},
    }
    told = describe(bridge, pairs, **arguments)
    assert told == attributes(lens(bridge, pairs, **arguments))
    assert told["kind"] == "lens"
    assert json.loads(json.dumps(told)) == told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"which": "left"}, "'clean' or 'corrupted'"),
        ({"direction": "up"}, "denoising"),
        ({"top": 0}, "top=0"),
        ({"remove": "mlp"}, "no sublayer"),
        ({"remove": ("norm", 1)}, "no sublayer"),
        ({"remove": ("mlp", 3)}, "no such layer"),
        ({"patch": "z"}, "is no Patch"),
        ({"patch": Patch("z", head=1)}, "needs a layer"),
        ({"patch": Patch("z", 3)}, "past the last layer"),
        ({"patch": Patch("z", 1, head=99)}, "past the last one"),
        ({"patch": Patch("mlp_out", 1, head=0)}, "has no heads"),
        ({"patch": Patch("z", 1, pos=17)}, "past the last position"),
        ({"patch": Patch("z", 1, pos="verb")}, "'verb'"),
        ({"patch": Patch("pattern_cell", 1)}, "site='pattern'"),
    ],
)
def test_mistakes_are_named_before_any_forward(
    arguments: dict[str, Any], words: str, monkeypatch: Any
) -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    monkeypatch.setattr(TransformerBridge, "forward", lambda *_, **k: pytest.fail("a run"))
    with pytest.raises((PlanError, ConfigError), match=words):
        lens(bridge, pairs, **arguments)


def test_a_model_that_reads_its_stream_otherwise_is_refused(monkeypatch: Any) -> None:
    bridge = model("tiny:gemma2")
    monkeypatch.setattr(bridge.adapter, "apply_output_logits_transform", lambda x: x.flip(-1))
    with pytest.raises(MethodError, match="mislead"):
        lens(bridge, demo_pairs("tiny:gemma2"))


def test_answers_that_share_a_token_are_read_where_they_differ() -> None:
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=["When John and Mary went to the", "When John and Mary went to the"],
        corrupted=["When John and Paul went to the", "When John and Paul went to the"],
        answers=[(" Anna Paul", " Anna Tom"), (" Anna Paul", " Tom Paul")],
        multi_token=True,
    )
    assert [pair.differ for pair in pairs] == [1, 0]
    ds = lens(bridge, pairs)
    assert ds["answer_pos"].values.tolist() == [len(pairs[0]), len(pairs[1]) - 1]
    for number, pair in enumerate(pairs):
        shared = pair.answer[: pair.differ]
        with torch.no_grad():
            logits = bridge(torch.tensor([[*pair.clean, *shared]]))[0, -1].float()
        expected = logits.log_softmax(dim=-1)
        at = ds.isel(run=0, layer=-1, point=2).sel(pair=number, pos=int(ds["answer_pos"][number]))
        for kind, ids in (("answer", pair.answer), ("wrong", pair.wrong_answer)):
            assert float(at[f"{kind}_log_prob"]) == pytest.approx(
                float(expected[ids[pair.differ]]), abs=1e-4
            )
        assert float(at["answer_log_prob"]) != float(at["wrong_log_prob"])
