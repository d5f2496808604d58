"""AtP*, integrated gradients and relevance patching, each against its definition."""

from __future__ import annotations

import numpy as np
import patchsweep as ps
import pytest
import torch
from attribution_setup import block, cells, pairs_of
from patchsweep.attribution import AtpStar, IntegratedInputs, IntegratedSite
from patchsweep.attribution.atp_star import key_effect, query_effect
from patchsweep.attribution.patterns import pattern_scores
from patchsweep.attribution.relp import HalfRule, graft, relevance_rules
from patchsweep.forward.grad import Heads
from patchsweep.forward.pattern import attention_pattern
from patchsweep.forward.unwrapped import UnwrappedModel
from subjects import model
from torch import Tensor, nn

SETTINGS = {
    "plain": {"scale": 0.5},
    "softcap": {"scale": 1.5, "softcap": 2.0},
    "window": {"scale": 1.0, "window": 3},
    "saturated": {"scale": 40.0},
}


def _random_heads(settings: dict[str, float]) -> tuple[Heads, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = draw(2, 4, 7, 5), draw(2, 2, 7, 5), draw(2, 2, 7, 5)
    pattern = attention_pattern(q, k, **settings)
    return Heads(q, k, v, pattern, settings), draw(2, 4, 7, 5), draw(2, 2, 7, 5), draw(2, 4, 7, 7)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_query_fix_equals_brute_force_softmax(settings: dict[str, float]) -> None:
    heads, patched, _, grad = _random_heads(settings)
    found = query_effect(heads, patched, heads.pattern, grad)
    for i in range(7):
        q = heads.q.clone()
        q[:, :, i] = patched[:, :, i]
        moved = attention_pattern(q, heads.k, **settings)
        expected = ((moved - heads.pattern) * grad).sum(dim=(2, 3))
        torch.testing.assert_close(found[:, :, i], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_key_fix_equals_brute_force_softmax(settings: dict[str, float]) -> None:
    heads, _, patched, grad = _random_heads(settings)
    found = key_effect(heads, patched, heads.pattern, grad)
    assert torch.isfinite(found).all()
    for t in range(7):
        k = heads.k.clone()
        k[:, :, t] = patched[:, :, t]
        moved = attention_pattern(heads.q, k, **settings)
        expected = ((moved - heads.pattern) * grad).sum(dim=(2, 3))
        torch.testing.assert_close(found[:, :, t], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "gemma2"])
@pytest.mark.parametrize("site", ["q", "k"])
def test_atp_star_equals_patched_softmax_in_the_bridge(family: str, site: str) -> None:
    name = f"tiny:{family}"
    bridge = model(name)
    _, batch = block(name, [site])
    found = cells(name, [site], "atp_star")[site][0, 0]  # [layer, pos, unit]
    expected = np.zeros_like(found)
    base: dict[int, Tensor] = {}
    grads: dict[int, Tensor] = {}
    source: dict[int, Tensor] = {}

    def watch(x: Tensor, hook: object, i: int) -> Tensor:
        base[i] = x.detach().clone()
        x.register_hook(lambda g: grads.update({i: g.clone()}))
        return x

    layers = range(bridge.cfg.n_layers)
    hooks = [
        (f"blocks.{i}.attn.hook_pattern", lambda x, hook, i=i: watch(x, hook, i)) for i in layers
    ]
    with torch.enable_grad():
        logits = bridge.run_with_hooks(batch.base, fwd_hooks=hooks)[0, -1]
        (logits[batch.answer[0, 0]] - logits[batch.wrong[0, 0]]).backward()
    bridge.zero_grad()
    hooks = [
        (f"blocks.{i}.attn.hook_{site}", lambda x, hook, i=i: source.update({i: x.clone()}))
        for i in layers
    ]
    with torch.no_grad():
        bridge.run_with_hooks(batch.source, fwd_hooks=hooks)
    n_pos, n_units = found.shape[1:]
    first = int((batch.base != batch.source).nonzero()[0, 1])
    for i in layers:
        for pos in range(first, n_pos):
            for unit in range(n_units):
                moved: dict[int, Tensor] = {}

                def patch(x: Tensor, hook: object, i=i, pos=pos, unit=unit) -> Tensor:
                    x[:, pos, unit] = source[i][:, pos, unit]
                    return x

                def read(x: Tensor, hook: object, moved=moved) -> None:
                    moved[0] = x.clone()

                at = f"blocks.{i}.attn.hook_"
                with torch.no_grad():
                    bridge.run_with_hooks(
                        batch.base, fwd_hooks=[(at + site, patch), (at + "pattern", read)]
                    )
                expected[i, pos, unit] = float(((moved[0] - base[i]) * grads[i]).sum())
    # fp32 softmax of scores that may be large
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    plain = cells(name, [site], "atp")[site][0, 0]
    assert np.abs(found - plain).max() > 0.01 * np.abs(expected).max()


def test_atp_star_is_atp_elsewhere() -> None:
    sites = ["resid_pre", "v", "z", "pattern"]
    plain, star = cells("tiny:llama", sites, "atp"), cells("tiny:llama", sites, "atp_star")
    for site in sites:
        np.testing.assert_array_equal(plain[site], star[site])


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_grad_drop_equals_a_direct_implementation(family: str) -> None:
    name = f"tiny:{family}"
    bridge = model(name)
    _, batch = block(name, ["z"])
    layers = range(bridge.cfg.n_layers)
    source: dict[int, Tensor] = {}
    hooks = [
        (f"blocks.{i}.attn.hook_z", lambda x, hook, i=i: source.update({i: x.clone()}))
        for i in layers
    ]
    with torch.no_grad():
        bridge.run_with_hooks(batch.source, fwd_hooks=hooks)
    total = np.zeros((3, batch.length, bridge.cfg.n_heads))
    for dropped in layers:
        scores: dict[int, Tensor] = {}

        def watch(x: Tensor, hook: object, i: int, scores=scores) -> Tensor:
            base = x.detach().clone()

            def on_gradient(g: Tensor) -> None:
                product = ((source[i] - base) * g).reshape(*base.shape[:2], bridge.cfg.n_heads, -1)
                scores[i] = product.sum(-1)[0]

            x.register_hook(on_gradient)
            return x

        hooks = [
            (f"blocks.{i}.attn.hook_z", lambda x, hook, i=i, w=watch: w(x, hook, i)) for i in layers
        ]
        hooks += [
            (f"blocks.{dropped}.{out}", lambda x, hook: x.detach())
            for out in ("hook_attn_out", "hook_mlp_out")
        ]
        with torch.enable_grad():
            logits = bridge.run_with_hooks(batch.base, fwd_hooks=hooks)[0, -1]
            (logits[batch.answer[0, 0]] - logits[batch.wrong[0, 0]]).backward()
        bridge.zero_grad()
        for i in layers:
            if i in scores:
                total[i] += scores[i].abs().numpy()
    expected = total / (len(layers) - 1)
    found = cells(name, ["z"], "atp_star_drop")["z"][0, 0]
    # rounding at positions that are dead, which are exactly zero in ours
    assert np.abs(found - expected).max() < 1e-4 * expected.max()
    assert (found >= 0).all()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize(
    "method", [IntegratedSite(300), IntegratedInputs(300)], ids=["ig", "inputs"]
)
def test_integrated_gradients_are_complete_at_the_embedding(family: str, method) -> None:
    name = f"tiny:{family}"
    ds = ps.sweep(model(name), pairs_of(name, 2), ["embed"], method=method)
    gap = (ds.source_metric - ds.base_metric).values
    total = np.nansum(ds[f"embed_{method.name}"].values, axis=-1)
    assert np.abs(total - gap).max() < 0.01 * np.abs(gap).min()


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "mlp_out", "z", "k", "v"])
def test_ig_of_a_whole_layer_is_its_exact_effect(site: str) -> None:
    name = "tiny:gemma2"
    options = {"positions": "all", "heads": "all"} if site in "zkv" else {"positions": "all"}
    ds = ps.sweep(
        model(name), pairs_of(name, 1), [site], method=["exact", IntegratedSite(300)], **options
    )
    effect = (ds[site] - ds.base_metric).values
    assert np.abs(ds[f"{site}_ig"].values - effect).max() < 0.01 * np.abs(effect).max()


