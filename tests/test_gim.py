"""GIM and IFR: each rule alone against its formula, the whole against raw modules with hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.circuits.scores import importance
from patchsweep.attribution.gim import HalvedProducts, TemperedSoftmax
from patchsweep.attribution.relp import frozen_norms, is_activation
from patchsweep.errors import MethodError
from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.models.tiny import tiny_model
from subjects import demo_pairs, model
from torch import Tensor, nn
from transformers import AttentionInterface

# --- each rule alone ---


def test_the_tempered_softmax_has_the_gradient_of_a_softmax_at_two() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    with TemperedSoftmax():
        p = x.softmax(dim=-1)
    torch.testing.assert_close(p, torch.softmax(x.detach(), dim=-1))
    (found,) = torch.autograd.grad(p, x, g)
    (at_two,) = torch.autograd.grad(torch.softmax(x / 2, dim=-1), x, g)
    torch.testing.assert_close(found, 2 * at_two)  # the factor 1/T of the chain rule is left out
    (plain,) = torch.autograd.grad(torch.softmax(x, dim=-1), x, g)
    assert not torch.allclose(found, plain, rtol=0.1)


def test_a_softmax_that_is_not_attentions_keeps_its_gradient() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    with TemperedSoftmax():
        p = x.softmax(dim=-1)
    g = torch.randn(4, 5)
    (found,) = torch.autograd.grad(p, x, g)
    (plain,) = torch.autograd.grad(torch.softmax(x, dim=-1), x, g)
    torch.testing.assert_close(found, plain)


def test_factors_get_half_a_query_and_a_key_a_quarter() -> None:
    q, k, v = (torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    weight = torch.randn(4, 4, dtype=torch.float64)

    def output() -> Tensor:
        return (((q @ weight) @ k.transpose(-1, -2)) @ v).sum()

    with HalvedProducts():
        halved = output()
    assert halved.item() == pytest.approx(output().item())
    found = torch.autograd.grad(halved, [q, k, v])
    plain = torch.autograd.grad(output(), [q, k, v])
    for part, ours, theirs in zip((0.25, 0.25, 0.5), found, plain, strict=True):
        torch.testing.assert_close(ours, part * theirs)


def test_two_sides_of_a_gate_get_half() -> None:
    a, b = (torch.randn(5, requires_grad=True) for _ in "ab")
    with HalvedProducts():
        out = (torch.nn.functional.silu(a) * b).sum()
    found = torch.autograd.grad(out, [a, b])
    plain = torch.autograd.grad((torch.nn.functional.silu(a) * b).sum(), [a, b])
    for ours, theirs in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, theirs / 2)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_frozen_norms_have_a_constant_scale(family: str) -> None:
    plain = UnwrappedModel(model(f"tiny:{family}"))
    norm = plain.model.get_submodule("transformer.ln_f" if family == "gpt2" else "model.norm")
    x = torch.randn(1, 3, 32, requires_grad=True)
    g = torch.randn(1, 3, 32)
    with frozen_norms(plain):
        (found,) = torch.autograd.grad(norm(x), x, g)
    (wanted,) = torch.autograd.grad(detached(norm, x), x, g)
    torch.testing.assert_close(found, wanted)


# --- the whole, on raw modules ---


def detached(norm: nn.Module, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt().detach() * norm.weight
    return y + norm.bias if isinstance(norm, nn.LayerNorm) else y


def scaled(x: Tensor, factor: float) -> Tensor:
    """x with `factor` of its gradient."""
    return x * factor + (x * (1 - factor)).detach()


def oracle_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float = 1.0, **kw: Any
) -> tuple[Tensor, None]:
    q, k, v = scaled(q, 0.25), scaled(k, 0.25), scaled(v, 0.5)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scaling or q.shape[-1] ** -0.5)
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(hidden, float("-inf"))
    warm = 2 * torch.softmax(scores / 2, dim=-1)
    pattern = torch.softmax(scores, dim=-1).detach() + warm - warm.detach()
    return (pattern @ v).transpose(1, 2), None


AttentionInterface.register("gim_oracle", oracle_attention)  # type: ignore[no-untyped-call]


@contextmanager
def gim_by_hooks(hf: Any) -> Iterator[None]:
    hf.config._attn_implementation = "gim_oracle"
    with ExitStack() as stack:
        for name, module in hf.named_modules():
            if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
                hook = module.register_forward_hook(lambda m, args, out: detached(m, args[0]))
                stack.callback(hook.remove)
            elif name.endswith(("gate_proj", "up_proj")):
                hook = module.register_forward_hook(lambda m, args, out: scaled(out, 0.5))
                stack.callback(hook.remove)
        yield


def gradients(family: str, points: list[str]) -> tuple[Any, list[Tensor], list[Tensor], Any]:
    """The raw model, source minus base and GIM's gradient at the outputs of `points`, the pair."""
    hf, _ = tiny_model(family)
    hf.eval()
    pair = demo_pairs(f"tiny:{family}")[0]
    seen: dict[str, list[Tensor]] = {name: [] for name in points}
    hooks = [
        hf.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen[name].append(out)
        )
        for name in points
    ]
    with gim_by_hooks(hf):
        logits = hf(torch.tensor([pair.corrupted])).logits[0, -1]
        hf(torch.tensor([pair.clean]))
    for hook in hooks:
        hook.remove()
    diff = logits[pair.answer[0]] - logits[pair.wrong_answer[0]]
    grads = torch.autograd.grad(diff, [seen[name][0] for name in points])
    changes = [(source - base).detach() for base, source in seen.values()]
    return hf, changes, list(grads), pair


