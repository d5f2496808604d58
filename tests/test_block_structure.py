"""Whether blocks are parallel is read off their code, whatever their weights and inputs are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patchsweep import circuit, sweep
from patchsweep.analyses.circuits import edges, exact_edges
from patchsweep.errors import ModelError
from patchsweep.forward.block_structure import parallel_blocks
from patchsweep.forward.blockwise import Blocks
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import tiny_tokenizer
from plain import make_plain_and_bridge, pairs_for
from subjects import demo_pairs, model
from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge


class Threshold(nn.Module):
    """A ReLU by comparison, which makes 0 of NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 0, x, torch.zeros_like(x))


def silent_gpt2() -> TransformerBridge:
    """A sequential model whose attention gives nothing on two equal first tokens."""
    _, bridge = make_plain_and_bridge("GPT2LMHeadModel")
    layers = [m for m in bridge.original_model.modules() if hasattr(m, "c_fc")]
    with torch.no_grad():
        for name, weight in bridge.original_model.named_parameters():
            if "wte" in name:
                weight[0] = 0.0
            if "wpe" in name:
                weight[:2] = 0.0
            if "bias" in name or ("c_attn" in name and weight.ndim == 1):
                weight.zero_()
    for layer in layers:
        layer.act = Threshold().eval()
    return bridge


def test_attention_that_is_silent_on_the_probe_has_edges_to_its_mlp() -> None:
    bridge = silent_gpt2()
    blocks = Blocks(bridge)
    trace = blocks.trace(torch.zeros(1, 2, dtype=torch.long), [-1])
    assert all(float(trace.part(layer, "attn").abs().max()) == 0.0 for layer in range(3))
    assert parallel_blocks(blocks) == (False, False, False)
    heads = [f"a1.h{head}" for head in range(4)]
    found = edges(bridge, pairs_for(bridge)).edge_eap.sel(reader="m1", sender=heads)
    assert bool(found.notnull().all())
    exact = exact_edges(bridge, pairs_for(bridge), [("a1.h2", "m1")])
    assert abs((exact.edge - exact.base_metric).item()) > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "mixtral", "opt"])
def test_sequential_blocks_are_sequential(family: str) -> None:
    assert parallel_blocks(Blocks(model(f"tiny:{family}"))) == (False, False, False)


@pytest.mark.parametrize(
    "architecture", ["GPTNeoXForCausalLM", "CohereForCausalLM", "PhiForCausalLM"]
)
def test_parallel_blocks_are_parallel(architecture: str) -> None:
    _, bridge = make_plain_and_bridge(architecture)
    assert set(parallel_blocks(Blocks(bridge))) == {True}


@pytest.mark.parametrize("norm", ["LN", "RMSPre", None])
def test_native_bridges_are_refused_in_one_line(norm: str | None) -> None:
    tokenizer = tiny_tokenizer()
    config = TransformerBridgeConfig(
        d_model=32, d_head=8, n_layers=2, n_heads=4, n_ctx=64, d_mlp=48, act_fn="relu",
        d_vocab=len(tokenizer), normalization_type=norm, seed=0, architecture=None,
    )  # fmt: skip
    bridge = TransformerBridge.boot_native(config, tokenizer=tokenizer).eval()
    pairs = demo_pairs("tiny:llama")  # of the same tokenizer
    calls = {
        "pairs": lambda: pairs_for(bridge),
        "sweep": lambda: sweep(bridge, pairs, "z"),
        "edges": lambda: edges(bridge, pairs),
        "exact_edges": lambda: exact_edges(bridge, pairs, ["m0->logits"]),
        "circuit": lambda: circuit(bridge, pairs),
    }
    for call in calls.values():
        with pytest.raises(ModelError, match="no model of transformers") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_norms_that_are_identities_have_edges() -> None:
    """Compiled models have no norms; edges then sum to what their senders' attribution is."""
    plain, _ = make_plain_and_bridge("LlamaForCausalLM")
    for block in plain.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    plain.model.norm = nn.Identity()
    with torch.no_grad():  # without norms the stream would grow from block to block
        plain.model.embed_tokens.weight *= 0.003
    bridge = as_bridge("no norms", plain, tiny_tokenizer())
    pairs = pairs_for(bridge)
    scores = edges(bridge, pairs).edge_eap[0, 0]
    exact = exact_edges(bridge, pairs, [("m0", "logits"), ("a1.h0", "logits")])
    effects = (exact.edge - exact.base_metric).values[0, 0]
    estimates = [float(scores.sel(sender=u, reader="logits")) for u in ("m0", "a1.h0")]
    # without a final norm an edge to the logits is linear
    np.testing.assert_allclose(effects, estimates, atol=1e-4 * max(1.0, np.abs(effects).max()))
    assert np.abs(effects).min() > 1e-3
