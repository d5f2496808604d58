"""Quantised models: right where their modules take each row by itself, refused elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ConfigError, MethodError, ModelError
from patchsweep.models.load import as_bridge
from patchsweep.models.quantised import first_packed
from patchsweep.models.tiny import tiny_model
from patchsweep.spec.spec import model_shape
from subjects import CLEAN, CORRUPTED
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge


class Linear4bit(nn.Linear):
    """A stand-in for bitsandbytes's: two weights in a byte, multiplied in the input's dtype."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.scale = float(plain.weight.detach().abs().max()) / 7
        codes = (plain.weight / self.scale).round().clamp(-7, 7).to(torch.int64) + 8
        packed = (codes.view(-1, 2) * torch.tensor([16, 1])).sum(dim=1).to(torch.uint8)
        self.weight = nn.Parameter(packed.view(-1, 1), requires_grad=False)

    def plain_weight(self) -> Tensor:
        codes = torch.stack([self.weight // 16, self.weight % 16], dim=-1).flatten()
        return ((codes.float() - 8) * self.scale).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.plain_weight().to(x.dtype))


class Linear8bitLt(nn.Linear):
    """A stand-in for bitsandbytes's int8 layer, with its threshold of outliers."""

    def __init__(self, plain: nn.Linear, threshold: float) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight, self.state = plain.weight, SimpleNamespace(threshold=threshold)


class FP8Linear(nn.Linear):
    """A stand-in for transformers' layer: weights of 8 bits, with a scale."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.weight = nn.Parameter((plain.weight * 16).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.tensor(1 / 16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.weight_scale_inv.to(x.dtype))


def quantised(kind: Any, dtype: torch.dtype = torch.float32, **arguments: Any) -> TransformerBridge:
    """tiny:llama with every linear layer of its blocks quantised."""
    model, tokenizer = tiny_model("llama")
    model.to(dtype)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, child in [*parent.named_children()]:
                if isinstance(child, nn.Linear):
                    setattr(parent, name, kind(child.float(), **arguments))
    return as_bridge("tiny-llama", model, tokenizer)


def _pairs(bridge: TransformerBridge) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )


def test_four_bits_are_swept_as_the_weights_that_they_stand_for() -> None:
    bridge = quantised(Linear4bit)
    model, tokenizer = tiny_model("llama")
    layers = zip(model.model.layers, bridge.blocks, strict=True)
    with torch.no_grad():
        for plain, packed in layers:
            for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                _copy(plain, packed.original_component, path)
            for path in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
                _copy(plain, packed.original_component, path)
    plain = as_bridge("tiny-llama", model, tokenizer)
    method = ["exact", "atp"]
    found, expected = (
        ps.sweep(m, _pairs(m), ["z", "mlp_out"], method=method) for m in (bridge, plain)
    )
    assert "passes the self-test" in str(found.attrs["provenance"])
    for name in ("z", "mlp_out", "z_atp", "mlp_out_atp"):
        assert float(np.nanmax(expected[name]) - np.nanmin(expected[name])) > 0.01
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)
    assert model_shape(bridge).block_parameters == model_shape(plain).block_parameters


def _copy(plain: nn.Module, packed: nn.Module, path: str) -> None:
    named = {
        name.replace("_original_component.", ""): module for name, module in packed.named_modules()
    }
    found = named[path]
    layer = found if isinstance(found, Linear4bit) else found.original_component
    plain.get_submodule(path).weight.copy_(layer.plain_weight())


class WithoutGradient(Linear4bit):
    """As a layer whose kernel has no backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize("method", ["atp", "ig_inputs"])
def test_kernels_without_gradients_are_refused_by_attribution(method: str) -> None:
    bridge = quantised(WithoutGradient)
    with pytest.raises(MethodError, match=r"layers.0.*q_proj is a WithoutGradient.*no gradient"):
        ps.sweep(bridge, _pairs(bridge), "z", method=method)
    ps.sweep(bridge, _pairs(bridge), "z", layers=[2])  # exact values need none


def test_packed_weights_have_no_bf16_products() -> None:
    bridge = quantised(Linear4bit)
    words = r"precision=bf16 .*layers.0.*q_proj is a Linear4bit with packed weights \(uint8\)"
    with pytest.raises(ConfigError, match=words):
        ps.sweep(bridge, _pairs(bridge), "z", precision="bf16", runner="packed")


def test_packed_weights_are_computed_with_as_they_are() -> None:
    bridge = quantised(Linear4bit, torch.bfloat16)
    ds = ps.sweep(bridge, _pairs(bridge), "z", layers=[1], runner="packed")
    assert '"compute_dtype": "bfloat16"' in ds.attrs["provenance"]
    with pytest.raises(
        ConfigError, match=r"compute_dtype=float32 .*Linear4bit.*compute_dtype=model"
    ):
        ps.sweep(bridge, _pairs(bridge), "z", compute_dtype="float32")


@pytest.mark.parametrize("method", ["exact", "atp"])
def test_int8_with_outliers_is_refused(method: str) -> None:
    bridge = quantised(Linear8bitLt, threshold=6.0)
    with pytest.raises(ModelError, match=r"layers.0.*Linear8bitLt.*over all rows.*NF4"):
        ps.sweep(bridge, _pairs(bridge), "z", method=method)


def test_int8_without_outliers_takes_each_row_by_itself() -> None:
    bridge = quantised(Linear8bitLt, threshold=0.0)
    ps.sweep(bridge, _pairs(bridge), "z", layers=[2], runner="packed")


def test_fp8_runs_in_packed_batches_alone() -> None:
    bridge = quantised(FP8Linear)
    found = first_packed(bridge)
    assert found is not None
    assert found.dtype == torch.float8_e4m3fn
    ps.sweep(bridge, _pairs(bridge), "z", layers=[1], runner="packed")
    for runner in ("auto", "hooked"):
        with pytest.raises(ConfigError, match=r"float8_e4m3fn.*use runner=packed"):
            ps.sweep(bridge, _pairs(bridge), "z", layers=[1], runner=runner)
    with pytest.raises(ConfigError, match=r"FP8Linear with packed weights \(float8_e4m3fn\)"):
        ps.sweep(bridge, _pairs(bridge), "z", precision="bf16", runner="packed")