POINTS = {
    "gpt2": ("transformer.wte", "transformer.h.{}.mlp"),
    "llama": ("model.embed_tokens", "model.layers.{}.mlp"),
    "qwen3": ("model.embed_tokens", "model.layers.{}.mlp"),
}


@pytest.mark.parametrize("family", POINTS)
def test_gim_equals_hooks_on_raw_modules(family: str) -> None:
    embed, mlp = POINTS[family]
    names = [embed, *(mlp.format(layer) for layer in range(3))]
    _, changes, grads, _ = gradients(family, names)
    wanted = [(c * g).sum(-1)[0].numpy() for c, g in zip(changes, grads, strict=True)]
    ds = ps.sweep(
        model(f"tiny:{family}"), demo_pairs(f"tiny:{family}")[:1], ["resid_pre", "mlp_out"],
        method=["gim", "atp", "relp"],
    )  # fmt: skip
    found = ds["resid_pre_gim"].values[0, 0]
    np.testing.assert_allclose(found[0], wanted[0], atol=1e-4)
    np.testing.assert_allclose(ds["mlp_out_gim"].values[0, 0], wanted[1:], atol=1e-4)
    assert np.abs(found).max() > 0.1
    for other in ("atp", "relp"):
        assert not np.allclose(found, ds[f"resid_pre_{other}"].values[0, 0], atol=1e-2)


def test_an_edge_under_gim_goes_through_its_readers_projection_and_frozen_norm() -> None:
    layer, head = 1, 3
    attention = f"model.layers.{layer}.self_attn"
    points = ["model.embed_tokens", f"{attention}.q_proj"]
    hf, changes, grads, _ = gradients("llama", points)
    rows = slice(8 * head, 8 * head + 8)
    at_norm = grads[1][..., rows] @ hf.get_submodule(f"{attention}.q_proj").weight[rows]
    found: list[Tensor] = []
    norm = hf.get_submodule(f"model.layers.{layer}.input_layernorm")
    hook = norm.register_forward_pre_hook(lambda m, args: found.append(args[0].detach()))
    hf(torch.tensor([demo_pairs("tiny:llama")[0].corrupted]))
    hook.remove()
    scale = (found[0].square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    wanted = float((changes[0] * at_norm * norm.weight * scale).sum().detach())
    ds = ps.edges(model("tiny:llama"), demo_pairs("tiny:llama")[:1], rules="gim")
    edge = ds["edge_gim"].sel(sender="embed", reader=f"a{layer}.h{head}.q").item()
    assert edge == pytest.approx(wanted, abs=1e-5)
    assert abs(edge) > 1e-4


@pytest.mark.parametrize("rules", ["gim", "relp"])
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "gemma2", "mixtral"])
def test_edges_add_up_to_the_same_method_at_their_sender(family: str, rules: str) -> None:
    name = f"tiny:{family}"
    ds = ps.edges(model(name), demo_pairs(name)[:1], rules=rules)
    nodes = ps.sweep(
        model(name), demo_pairs(name)[:1], ["z", "mlp_out"], positions="all", method=rules
    )
    summed = ds[f"edge_{rules}"].sum("reader")
    for layer in range(3):
        for head in range(4):
            wanted = nodes[f"z_{rules}"].values[0, 0, layer, head]
            assert summed.sel(sender=f"a{layer}.h{head}").item() == pytest.approx(wanted, abs=1e-4)
        wanted = nodes[f"mlp_out_{rules}"].values[0, 0, layer]
        assert summed.sel(sender=f"m{layer}").item() == pytest.approx(wanted, abs=1e-4)
    assert float(np.abs(summed).max()) > 0.1


