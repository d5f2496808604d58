"""What a model asks of its attention, and of its outputs, is honoured or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.circuits import edges
from patchsweep.errors import ConfigError, MethodError, PatchsweepError
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models import load_model
from plain import make_plain_and_bridge, pairs_for, plain_and_bridge
from subjects import demo_pairs, model
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
)

OUTPUTS = ("output_router_logits", "output_hidden_states", "output_attentions")


@pytest.fixture(params=OUTPUTS)
def asking(request: pytest.FixtureRequest) -> TransformerBridge:
    """A mixture of experts whose config asks for more outputs than logits."""
    bridge = load_model("tiny:mixtral", device="cpu")
    setattr(bridge.original_model.config, request.param, True)
    return bridge


@pytest.mark.parametrize(
    "arguments",
    [{"runner": "packed"}, {"runner": "auto"}, {"method": "atp"}],
    ids=lambda arguments: next(iter(arguments.values())),
)
def test_more_outputs_change_no_sweep(asking: TransformerBridge, arguments: Any) -> None:
    pairs = demo_pairs("tiny:mixtral")
    found, expected = (
        ps.sweep(bridge, pairs, "z", layers=[1], positions=[9, 15], **arguments)
        for bridge in (asking, model("tiny:mixtral"))
    )
    for name in expected.data_vars:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)
    if arguments == {"runner": "auto"}:
        runner = found.patchsweep.attributes["provenance"]["runner"]
        assert runner == "packed"


def test_more_outputs_change_no_edge(asking: TransformerBridge) -> None:
    pairs = demo_pairs("tiny:mixtral")
    found, expected = (edges(b, pairs) for b in (asking, model("tiny:mixtral")))
    for name in expected.data_vars:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


class _Tempered(LlamaAttention):
    """Tells its attention function something that patchsweep has never heard of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, temperature=2.0, **kwargs)


class _Unmasked(LlamaAttention):
    """Attends in both directions: nobody gives it a mask."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "attention_mask": None})


class _OwnMask(LlamaAttention):
    """Sees every other token alone."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        n = hidden_states.shape[1]
        gap = torch.arange(n)[:, None] - torch.arange(n)
        mask = torch.where((gap >= 0) & (gap % 2 == 0), 0.0, float("-inf"))
        kwargs["attention_mask"] = mask.expand(1, 1, n, n)
        return super().forward(hidden_states, *args, **kwargs)


class _Slices(LlamaAttention):
    """Works on the mask before it hands it on."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **{**kwargs, "attention_mask": kwargs["attention_mask"][:1]})


class _Unwindowed(LlamaAttention):
    """Is told of a window that its mask does not have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, sliding_window=4, **kwargs)


def llama_with(attention: type[nn.Module]) -> TransformerBridge:
    _, bridge = make_plain_and_bridge("LlamaForCausalLM")
    for block in bridge.blocks:
        block.attn.original_component.__class__ = attention
    return bridge


REFUSED = [
    (_Tempered, "given temperature, which is not known"),
    (_Unmasked, "given no mask"),
    (_OwnMask, "a mask of its own making"),
    (_Slices, "its own code works on the attention mask"),
    (_Unwindowed, "its mask shows 17 of 17 tokens, and its attention is told of a window of 4"),
]


@pytest.mark.parametrize(("attention", "why"), REFUSED, ids=lambda x: getattr(x, "__name__", ""))
def test_what_attention_is_given_is_understood_or_refused(
    attention: type[nn.Module], why: str
) -> None:
    bridge = llama_with(attention)
    pairs = pairs_for(bridge)
    with pytest.raises(PatchsweepError, match=why):
        ps.sweep(bridge, pairs, "z", runner="packed", layers=[1])
    with pytest.raises(PatchsweepError, match=why):
        ps.sweep(bridge, pairs, "z", method="atp", layers=[1])
    with pytest.raises(MethodError, match=why.replace("17", r"\d+")):
        edges(bridge, pairs)


def test_attention_over_other_keys_than_the_tokens_is_refused() -> None:
    _, bridge = plain_and_bridge("DeepseekV4ForCausalLM")  # compressed keys beside the tokens'
    with pytest.raises(PatchsweepError, match=r"reads \d+ keys where the prompt has \d+ tokens"):
        ps.sweep(bridge, pairs_for(bridge), "resid_pre", runner="packed")


def test_blocks_that_hand_on_more_than_hidden_states_are_refused() -> None:
    _, bridge = plain_and_bridge("GlmMoeDsaForCausalLM")
    with pytest.raises(PatchsweepError, match="hand on more than hidden states"):
        ps.sweep(bridge, pairs_for(bridge), "resid_pre", runner="packed")


class _Weighed(LlamaDecoderLayer):
    """Takes one weight for each head, which the model hands to every block."""

    def forward(self, hidden_states: Tensor, *args: Any, weights: Tensor, **kwargs: Any) -> Tensor:
        out = super().forward(hidden_states, *args, **kwargs)
        return out + (weights[0] * torch.arange(weights.shape[1])).sum()


class _Weighing(LlamaModel):
    weights = torch.tensor([[0.1, 0.7, -0.4, 0.3]])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, weights=self.weights, **kwargs)


def test_a_tensor_of_as_many_heads_as_tokens_has_no_position_axis() -> None:
    _, bridge = make_plain_and_bridge("LlamaForCausalLM")
    bridge.original_model.model.__class__ = _Weighing
    for block in bridge.blocks:
        block.original_component.__class__ = _Weighed
    pairs = pairs_for(bridge, SHORT)
    assert len(pairs[0]) == _Weighing.weights.shape[1]
    found, expected = (
        ps.sweep(bridge, pairs, "z", runner=runner, layers=[0, 1])
        for runner in ("packed", "hooked")
    )
    np.testing.assert_allclose(found.z, expected.z, atol=1e-4)
    assert float(abs(found.z - found.base_metric).max()) > 0.1


SHORT = ("John gave Mary", "Mary gave Mary")


def test_chunked_attention_behind_a_short_first_pair_gets_the_hooked_runner() -> None:
    """Chunks of 6 tokens: the first pair fits into one, the second does not."""
    _, bridge = plain_and_bridge("Llama4ForCausalLM")
    long = (
        "When John and Mary went to the shops, John",
        "When John and Mary went to the shops, Mary",
    )
    pairs = pairs_for(bridge, SHORT, long)
    assert len(pairs[0]) <= 6 < len(pairs[1])
    auto = ps.sweep(bridge, pairs, "z", layers=[1])
    hooked = ps.sweep(bridge, pairs, "z", layers=[1], runner="hooked")
    np.testing.assert_allclose(auto.z, hooked.z, atol=1e-4)
    with pytest.raises(ConfigError, match="neither causal nor a sliding window"):
        ps.sweep(bridge, pairs, "z", layers=[1], runner="packed")
    with pytest.raises(PatchsweepError, match="neither causal nor a sliding window"):
        ps.sweep(bridge, pairs, "z", layers=[1], method="atp")


def test_unsupported_is_an_error_of_the_user_s() -> None:
    error = Unsupported("it is told in a dialect")
    assert isinstance(error, PatchsweepError)
    assert "runner=hooked" in str(error)
