"""Integrals of gradients: their rules, stated errors, residuals; tokens that do not move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import torch
from attribution_setup import block, cells, pairs_of
from patchsweep.analyses.circuits.edge_batch import blocks_and_nodes
from patchsweep.analyses.circuits.edge_pass import EdgeModel, run_edge_pass
from patchsweep.analyses.circuits.edges import edges
from patchsweep.attribution import (
    AtpEnds,
    Attribution,
    IntegratedInputs,
    IntegratedSite,
    get_methods,
)
from patchsweep.attribution.integral import stated_error
from patchsweep.attribution.quadrature import Path, Quadrature, gauss, left, nested
from patchsweep.errors import MethodError
from patchsweep.forward.grad import GradientModel
from patchsweep.forward.norms import norm_form
from patchsweep.models.tiny import TINY_FAMILIES
from patchsweep.results.stated import stated_errors
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import SweepSpec, make_request
from subjects import model, quick
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

FAMILIES = [f"tiny:{family}" for family in TINY_FAMILIES]
SOME = ["tiny:llama", "tiny:gpt2", "tiny:gemma3", "tiny:gpt_neox"]


@pytest.mark.parametrize("rule", [gauss(7), left(512), nested()], ids=["gauss", "left", "nested"])
def test_rules_integrate_and_the_stated_error_bounds_the_error(rule: Quadrature) -> None:
    function = np.exp(3 * rule.nodes) * np.cos(5 * rule.nodes)
    x = np.linspace(0, 1, 200_001)
    true = np.trapezoid(np.exp(3 * x) * np.cos(5 * x), x)
    values = rule.weights @ function
    assert rule.weights.sum(axis=1) == pytest.approx(1.0)
    fine, coarse = (torch.tensor(x).view(1, 1, 1) for x in (values[-1], values[-2]))
    assert abs(values[-1] - true) <= float(stated_error(fine, coarse)) + 1e-9
    assert abs(values[-1] - true) < 0.05
    for i in range(rule.n_rules):
        assert set(np.flatnonzero(rule.weights[i])) <= set(np.flatnonzero(rule.level <= i))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"steps": 0}, "steps=0 must be a whole number of at least 1"),
        ({"steps": "many"}, "steps='many' must be"),
        ({"steps": 5, "rule": "right"}, "rule='right' is not known"),
        ({"steps": "auto", "rule": "left"}, "fixed number of steps"),
        ({"steps": "auto", "rtol": 0.0}, "rtol=0.0 must be a number above 0"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, object], match: str) -> None:
    with pytest.raises(MethodError, match=match):
        Path(**settings)  # type: ignore[arg-type]


def test_rule_of_an_edge_estimate_without_steps_is_refused() -> None:
    with pytest.raises(MethodError, match="are for an integral"):
        edges(model("tiny:llama"), pairs_of("tiny:llama", 1), rule="left")


@cache
def _double(name: str) -> TransformerBridge:
    bridge = ps.load_model(name, device="cpu").to(torch.float64)
    bridge.cfg.dtype = torch.float64
    return bridge


def _loop(name: str, site: str, fractions: list[float]) -> Tensor:
    """The left sum of `ig_inputs`, written out with hooks on the bridge, [layer, pos, width]."""
    bridge, pair = _double(name), pairs_of(name, 1)[0]
    base, source = (torch.tensor([x]) for x in (pair.corrupted, pair.clean))
    hooks = [SITES[site].hook_name(layer) for layer in range(bridge.cfg.n_layers)]
    runs = []
    for tokens in (base, source):
        _, cache = bridge.run_with_cache(tokens)
        runs.append((cache["hook_embed"], torch.stack([cache[hook] for hook in hooks])))
    (embed, old), (other, new) = runs
    total = torch.zeros_like(old)
    for fraction in fractions:
        kept: list[Tensor] = []  # in the order of the layers

        def keep(x: Tensor, hook: object, kept: list[Tensor] = kept) -> Tensor:
            x.retain_grad()
            kept.append(x)
            return x

        start = torch.lerp(embed, other, fraction).requires_grad_()
        with bridge.hooks(
            [("hook_embed", lambda x, hook, s=start: s), *((h, keep) for h in hooks)]
        ):
            logits = bridge(base)[0, -1]
        (logits[pair.answer[0]] - logits[pair.wrong_answer[0]]).backward()
        total += torch.stack([x.grad for x in kept])
    return ((new - old) * total / len(fractions)).detach()[:, 0]


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_left_rule_equals_a_plain_loop(name: str) -> None:
    method = IntegratedInputs(4, rule="left")
    expected = _loop(name, "mlp_out", [0.0, 0.25, 0.5, 0.75]).sum(dim=-1)
    request = make_request(_double(name), pairs_of(name, 1), SweepSpec(["mlp_out"]))
    found = Attribution(request, [method]).run(method, range(1)).cells["mlp_out"][0, 0, ..., 0]
    assert found == pytest.approx(
        expected.numpy(), rel=1e-5, abs=1e-5 * float(expected.abs().max())
    )
    assert np.abs(found).max() > 0.1


def _methods() -> list[object]:
    return [
        *get_methods(["atp", "atp_ends", "relp", "atp_star"]),
        IntegratedSite(3),
        IntegratedInputs(3),
    ]


@pytest.mark.parametrize("name", quick(FAMILIES, *SOME))
def test_tokens_that_do_not_move_need_not_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["resid_pre", "attn_out", "mlp_out", "z", "k", "v", "pattern"]
    request, batch = block(name, wanted, n_pairs=3)
    assert batch.first_difference() > 1

    def run() -> list[dict[str, np.ndarray]]:
        found = [
            dict(Attribution(request, [method]).run(method, range(3)).cells)  # type: ignore[list-item, arg-type]
            for method in _methods()
        ]
        return [
            *found,
            {"edges": edges(model(name), pairs_of(name, 3), steps=3)["edge_eap_ig"].values},
        ]

    short = run()
    monkeypatch.setattr(GradientModel, "takes_positions", False)
    for part, whole in zip(short, run(), strict=True):
        for site, values in whole.items():
            scale = np.nanmax(np.abs(values))
            assert scale > 1e-3, site
            np.testing.assert_allclose(part[site], values, atol=1e-4 * scale, err_msg=site)


def test_only_live_tokens_run() -> None:
    request, batch = block("tiny:llama", ["z"])
    live = batch.length - batch.first_difference()
    seen: list[int] = []
    handle = None
    for method in _methods():
        attribution = Attribution(request, [method])  # type: ignore[list-item]
        first = attribution.gradients.unwrapped.blocks[0]
        handle = first.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(
                (args or [kwargs["hidden_states"]])[0].shape[1]
            ),
            with_kwargs=True,
        )
        attribution.run(method, range(1))  # type: ignore[arg-type]
        handle.remove()
    assert set(seen) == {batch.length, live}
    assert seen.count(batch.length) == len(_methods())  # the source run


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LayerNorm(16),
        lambda: nn.RMSNorm(16),
        lambda: LlamaRMSNorm(16),
        lambda: Gemma3RMSNorm(16),
        lambda: CohereLayerNorm(16),
        lambda: nn.LayerNorm(16, elementwise_affine=False),
    ],
    ids=["layer", "rms", "llama", "gemma3", "cohere", "plain"],
)
def test_closed_form_of_a_norm_equals_autograd(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    norm = make()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 16).mul(4).add(1).requires_grad_()
    y = norm(x)
    form = norm_form(norm, x.detach())
    scale = form.scale(x.detach(), y.detach())
    assert scale is not None
    grad = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, x, grad)
    centred = form.centred(x.detach())
    share = (grad * (y.detach() - form.bias)).sum(-1, keepdim=True) * scale.square() / 16
    found = form.centred(scale * form.weight * grad - share * centred)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_something_else_than_a_norm_has_no_closed_form() -> None:
    module = nn.Tanh()
    x = torch.randn(2, 3, 16)
    assert norm_form(module, x).scale(x, module(x)) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_readers_in_closed_form_equal_a_backward_pass_each(name: str) -> None:
    bridge = model(name)
    request, batch = block(name, ["z"], n_pairs=2)
    edge_model = EdgeModel(*blocks_and_nodes(bridge))
    (method,) = get_methods(["atp"])
    work = Attribution(request, [method])._work(method, batch)
    work = replace(work, gradients=edge_model.gradients)
    with edge_model.gradients.frozen():
        found = run_edge_pass(edge_model, work, None, 1)
        with torch.enable_grad():
            score = work.score(found.logits, found.logits.detach())[0].sum()
        gradients = found.gradients(score)
        weights = torch.ones(1, 1)
        with torch.no_grad():
            closed = [gradients.readers(i, weights) for i in range(len(found.layers))]
            n_closed = sum(
                edge_model.projection(i, k) is not None for i in range(len(closed)) for k in "qkv"
            )
            for layer in found.layers:
                for norm in layer.reads.values():
                    norm.scale, norm.module = None, nn.Identity()  # no closed form
            slow = [gradients.readers(i, weights) for i in range(len(found.layers))]
    assert n_closed > 0
    for fast, each in zip(closed, slow, strict=True):
        scale = float(each.abs().max())
        assert scale > 0
        assert float((fast - each).abs().max()) <= 1e-4 * scale


@pytest.mark.parametrize("name", SOME)
def test_auto_meets_its_tolerance_and_states_what_it_used(name: str) -> None:
    sites = ["resid_pre", "z", "mlp_out"]
    for method, best in (
        (IntegratedSite("auto", rtol=0.01), IntegratedSite(150)),
        (IntegratedInputs("auto", rtol=0.01), IntegratedInputs(150)),
    ):
        request, _ = block(name, sites, n_pairs=2)
        found = Attribution(request, [method]).run(method, range(2))
        true = cells(name, sites, best, n_pairs=2)
        for site in sites:
            error = found.stated[site, "error"]
            scale = np.abs(true[site]).max(axis=(2, 3, 4), keepdims=True)
            missed = np.abs(found.cells[site] - true[site])
            assert (missed <= error + 1e-4 * scale).mean() >= 0.95
            (nodes,) = [
                found.stated.get((x, "nodes")) for x in (site, "") if (x, "nodes") in found.stated
            ]
            used_up = (nodes == 65.0).any(axis=2)[..., None, None, None]
            assert ((error <= 0.0101 * scale) | used_up).all()
            assert set(nodes.ravel().tolist()) <= {9.0, 17.0, 33.0, 65.0}


def test_auto_adds_nodes_only_where_they_are_needed() -> None:
    request, _ = block("tiny:gpt2", ["z", "resid_pre"], n_pairs=2)
    strict = IntegratedSite("auto", rtol=1e-3)
    found = Attribution(request, [strict]).run(strict, range(2))
    nodes = [x for (_, kind), x in found.stated.items() if kind == "nodes"]
    assert len({float(n) for x in nodes for n in x.ravel()}) > 1


@pytest.mark.parametrize("name", SOME)
def test_residuals_say_what_the_estimates_miss(name: str) -> None:
    request, _ = block(name, ["embed", "z"], n_pairs=2)
    for method in (IntegratedInputs(3), IntegratedInputs(300)):
        found = Attribution(request, [method]).run(method, range(2))
        gap = found.source_metric - found.base_metric
        total = found.cells["embed"].sum(axis=(2, 3, 4))
        residual = found.stated["", "residual"][..., 0]
        np.testing.assert_allclose(total - gap, residual, atol=1e-4 * np.abs(gap).max())
    assert np.abs(residual).max() < 1e-2 * np.abs(gap).max()


def test_edges_state_errors_residuals_and_nodes() -> None:
    bridge, pairs = model("tiny:gpt2"), pairs_of("tiny:gpt2", 2)
    few, many = (edges(bridge, pairs, steps=n) for n in (8, 300))
    auto = edges(bridge, pairs, steps="auto", rtol=1e-2)
    name = "edge_eap_ig"
    for ds in (few, auto):
        missed = np.abs(ds[name] - many[name]).values
        real = np.isfinite(missed)
        slack = 1e-5 * float(np.abs(many[name]).max())
        assert (missed[real] <= ds[f"{name}_error"].values[real] + slack).mean() >= 0.95
    gap = (many["source_metric"] - many["base_metric"]).values
    assert np.abs(many[f"{name}_residual"].values).max() < 1e-2 * np.abs(gap).max()
    largest = np.nanmax(np.abs(auto[name].values), axis=(2, 3))
    met = np.nanmax(auto[f"{name}_error"].values, axis=(2, 3)) <= 0.0101 * largest
    assert (met | (auto[f"{name}_nodes"].values == 65)).all()
    assert set(auto[f"{name}_nodes"].values.ravel().tolist()) <= {9.0, 17.0, 33.0, 65.0}
    (stated,) = stated_errors(few)
    assert "of converged" in stated.words


def test_ends_average_the_gradients_of_both_prompts() -> None:
    name, sites = "tiny:gpt2", ["z", "resid_pre", "mlp_out"]
    request, _ = block(name, sites, n_pairs=2)
    method = AtpEnds()
    found = Attribution(request, [method]).run(method, range(2))
    base = cells(name, sites, "atp", n_pairs=2)
    other, _ = block(name, sites, n_pairs=2, direction="noising")
    (atp,) = get_methods(["atp"])
    source = Attribution(other, [atp]).run(atp, range(2)).cells
    for site in sites:
        np.testing.assert_allclose(found.cells[site], (base[site] - source[site]) / 2, atol=2e-4)
        half = np.abs(-source[site] - base[site]) / 2
        np.testing.assert_allclose(found.stated[site, "error"], half, atol=2e-4)
        assert np.abs(base[site]).max() > 0.01


def test_ends_need_a_source_prompt() -> None:
    with pytest.raises(MethodError, match="atp_ends goes from the base prompt to the source"):
        ps.sweep(
            model("tiny:llama"),
            pairs_of("tiny:llama", 1),
            "z",
            method="atp_ends",
            intervention="zero",
        )


def test_store_holds_what_is_stated() -> None:
    methods = [IntegratedSite(3), IntegratedInputs("auto"), "atp_ends", "exact"]
    ds = ps.sweep(model("tiny:llama"), pairs_of("tiny:llama", 2), ["z", "embed"], method=methods)
    assert ds["z_ig_error"].dims == ds["z_ig"].dims
    assert ds["z_ig_residual"].dims == ("metric", "pair", "layer")
    assert ds["embed_ig_residual"].dims == ("metric", "pair")
    assert ds["ig_inputs_residual"].dims == ds["ig_inputs_nodes"].dims == ("metric", "pair")
    assert np.isfinite(ds["z_ig_error"].values).all()
    words = {stated.name: stated.words for stated in stated_errors(ds)}
    assert "far from converged" in words["z_ig"]
    assert "gradients" in words["z_ig_inputs"]
    assert "dispute the sign" in words["z_atp_ends"]
    (effect, *_) = ds.patchsweep.largest("z_ig")
    assert effect.error is not None
    assert effect.error > 0
    agreement = ps.compare(ds).of("z", "ig")
    assert agreement.stated_error > 0
    assert "far from converged" in agreement.words