# --- IFR ---


def test_importance_is_the_papers() -> None:
    parts, whole = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 5)
    found = importance(parts, whole)
    for i, j in np.ndindex(2, 4):
        near = [
            max(0.0, float(whole[i, j].abs().sum() - (whole[i, j] - x).abs().sum()))
            for x in parts[i, :, j]
        ]
        wanted = [x / sum(near) if sum(near) else 0.0 for x in near]
        assert found[i, :, j].tolist() == pytest.approx(wanted, abs=1e-6)
    assert importance(-whole.unsqueeze(1), whole).abs().sum() == 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_ifr_of_edges_and_nodes_equals_a_loop_over_the_bridge(family: str) -> None:
    name = f"tiny:{family}"
    bridge, pairs = model(name), demo_pairs(name)[:1]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([pairs[0].clean]))
    edges = ps.circuit_scores(bridge, pairs, method="ifr")
    nodes = ps.circuit_scores(bridge, pairs, level="nodes", method="ifr")
    assert edges.attrs["method"] == "ifr"
    assert (nodes.values <= 0).all()
    assert -1 - 1e-5 < np.nanmin(edges.values) < -0.1
    # the first reader has one sender, the MLPs' shares are of two parts
    assert edges.sel(sender="embed", reader="a0.h0.q").item() == pytest.approx(-1)
    for layer in range(3):
        before, mid, after = (
            cache[f"blocks.{layer}.hook_resid_{x}"][0] for x in ("pre", "mid", "post")
        )
        near = [
            (after.abs().sum(-1) - (after - x).abs().sum(-1)).clamp_min(0)
            for x in (after - mid, mid)
        ]
        wanted = float((near[0] / (near[0] + near[1])).mean())
        assert nodes.sel(node=f"m{layer}").item() == pytest.approx(-wanted, abs=1e-5)
        del before
    total = edges.sum("sender")
    assert total.sel(reader="logits").item() == pytest.approx(-1, abs=1e-4)
    embed = cache["blocks.0.hook_resid_pre"][0]
    mid = cache["blocks.0.hook_resid_mid"][0]
    if family == "llama":  # heads write without a bias or a norm
        z = cache["blocks.0.attn.hook_z"][0]
        w_o = (
            tiny_model("llama")[0].get_submodule("model.layers.0.self_attn.o_proj").weight.detach()
        )
        heads = [z[:, h] @ w_o[:, 8 * h : 8 * h + 8].T for h in range(4)]
        near = [(mid.abs().sum(-1) - (mid - x).abs().sum(-1)).clamp_min(0) for x in (embed, *heads)]
        wanted = float((near[3] / sum(near)).mean())
        assert edges.sel(sender="a0.h2", reader="m0").item() == pytest.approx(-wanted, abs=1e-5)
        assert nodes.sel(node="a0.h2").item() == pytest.approx(-wanted, abs=1e-5)


def test_wrong_rules_are_refused() -> None:
    bridge, pairs = model("tiny:gpt2"), demo_pairs("tiny:gpt2")[:1]
    with pytest.raises(MethodError, match="rules='lrp' is not known; use gim or relp"):
        ps.edges(bridge, pairs, rules="lrp")
    with pytest.raises(MethodError, match="leave steps out"):
        ps.edges(bridge, pairs, rules="gim", steps=5)
    with pytest.raises(MethodError, match="does not score edges"):
        ps.circuit_scores(bridge, pairs, method="atp_star")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_activation_functions_are_known_in_their_fused_form(family: str) -> None:
    plain = UnwrappedModel(model(f"tiny:{family}"))
    assert sum(map(is_activation, plain.model.modules())) == len(plain.blocks)