def test_ig_sees_kl_from_the_base() -> None:
    name = "tiny:llama"
    ds = ps.sweep(
        model(name),
        pairs_of(name, 1),
        ["attn_out"],
        "kl_base",
        positions="all",
        method=["exact", IntegratedSite(300)],
    )
    effect = (ds.attn_out - ds.base_metric).values
    assert np.abs(effect).max() > 1e-3
    assert np.abs(ds.attn_out_ig.values - effect).max() < 0.01 * np.abs(effect).max()


# --- relevance patching, rule by rule ---


def _with_rules(module: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient of `module` with the rules of relevance patching."""
    holder = type("Holder", (), {"model": nn.ModuleList([module])})()
    x = x.clone().requires_grad_()
    with relevance_rules(holder):  # type: ignore[arg-type]
        y = module(x)
    y.backward(grad)
    return y.detach(), x.grad


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_norm_rule_of_layer_norm_holds_the_scale() -> None:
    norm = nn.LayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, grad = _draw(3, 8), _draw(3, 8) + 1
    y, found = _with_rules(norm, x, grad)
    torch.testing.assert_close(y, norm(x))
    scale = (x.var(-1, keepdim=True, unbiased=False) + norm.eps).rsqrt()
    weighted = grad * norm.weight.detach() * scale
    torch.testing.assert_close(found, weighted - weighted.mean(-1, keepdim=True))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_norm_rule_of_rms_norm_holds_the_scale(family: str) -> None:
    # Gemma's weights are 1 + w; the rule reads them off the module, whatever its formula
    unwrapped = UnwrappedModel(model(f"tiny:{family}"))
    norm = unwrapped.module_of(unwrapped.bridge.blocks[0].ln1)
    x, grad = _draw(2, 3, 32), _draw(2, 3, 32) + 1
    y, found = _with_rules(norm, x, grad)
    torch.testing.assert_close(y, norm(x).detach())
    torch.testing.assert_close(x * found, y * grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.ReLU()])
def test_identity_rule_holds_the_ratio(activation: nn.Module) -> None:
    x, grad = _draw(4, 6), _draw(4, 6) + 1
    x[0, 0] = 0
    y, found = _with_rules(activation, x, grad)
    torch.testing.assert_close(y, activation(x))
    torch.testing.assert_close(x * found, y * grad)


def test_half_rule_splits_a_product() -> None:
    a, b = _draw(3, 4).requires_grad_(), (_draw(3, 4) + 2).requires_grad_()
    with HalfRule():
        product = a * b
    product.backward(torch.full((3, 4), 2.0))
    torch.testing.assert_close(product.detach(), a.detach() * b.detach())
    torch.testing.assert_close(a.grad, b.detach())  # a half of two times b
    torch.testing.assert_close(b.grad, a.detach())


def test_half_rule_holds_a_factor_of_whole_vectors() -> None:
    a, b = _draw(3, 4).requires_grad_(), (_draw(3, 1) + 2).requires_grad_()
    with HalfRule():
        (a * b).sum().backward()
    torch.testing.assert_close(a.grad, b.detach().expand(3, 4))
    assert b.grad is None


def test_graft_keeps_value_and_moves_gradient() -> None:
    x = _draw(5).requires_grad_()
    y = graft(x.exp(), 3 * x)
    torch.testing.assert_close(y, x.detach().exp())
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full((5,), 3.0))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "phi3"])
@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post", "embed"])
def test_relevance_is_conserved_layer_by_layer(family: str, site: str) -> None:
    # without biases, and with the pattern held, the model is linear in every residual stream:
    # taking all of it away takes away the metric, whatever the layer
    name = f"tiny:{family}"
    ds = ps.sweep(model(name), pairs_of(name, 2), [site], method="relp_ah", intervention="zero")
    total = np.nansum(ds[f"{site}_relp_ah"].values, axis=-1).reshape(2, -1)
    base = ds.base_metric.values.reshape(2, 1)
    assert np.abs(total + base).max() < 1e-3 * np.abs(base).max()


def test_relp_variants_differ_and_keep_the_forward_pass() -> None:
    name = "tiny:mixtral"  # experts too: the routing weights scale whole vectors
    ds = ps.sweep(model(name), pairs_of(name, 1), ["z"], method=["atp", "relp", "relp_ah"])
    found = [ds[f"z_{m}"].values for m in ("atp", "relp", "relp_ah")]
    assert not np.allclose(found[0], found[1])
    assert not np.allclose(found[1], found[2])
    alone = ps.sweep(model(name), pairs_of(name, 1), ["z"], method="relp")
    np.testing.assert_array_equal(alone.base_metric, ds.base_metric)


# --- attention patterns ---


def test_pattern_scores_sum_to_the_pattern_site() -> None:
    name = "tiny:gemma2"
    found = pattern_scores(model(name), pairs_of(name, 2))
    rows = found.scores["patch"].sum("src").transpose("metric", "pair", "layer", "dest", "head")
    expected = cells(name, ["pattern"], "atp", n_pairs=2)["pattern"]
    np.testing.assert_allclose(rows.values, expected, atol=1e-5)
    heads = found.heads(n=4)
    assert len(heads) == 4
    assert [h.size for h in heads] == sorted((h.size for h in heads), reverse=True)
    total = found.scores["patch"].sum(["dest", "src"]).mean("pair").values[0]
    assert heads[0].patch == pytest.approx(total[heads[0].layer, heads[0].head], abs=1e-6)


def test_zero_pattern_scores_are_the_zero_intervention() -> None:
    name = "tiny:llama"
    patched = pattern_scores(model(name), pairs_of(name, 1), intervention="zero")
    np.testing.assert_allclose(patched.scores["zero"], patched.scores["patch"], atol=1e-6)


def test_atp_star_drop_is_a_method_of_its_own() -> None:
    assert AtpStar(name="atp_star_drop", grad_drop=True).extra_sites(()) != ()
