"""AtP is (values - base) · gradient, as plain autograd through the bridge's own hooks gives it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_setup import block, cells
from oracle import hook_of
from patchsweep.spec.sites import SITES
from subjects import model
from torch import Tensor

FAMILIES = ["gpt2", "gpt_neox", "llama", "qwen3", "gemma2", "gemma3", "mistral", "phi3"]
ALL = [name for name in SITES if name not in ("mlp_post", "result", "pattern_cell")]


def _plain_autograd(bridge, site, batch, delta_from) -> tuple[np.ndarray, float]:
    """`[pair, layer, pos, unit]` by hooks on the bridge, keeping every gradient; and the size
    of base · gradient, of which rounding takes its share before the difference is taken."""
    layers = range(bridge.cfg.n_layers if site.layered else 1)
    source: dict[int, Tensor] = {}
    hooks = [
        (hook_of(bridge, site, i), lambda x, hook, i=i: source.update({i: x.detach().clone()}))
        for i in layers
    ]
    with torch.no_grad():
        bridge.run_with_hooks(delta_from, fwd_hooks=hooks)
    if not source:
        pytest.skip(f"the bridge's {site.hook} never fires here: there is nothing to compare with")
    base: dict[int, Tensor] = {}
    grads: dict[int, Tensor] = {}

    def watch(x: Tensor, hook: object, i: int) -> Tensor:
        base[i] = x.detach().clone()
        x.register_hook(lambda g: grads.update({i: g.clone()}))
        return x  # else the bridge goes on with a tensor that this one is only a view of

    hooks = [(hook_of(bridge, site, i), lambda x, hook, i=i: watch(x, hook, i)) for i in layers]
    with torch.enable_grad():
        logits = bridge.run_with_hooks(batch.base, fwd_hooks=hooks)[:, -1]
        right, wrong = batch.answer[:, :1], batch.wrong[:, :1]
        (logits.gather(1, right) - logits.gather(1, wrong)).sum().backward()
    bridge.zero_grad()
    found, rounding = [], 0.0
    for i in layers:
        # a gradient that never came is zero: nothing that is read depends on it
        product = (source[i] - base[i]) * grads.get(i, torch.zeros_like(base[i]))
        rounding += float((base[i] * grads.get(i, torch.zeros_like(base[i]))).norm()) ** 2
        if site.name == "pattern":
            found.append(product.sum(-1).transpose(1, 2))
        elif product.ndim == 4:
            found.append(product.sum(-1))
        elif site.unit is not None:
            n = bridge.cfg.n_heads
            found.append(product.unflatten(-1, (n, -1)).sum(-1))
        else:
            found.append(product.sum(-1, keepdim=True))
    return torch.stack(found, dim=1).numpy(), rounding**0.5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("site", ALL)
def test_atp_equals_plain_autograd(family: str, site: str) -> None:
    if family == "gpt_neox" and site == "resid_mid":
        pytest.skip("attention and MLP in parallel: there is no residual between them")
    bridge = model(f"tiny:{family}")
    name = f"tiny:{family}"
    request, batch = block(name, [site])
    expected, rounding = _plain_autograd(bridge, SITES[site], batch, batch.source)
    found = cells(name, [site], "atp")[site][0]
    found = found.reshape(expected.shape)
    live = np.isfinite(found) & (found != 0)
    assert live.any()
    # dead cells are zero by proof; autograd gives rounding there, or a value that cannot matter
    # two fp32 implementations: as vectors they agree within 1e-5, but for the rounding of the
    # activations, which can be a hundred times larger than their difference
    size = np.linalg.norm(expected) + 0.1 * rounding
    assert np.linalg.norm((found - expected)[live]) < 1e-5 * size
    plan = request.plans[0]
    alive = np.zeros(plan.shape, bool).ravel()
    alive[plan.cell[plan.live_patches()]] = True
    assert np.linalg.norm(np.where(alive.reshape(expected.shape), 0, expected)) < 1e-5 * size


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_atp_of_neurons_equals_plain_autograd(family: str) -> None:
    bridge, name = model(f"tiny:{family}"), f"tiny:{family}"
    _, batch = block(name, ["mlp_post"], neurons=[3, 17])
    expected = _neurons(bridge, batch, [3, 17])
    found = cells(name, ["mlp_post"], "atp", neurons=[3, 17])["mlp_post"][0]
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def _neurons(bridge, batch, chosen: list[int]) -> np.ndarray:
    kept: dict[str, dict[int, Tensor]] = {"base": {}, "source": {}, "grad": {}}

    def keep(run: str, x: Tensor, i: int) -> None:
        kept[run][i] = x.detach().clone()
        if run == "base":
            x.register_hook(lambda g: kept["grad"].update({i: g.clone()}))

    layers = range(bridge.cfg.n_layers)
    for run in ("source", "base"):
        hooks = [
            (f"blocks.{i}.mlp.hook_post", lambda x, hook, i=i, run=run: keep(run, x, i))
            for i in layers
        ]
        with torch.set_grad_enabled(run == "base"):
            logits = bridge.run_with_hooks(getattr(batch, run), fwd_hooks=hooks)[:, -1]
    right, wrong = batch.answer[:, :1], batch.wrong[:, :1]
    (logits.gather(1, right) - logits.gather(1, wrong)).sum().backward()
    bridge.zero_grad()
    product = [(kept["source"][i] - kept["base"][i]) * kept["grad"][i] for i in layers]
    return torch.stack(product, dim=1)[..., chosen].numpy()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_atp_of_results_and_of_cells_follow_from_z_and_pattern(family: str) -> None:
    # result is linear in z; the cells of a row add up to the row
    name = f"tiny:{family}"
    sites = ["z", "result", "pattern", "pattern_cell"]
    found = cells(name, sites, "atp")
    np.testing.assert_array_equal(found["z"], found["result"])
    n_pos, n_heads = found["pattern"].shape[3:]
    single = found["pattern_cell"].reshape(*found["pattern"].shape, n_pos)
    assert single.shape[-2:] == (n_heads, n_pos)
    np.testing.assert_allclose(single.sum(axis=-1), found["pattern"], atol=1e-5)
    assert np.abs(np.triu(single[0, 0, 0, :, 0], k=1)).max() == 0  # nothing looks ahead


def test_atp_of_result_equals_plain_autograd() -> None:
    bridge = model("tiny:gemma2")
    _, batch = block("tiny:gemma2", ["result"])
    bridge.set_use_attn_result(True)
    try:
        expected, rounding = _plain_autograd(bridge, SITES["result"], batch, batch.source)
    finally:
        bridge.set_use_attn_result(False)
    found = cells("tiny:gemma2", ["result"], "atp")["result"][0]
    size = np.linalg.norm(expected) + 0.1 * rounding
    assert np.linalg.norm(found - expected) < 1e-5 * size


def test_atp_sums_pairs_metrics_and_sets() -> None:
    name = "tiny:llama"
    both = cells(name, ["z"], "atp", metrics=["logit_diff", "log_prob"], n_pairs=3)["z"]
    first = cells(name, ["z"], "atp", metrics=["log_prob"], n_pairs=1)["z"]
    # a batch of pairs, and another metric before, change no pair's numbers
    np.testing.assert_allclose(both[1, :1], first[0], rtol=1e-4, atol=1e-6)
    spans = cells(name, ["z"], "atp", n_pairs=3, heads=[(0, 2)], positions="all")["z"]
    summed = both[0][..., [0, 2]].sum(axis=(2, 3))
    np.testing.assert_allclose(spans[0, ..., 0, 0], summed, rtol=1e-4, atol=1e-6)


def test_zero_ablation_is_minus_base_times_gradient() -> None:
    name = "tiny:gemma2"
    _, batch = block(name, ["mlp_out"], intervention="zero")
    bridge = model(name)
    site = SITES["mlp_out"]
    grads: dict[int, Tensor] = {}
    base: dict[int, Tensor] = {}

    def watch(x: Tensor, hook: object, i: int) -> None:
        base[i] = x.detach().clone()
        x.register_hook(lambda g: grads.update({i: g}))

    hooks = [(site.hook_name(i), lambda x, hook, i=i: watch(x, hook, i)) for i in range(3)]
    with torch.enable_grad():
        logits = bridge.run_with_hooks(batch.base, fwd_hooks=hooks)[:, -1]
        (logits[0, batch.answer[0, 0]] - logits[0, batch.wrong[0, 0]]).backward()
    bridge.zero_grad()
    expected = torch.stack([-(base[i] * grads[i]).sum(-1) for i in range(3)], dim=1).numpy()
    found = cells(name, ["mlp_out"], "atp", intervention="zero")["mlp_out"][0, ..., 0]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_weights_get_their_gradients_back() -> None:
    bridge = model("tiny:llama")
    before = {n: p.requires_grad for n, p in bridge.original_model.named_parameters()}
    assert any(before.values())
    cells("tiny:llama", ["resid_pre"], "atp")
    after = {n: p.requires_grad for n, p in bridge.original_model.named_parameters()}
    assert after == before
    assert all(p.grad is None for p in bridge.original_model.parameters())


def test_no_gradient_is_kept_and_nothing_leaks() -> None:
    import gc
    import weakref

    from patchsweep.forward import grad as tape_module

    seen: list[weakref.ref[Tensor]] = []
    original = tape_module.GradientModel.forward

    def spying(self, tokens, visit, reads, **kw):
        def spy(place, x):
            if kw.get("gradient"):
                seen.append(weakref.ref(x))
            visit(place, x)

        return original(self, tokens, spy, reads, **kw)

    gc.disable()
    try:
        tape_module.GradientModel.forward = spying  # type: ignore[method-assign]
        cells("tiny:llama", ["resid_pre", "z", "pattern"], "atp")
    finally:
        tape_module.GradientModel.forward = original  # type: ignore[method-assign]
        alive = sum(ref() is not None for ref in seen)
        gc.enable()
    assert len(seen) == 9
    assert alive == 0  # freed by reference counts alone: no cycle through a hook
