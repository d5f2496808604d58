"""Leaner layers give what the model's own give; bf16 products, padded and gated, stay close."""

from __future__ import annotations

import pytest
import torch
from patchsweep.forward.fused_layers import GatedMLP, RMSNorm, leaner
from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.runners.packed.bf16 import use_bf16_products
from subjects import model
from torch import nn
from transformers.models.llama import modeling_llama as llama
from transformers.models.qwen2 import modeling_qwen2 as qwen2

CONFIG = llama.LlamaConfig(
    hidden_size=48, intermediate_size=80, num_attention_heads=3, num_key_value_heads=1, head_dim=16
)


def _own_and_lean(own: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`own` with random weights, and a module of its leaner class that shares them."""
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.normal_(std=0.3)
    lean = leaner(type(own)).__new__(leaner(type(own)))
    lean.__dict__.update(own.__dict__)
    return own, lean


@pytest.mark.parametrize(
    "own",
    [llama.LlamaRMSNorm(48), qwen2.Qwen2RMSNorm(48), llama.LlamaMLP(CONFIG)],
    ids=lambda module: type(module).__name__,
)
def test_norms_differ_in_the_last_bits_at_most_and_gates_not_at_all(own: nn.Module) -> None:
    own, lean = _own_and_lean(own)
    assert isinstance(lean, RMSNorm | GatedMLP)
    x = torch.randn(1, 5, 48) * torch.tensor([1e-6, 1e-2, 1, 1e3, 1e6]).view(5, 1)
    tolerance = 1e-6 if isinstance(lean, RMSNorm) else 0.0
    with torch.no_grad():
        torch.testing.assert_close(lean(x), own(x), rtol=tolerance, atol=0)
    for each in (x.bfloat16(), x.double()):
        own.to(each.dtype)
        with torch.no_grad():
            assert torch.equal(lean(each), own(each))


@pytest.mark.parametrize("module", [llama, qwen2], ids=["llama", "qwen2"])
@pytest.mark.parametrize("axis", [1, 2])
def test_rotary_positions_differ_in_the_last_bit_at_most(module, axis: int) -> None:
    attention = module.LlamaAttention if module is llama else module.Qwen2Attention
    lean = leaner(attention)
    assert lean is not attention
    rotate = lean.forward.__globals__["apply_rotary_pos_emb"]
    own = module.apply_rotary_pos_emb
    q, k = torch.randn(1, 7, 3, 16), torch.randn(1, 7, 1, 16)
    if axis == 1:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    angle = torch.randn(1, 7, 8).repeat(1, 1, 2)
    tables = angle.cos(), angle.sin()
    with torch.no_grad():
        for got, want in zip(
            rotate(q, k, *tables, unsqueeze_dim=axis),
            own(q, k, *tables, unsqueeze_dim=axis),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        mixed = rotate(q.bfloat16(), k.bfloat16(), *tables, unsqueeze_dim=axis)[0]
        assert torch.equal(mixed, own(q.bfloat16(), k.bfloat16(), *tables, unsqueeze_dim=axis)[0])


def test_where_gradients_are_taken_the_models_own_forward_runs() -> None:
    for module in (llama.LlamaRMSNorm(48), llama.LlamaMLP(CONFIG)):
        own, lean = _own_and_lean(module)
        x = torch.randn(1, 5, 48, requires_grad=True)
        grads = [torch.autograd.grad(each(x).square().sum(), x)[0] for each in (own, lean)]
        assert torch.equal(*grads)


class ScaledNorm(llama.LlamaRMSNorm):
    """Nearly Llama's: the fourth power instead of the square."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(4).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


@pytest.mark.parametrize("cls", [nn.Linear, nn.LayerNorm, ScaledNorm])
def test_other_layers_stay_as_they_are(cls: type[nn.Module]) -> None:
    assert leaner(cls) is cls


def test_a_replica_takes_leaner_layers_and_the_bridge_keeps_its_own() -> None:
    bridge = model("tiny:llama")
    unwrapped = UnwrappedModel(bridge)
    kinds = [type(module) for module in unwrapped.blocks[0].modules()]
    assert sum(issubclass(kind, RMSNorm) for kind in kinds) == 2
    assert sum(issubclass(kind, GatedMLP) for kind in kinds) == 1
    assert not any(
        isinstance(module, RMSNorm | GatedMLP) for module in bridge.original_model.modules()
    )


def _mlp(kind: str = "tiny:llama") -> tuple[nn.Module, nn.Module]:
    """The first MLP of an unwrapped model, and one whose products are in bf16."""
    exact, low = UnwrappedModel(model(kind)).blocks[0], UnwrappedModel(model(kind)).blocks[0]
    use_bf16_products([low])
    return exact.mlp, low.mlp


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 63, 64, 65, 700])
def test_bf16_products_of_any_number_of_rows_are_close_to_exact(n: int) -> None:
    exact, low = _mlp()
    x = torch.randn(1, n, exact.gate_proj.in_features)
    want = exact(x)
    got = low(x)
    assert got.shape == want.shape
    assert got.dtype == torch.float32
    assert bool(torch.isfinite(got).all())
    error = (got - want).abs().max() / want.abs().max()
    assert 1e-5 < error < 0.02
    # rows do not see each other, nor what fills the last ones up
    alone = low(x[:, :1])
    torch.testing.assert_close(got[:, :1], alone, atol=0.01 * float(want.abs().max()), rtol=0)


@torch.no_grad()
def test_gates_within_products_are_as_exact_as_gates_in_fp32() -> None:
    exact, fused = _mlp()
    _, parts = _mlp()
    del parts.forward  # its linear layers stay in bf16, the gate is applied between them
    x = torch.randn(1, 512, exact.gate_proj.in_features)
    want = exact(x)
    errors = [float((each(x) - want).square().mean()) for each in (fused, parts)]
    assert errors[0] < 1.1 * errors[1]


@torch.no_grad()
def test_a_hook_before_the_last_product_is_heard_within_a_fused_gate() -> None:
    _, low = _mlp()
    x = torch.randn(1, 70, low.gate_proj.in_features)

    def clear(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        assert args[0].shape == (1, 70, low.down_proj.in_features)
        args[0][:, 3] = 0

    handle = low.down_proj.register_forward_pre_hook(clear)
    found = low(x)
    handle.remove()
    assert float(found[:, 3].abs().max()) == 0
    assert torch.equal(found[:, 4:], low(x)[:, 4:])
