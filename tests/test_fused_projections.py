"""q, k and v of one matrix are patched where plain modules make them: before rotary."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.models.tiny import tiny_model
from plain import logit_diff as plain_logit_diff
from plain import make_plain_and_bridge, pairs_for
from subjects import demo_pairs, model
from torch import Tensor, nn

FAMILIES = ("gpt_neox", "phi3", "gpt2")
TOLERANCE = 1e-4  # logits of order 10, fp32
HEADS, KV_HEADS, D_HEAD = 4, {"gpt_neox": 4, "phi3": 2, "gpt2": 4}, 8


@cache
def plain(family: str) -> nn.Module:
    """The model that `tiny:<family>` wraps, as transformers has it."""
    return tiny_model(family)[0]


def projection(family: str, layer: int) -> nn.Module:
    core = plain(family)
    if family == "gpt_neox":
        return core.gpt_neox.layers[layer].attention.query_key_value
    if family == "phi3":
        return core.model.layers[layer].self_attn.qkv_proj
    return core.transformer.h[layer].attn.c_attn


def heads_of(family: str, site: str, x: Tensor) -> Tensor:
    """A view `[..., head, d_head]` of what the projection gives, as each model's code cuts it."""
    if family == "gpt_neox":  # head by head: q, k, v
        start = D_HEAD * ("q", "k", "v").index(site)
        return x.unflatten(-1, (HEADS, 3 * D_HEAD))[..., start : start + D_HEAD]
    kv = KV_HEADS[family]
    first = {"q": 0, "k": HEADS, "v": HEADS + kv}[site]
    n = HEADS if site == "q" else kv
    return x[..., first * D_HEAD : (first + n) * D_HEAD].unflatten(-1, (n, D_HEAD))


def logit_diff(logits: Tensor, pairs: PromptPairs) -> Tensor:
    return logits[0, -1, pairs[0].answer[0]] - logits[0, -1, pairs[0].wrong_answer[0]]


def patched(
    family: str, site: str, cell: tuple[int, int, int], new: Callable[[Tensor], Tensor]
) -> float:
    """logit_diff of the clean run with one head's vector at one position replaced."""
    layer, pos, head = cell
    pairs = demo_pairs(f"tiny:{family}")

    def hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
        out = out.clone()
        vector = heads_of(family, site, out)[0, pos, head]
        vector.copy_(new(vector))
        return out

    handle = projection(family, layer).register_forward_hook(hook)
    with torch.no_grad():
        logits = plain(family)(torch.tensor([pairs[0].clean])).logits
    handle.remove()
    return float(logit_diff(logits, pairs))


