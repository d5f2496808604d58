"""A bridge must compute the logits of the model that it wraps, and a model must be causal."""

from __future__ import annotations

import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ModelError
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import tiny_model
from patchsweep.models.wrapping import known_wrapping, state_of
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, model
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from tools.architectures.configs import causal_architectures
from tools.architectures.table import tiny_bridge


class ScaledNorm(nn.LayerNorm):
    """A norm of the user's own, for which the bridge computes a plain LayerNorm."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.3 * super().forward(input)


def model_with_own_norm():
    hf_model, tokenizer = tiny_model("gpt2")
    for block in hf_model.transformer.h:
        block.ln_1.__class__ = ScaledNorm
    return hf_model, tokenizer


def pairs_of(bridge: TransformerBridge) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )


def test_a_norm_that_the_bridge_replaces_is_refused_on_loading() -> None:
    hf_model, tokenizer = model_with_own_norm()
    with pytest.raises(ModelError, match="computes other logits than the Hugging Face model"):
        as_bridge("own-norm", hf_model, tokenizer)


@pytest.mark.parametrize("runner", ["auto", "hooked"])
def test_the_first_sweep_of_a_users_bridge_compares_it_with_its_model(runner) -> None:
    hf_model, tokenizer = model_with_own_norm()
    bridge = TransformerBridge.boot_transformers(
        "own-norm", hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
    )
    bridge.eval()
    with pytest.raises(ModelError, match="computes other logits than the Hugging Face model"):
        ps.sweep(bridge, pairs_of(bridge), "resid_pre", runner=runner)


def test_a_users_bridge_of_a_known_model_is_swept() -> None:
    hf_model, tokenizer = tiny_model("llama")
    bridge = TransformerBridge.boot_transformers(
        "own", hf_model=hf_model, tokenizer=tokenizer, dtype=hf_model.dtype
    )
    bridge.eval()
    assert known_wrapping(bridge) is None
    ds = ps.sweep(bridge, pairs_of(bridge), "resid_pre", layers=[1])
    assert attributes(ds)["provenance"]["runner"] == "packed"
    wrapping = known_wrapping(bridge)
    assert wrapping is not None
    assert wrapping.same


@pytest.mark.parametrize("runner", ["auto", "hooked"])
def test_a_model_that_looks_ahead_is_refused(runner) -> None:
    bridge = tiny_bridge("BertLMHeadModel")
    bridge.cfg.attention_dir = "causal"  # which it is not
    with pytest.raises(ModelError, match=r"not causal.*earlier positions"):
        ps.sweep(bridge, pairs_of(bridge), "resid_pre", layers=[1], runner=runner)


def test_state_changes_with_the_weights() -> None:
    bridge = ps.load_model("tiny:llama", device="cpu")
    before = state_of(bridge)
    bridge(torch.arange(5).unsqueeze(0))
    assert state_of(bridge) == before
    with torch.no_grad():
        bridge.original_model.lm_head.weight[3] *= 2
    assert state_of(bridge) != before
    assert known_wrapping(bridge) is None


def test_compatibility_mode_changes_the_state() -> None:
    bridge = ps.load_model("tiny:llama", device="cpu")
    before = state_of(bridge)
    bridge.enable_compatibility_mode(disable_warnings=True)
    assert state_of(bridge) != before


def test_loading_leaves_nothing_to_compare_again() -> None:
    wrapping = known_wrapping(model("tiny:gpt2"))
    assert wrapping is not None
    assert wrapping.same
    assert wrapping.causal


@pytest.mark.slow
@pytest.mark.parametrize("architecture", causal_architectures())
def test_every_architecture_keeps_its_logits_when_it_is_wrapped(architecture: str) -> None:
    try:
        bridge = tiny_bridge(architecture)
    except ModelError as error:
        if "computes other logits" in str(error):
            raise
        pytest.skip(str(error))
    except Exception as error:
        pytest.skip(f"cannot be built: {error}")
    wrapping = known_wrapping(bridge)
    assert wrapping is not None
    assert wrapping.change < 1e-5
    assert wrapping.causal == (architecture != "BertLMHeadModel")
