"""The lens equals TransformerLens's, and removing a write removes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from patchsweep.errors import MethodError, PlanError
from patchsweep.lens import lens
from patchsweep.pairs import PromptPairs
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_lens

# learned and rotary positions, sandwich norms with a soft-cap, experts
FAMILIES = ["gpt2", "llama", "gemma2", "gemma3", "mixtral", "opt"]


@pytest.mark.parametrize("which", ["base", "source"])
@pytest.mark.parametrize("family", FAMILIES)
def test_lens_equals_logit_lens(family: str, which: Any) -> None:
    name = f"tiny:{family}"
    bridge, pair = model(name), demo_pairs(name)[0]
    found = lens(bridge, demo_pairs(name), which=which, top=3).isel(pair=0)
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
    found = lens(bridge, demo_pairs(name), which="source")
    assert np.isnan(found["answer_prob"].sel(point="resid_mid")).all()  # parallel blocks
    with torch.no_grad():
        expected = bridge(torch.tensor([pair.clean]))[0].log_softmax(-1)[:, pair.answer[0]]
    last = found["answer_log_prob"].sel(pair=0, layer=2, point="resid_post")
    np.testing.assert_allclose(last, expected.numpy(), atol=1e-4)
    assert found["token"].values[0].tolist() == list(pair.clean_tokens)


@pytest.mark.parametrize("remove", [("mlp", 1), ("attn", 1), ("mlp", 2)])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt"])
def test_removed_write_equals_a_hook(family: str, remove: Any) -> None:
    name = f"tiny:{family}"
    bridge, pair = model(name), demo_pairs(name)[0]
    found = lens(bridge, demo_pairs(name), remove=remove).isel(pair=0)
    whole = lens(bridge, demo_pairs(name)).isel(pair=0)
    kind, layer = remove
    hook = (f"blocks.{layer}.hook_{kind}_out", lambda x, hook: x * 0)
    with torch.no_grad():
        logits = bridge.run_with_hooks(torch.tensor([pair.corrupted]), fwd_hooks=[hook])[0]
    expected = logits.log_softmax(-1)[:, pair.answer[0]].numpy()
    last = {"layer": 2, "point": "resid_post"}
    np.testing.assert_allclose(found.sel(last)["answer_log_prob"], expected, atol=1e-4)
    name = "answer_log_prob"
    assert np.abs(found.sel(last)[name] - whole.sel(last)[name]).max() > 0.01
    before = {"layer": layer, "point": "resid_pre"}
    np.testing.assert_array_equal(
        found.sel(before)["answer_log_prob"], whole.sel(before)["answer_log_prob"]
    )
    if family != "gpt_neox":
        ends = ("resid_pre", "resid_mid") if kind == "attn" else ("resid_mid", "resid_post")
        a, b = (found.sel(layer=layer, point=point)["top_prob"] for point in ends)
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_pairs_of_several_lengths_equal_each_alone(monkeypatch: Any) -> None:
    bridge = model("tiny:llama")
    clean, corrupted = [CLEAN, f"Then {CLEAN}"], [CORRUPTED, f"Then {CORRUPTED}"]
    pairs = PromptPairs.from_strings(
        bridge, clean=clean, corrupted=corrupted, answers=[(" Mary", " John")] * 2
    )
    together = lens(bridge, pairs)
    monkeypatch.setattr("patchsweep.lens.CHUNK_BYTES", 7 * 4 * bridge.cfg.d_vocab)
    for i in range(2):
        alone = lens(bridge, PromptPairs((pairs[i],)))
        n_pos = alone.sizes["pos"]
        for name in ("answer_log_prob", "wrong_log_prob", "top_prob"):
            mine = together[name][i, :, :, :n_pos]
            np.testing.assert_allclose(mine, alone[name][0], atol=1e-4)
        assert (together["top_token"][i, :, :, n_pos:] == "").all()
        assert np.isnan(together["answer_prob"][i, :, :, n_pos:]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"which": "clean"}, "'base' or 'source'"),
        ({"direction": "up"}, "denoising"),
        ({"top": 0}, "top=0"),
        ({"remove": "mlp"}, "no sublayer"),
        ({"remove": ("norm", 1)}, "no sublayer"),
        ({"remove": ("mlp", 3)}, "no such layer"),
    ],
)
def test_mistakes_are_named_before_any_forward(
    arguments: dict[str, Any], words: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("patchsweep.lens._run", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(PlanError, match=words):
        lens(model("tiny:llama"), demo_pairs("tiny:llama"), **arguments)


def test_a_model_that_reads_its_stream_otherwise_is_refused(monkeypatch: Any) -> None:
    bridge = model("tiny:gemma2")
    monkeypatch.setattr(bridge.adapter, "apply_output_logits_transform", lambda x: x.flip(-1))
    with pytest.raises(MethodError, match="mislead"):
        lens(bridge, demo_pairs("tiny:gemma2"))