@pytest.mark.parametrize("runner", ["packed", "hooked"])
@pytest.mark.parametrize("site", ["q", "k", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_constants_stand_before_rotary(family: str, site: str, runner: str) -> None:
    value = 0.7
    ds = ps.sweep(
        model(f"tiny:{family}"),
        demo_pairs(f"tiny:{family}"),
        site,
        intervention=value,
        positions=[2, 10, 15],
        runner=runner,
    )
    found, expected = [], []
    for layer, (i, pos), head in itertools.product((0, 2), enumerate((2, 10, 15)), (0, 1)):
        found.append(float(ds[site].values[0, 0, layer, i, head]))
        expected.append(patched(family, site, (layer, pos, head), lambda x: x * 0 + value))
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(np.array(expected) - ds.base_metric.item()).max() > 0.05


@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
def test_a_value_of_its_own_changes_nothing(family: str, site: str) -> None:
    ds = ps.sweep(
        model(f"tiny:{family}"),
        demo_pairs(f"tiny:{family}"),
        site,
        intervention=lambda site, layer, base, source: base,
        runner="packed",
    )
    assert float(abs(ds[site] - ds.base_metric).max()) < TOLERANCE


@pytest.mark.parametrize("site", ["q", "k", "v"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_takes_the_gradient_before_rotary(family: str, site: str) -> None:
    value, layer = 0.7, 1
    pairs = demo_pairs(f"tiny:{family}")
    ds = ps.sweep(
        model(f"tiny:{family}"), pairs, site, intervention=value, method="atp", layers=[layer]
    )
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, out: Tensor) -> None:
        out.retain_grad()
        kept.append(out)

    handle = projection(family, layer).register_forward_hook(keep)
    logit_diff(plain(family)(torch.tensor([pairs[0].clean])).logits, pairs).backward()
    handle.remove()
    base, grad = (heads_of(family, site, x)[0] for x in (kept[0].detach(), kept[0].grad))
    expected = ((value - base) * grad).sum(dim=-1)
    found = ds[f"{site}_atp"].values[0, 0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-3, rtol=1e-4)
    assert float(expected.abs().max()) > 0.05


@pytest.mark.parametrize("site", ["q", "k"])
@pytest.mark.parametrize("family", ["gpt_neox", "phi3"])
def test_integrated_gradients_add_up_to_the_exact_effect(family: str, site: str) -> None:
    bridge, pairs = model(f"tiny:{family}"), demo_pairs(f"tiny:{family}")
    ig = ps.attribution.METHODS["ig"](n_steps=60)
    estimated = ps.sweep(bridge, pairs, site, intervention=0.7, layers=[1], method=ig)

    def hook(module: nn.Module, args: object, out: Tensor) -> Tensor:
        out = out.clone()
        heads_of(family, site, out).fill_(0.7)
        return out

    handle = projection(family, 1).register_forward_hook(hook)
    with torch.no_grad():
        patched = plain(family)(torch.tensor([pairs[0].clean])).logits
    handle.remove()
    effect = float(logit_diff(patched, pairs)) - estimated.base_metric.item()
    assert abs(effect) > 0.5
    assert float(estimated[f"{site}_ig"].sum()) == pytest.approx(effect, abs=0.1)


@pytest.mark.parametrize("site", ["rot_q", "rot_k"])
@pytest.mark.parametrize("architecture", ["DeepseekV3ForCausalLM", "HunYuanDenseV1ForCausalLM"])
def test_rotated_queries_that_attention_changes_further_are_refused(
    architecture: str, site: str
) -> None:
    from patchsweep.forward.unwrapped import Unsupported
    from patchsweep.runners.packed.runner import PackedRunner
    from patchsweep.spec.sites import SITES

    from tools.architectures import tiny_bridge

    with pytest.raises(Unsupported, match=f"hook_{site}"):
        PackedRunner(tiny_bridge(architecture), [SITES[site]])


def test_queries_of_latent_attention_have_heads_of_their_own_width() -> None:
    """Queries of 8 numbers a head, values of 4: both cut at their own heads."""
    plain, bridge = make_plain_and_bridge("DeepseekV3ForCausalLM", v_head_dim=4)
    pairs = pairs_for(bridge)
    layer, positions = 1, [10, 16]
    attention = plain.model.layers[layer].self_attn
    places = {"q": (attention.q_b_proj, "out", 8), "z": (attention.o_proj, "in", 4)}
    ds = ps.sweep(
        bridge, pairs, [*places], intervention="zero", layers=[layer], positions=positions,
        runner="packed",
    )  # fmt: skip
    for site, (module, side, d_head) in places.items():
        for (i, pos), head in itertools.product(enumerate(positions), range(HEADS)):

            def zero(x: Tensor, pos: int = pos, head: int = head, d_head: int = d_head) -> Tensor:
                x.unflatten(-1, (HEADS, d_head))[:, pos, head] = 0.0
                return x

            tokens = pairs[0].clean, *pairs[0].answer, *pairs[0].wrong_answer
            expected = plain_logit_diff(plain, *tokens, [(module, side, zero)])
            found = float(ds[site].values[0, 0, 0, i, head])
            assert found == pytest.approx(expected, abs=TOLERANCE), (site, pos, head)
        assert float(abs(ds[site] - ds.base_metric).max()) > 0.1
