"""What holds while a model runs: no hooks of the user's, one thread, its own modes and dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import circuit, circuit_scores, edges, exact_edges, screen_edges
from patchsweep.analyses.heads import study
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.analyses.logit_lens import lens, sublayers
from patchsweep.attribution import METHODS, IntegratedSite
from patchsweep.attribution.patterns import pattern_scores
from patchsweep.errors import ModelError
from patchsweep.models.running import running, users_hooks
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.sample import sample_exact
from patchsweep.sweeps.screen_settings import Screen
from patchsweep.tasks.check import last_logits
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

NAME = "tiny:llama"
FEW: dict[str, Any] = {"layers": [0, 2], "positions": [9, 16]}
ActivationCache = Callable[[TransformerBridge, ps.PromptPairs], np.ndarray]


def _sweep(**arguments: Any) -> ActivationCache:
    options = {"sites": ["z"], **FEW, **arguments}

    def run(bridge: TransformerBridge, pairs: ps.PromptPairs) -> np.ndarray:
        ds = ps.sweep(bridge, pairs, **options)
        return np.concatenate([ds[name].values.ravel() for name in sorted(map(str, ds.data_vars))])

    return run


def _values(call: Callable[..., Any], *names: str) -> ActivationCache:
    return lambda bridge, pairs: np.concatenate(
        [call(bridge, pairs)[n].values.ravel() for n in names]
    )


QUICK = OptimalSettings(heads=2, steps=2, prompts=1)
TAKES_GRADIENTS: dict[str, ActivationCache] = {
    **{
        method: _sweep(method=IntegratedSite(2) if method == "ig" else method) for method in METHODS
    },
    "screen": _sweep(method=Screen(k=3, subsets=8)),
    "attention": _values(lambda m, p: attention(m, p, top=2), "head_size", "exact"),
    "pattern_scores": _values(lambda m, p: pattern_scores(m, p).scores, "patch"),
    "edges": _values(edges, "edge_eap"),
    "edges_ig": _values(lambda m, p: edges(m, p, steps=2), "edge_eap_ig"),
    "screen_edges": _values(lambda m, p: screen_edges(m, p, top=3), "edge", "edge_eap"),
    "exact_edges": _values(lambda m, p: exact_edges(m, p, ["m0->logits", "a0.h1->m1"]), "edge"),
    "circuit": _values(lambda m, p: circuit(m, p, sizes=[5]), "circuit_metric"),
    "circuit_scores": lambda m, p: circuit_scores(m, p, level="nodes").values,
    "study": _values(lambda m, p: study(m, p, optimal=QUICK), "ablated"),
}
NO_GRADIENT: dict[str, ActivationCache] = {
    "auto": _sweep(),
    "hooked": _sweep(runner="hooked"),
    "packed": _sweep(runner="packed"),
    "bf16": _sweep(runner="packed", precision="bf16"),
    "lens": _values(lambda m, p: lens(m, p, remove=("mlp", 1)), "answer_log_prob"),
    "sublayers": _values(sublayers, "without"),
    "sample": _values(lambda m, p: sample_exact(m, p, "z", n=5), "base_metric"),
    "check": lambda m, p: last_logits(m, p, "clean").numpy(),
}
CALLS = {**NO_GRADIENT, **TAKES_GRADIENTS}


@pytest.fixture
def own() -> TransformerBridge:
    """A model of the test's own, to be spoilt."""
    return ps.load_model(NAME, device="cpu")


def _pairs(bridge: TransformerBridge) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )


@contextmanager
def _on_hook_point(bridge: TransformerBridge) -> Iterator[str]:
    bridge.add_hook("blocks.1.hook_resid_post", lambda x, hook: x + 1.0)
    yield "blocks.1.hook_out"  # the same hook point, by the name it has itself
    bridge.reset_hooks()


@contextmanager
def _on_layer(bridge: TransformerBridge) -> Iterator[str]:
    layer = bridge.original_model.model.layers[1]
    handle = layer.mlp.register_forward_hook(lambda module, args, output: output + 1.0)
    yield "mlp"
    handle.remove()


@pytest.mark.parametrize("hook", [_on_hook_point, _on_layer])
@pytest.mark.parametrize("call", CALLS)
def test_a_hook_of_the_users_is_refused_by_name(call: str, hook: Any) -> None:
    bridge = model(NAME)
    with hook(bridge) as name, pytest.raises(ModelError, match=rf"hook at .*{name}.*reset_hooks"):
        CALLS[call](bridge, demo_pairs(NAME))


@pytest.mark.parametrize("kind", ["permanent", "backward", "context", "raw", "pre", "forward"])
def test_every_kind_of_hook_is_found(own: TransformerBridge, kind: str) -> None:
    point, layer = own.blocks[1].hook_out, own.original_model.model.layers[1]

    def change(x: Tensor, hook: Any) -> Tensor:
        return x + 1.0

    with own.hooks(fwd_hooks=[("hook_embed", change)]) if kind == "context" else nullcontext():
        if kind == "permanent":
            own.add_perma_hook("blocks.1.hook_out", change)
        elif kind == "backward":
            point.add_hook(change, dir="bwd")
        elif kind == "raw":
            point.register_forward_hook(lambda module, args, output: output + 1.0)
        elif kind == "pre":
            layer.register_forward_pre_hook(lambda module, args: None)
        elif kind == "forward":
            layer.mlp.forward = lambda x: x
        assert len(users_hooks(own)) == 1
        with pytest.raises(ModelError, match="carries a hook"), running(own):
            pass


def test_a_plain_model_has_no_hooks_of_the_users(family_model: TransformerBridge) -> None:
    assert users_hooks(family_model) == []


@pytest.fixture(params=["gpt2", "gpt_neox", "gemma3", "opt", "mixtral"])
def family_model(request: pytest.FixtureRequest) -> TransformerBridge:
    return model(f"tiny:{request.param}")


@pytest.mark.parametrize("call", CALLS)
def test_training_inside_is_refused(own: TransformerBridge, call: str) -> None:
    own.original_model.train()
    with pytest.raises(ModelError, match=r"training mode.*model\.eval\(\)"):
        CALLS[call](own, demo_pairs(NAME))


def test_one_module_in_training_mode_is_refused_by_name(own: TransformerBridge) -> None:
    own.original_model.model.layers[2].mlp.train()
    with pytest.raises(ModelError, match=r"training mode.*2.*mlp"):
        ps.sweep(own, demo_pairs(NAME), "z")


@pytest.mark.parametrize("call", ["auto", "hooked", "packed", "atp", "edges", "lens"])
def test_weights_of_another_dtype_than_the_bridge_says_are_refused(
    own: TransformerBridge, call: str
) -> None:
    own.original_model.half()
    with pytest.raises(ModelError, match=r"float16.*float32.*model\.to\(torch\.float16\)"):
        CALLS[call](own, demo_pairs(NAME))


def test_to_is_the_remedy_for_another_dtype(own: TransformerBridge) -> None:
    own.original_model.half()
    own.to(torch.float16)
    ds = ps.sweep(own, demo_pairs(NAME), "z", **FEW)
    assert attributes(ds)["provenance"]["dtype"] == "float16"


def test_a_norm_in_another_dtype_is_no_other_dtype(own: TransformerBridge) -> None:
    own.to(torch.bfloat16)
    own.original_model.model.norm.float()
    with running(own):
        pass


@cache
def _expected(call: str) -> np.ndarray:
    return CALLS[call](model(NAME), demo_pairs(NAME))


@pytest.mark.parametrize("call", CALLS)
def test_an_enclosing_autocast_and_inference_mode_change_nothing(call: str) -> None:
    expected = _expected(call)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = CALLS[call](model(NAME), demo_pairs(NAME))
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("call", ["auto", "atp", "ig", "relp", "attention", "edges"])
def test_gradients_that_the_caller_switched_off_change_nothing(call: str) -> None:
    expected = _expected(call)
    with torch.set_grad_enabled(False):
        found = CALLS[call](model(NAME), demo_pairs(NAME))
        assert not torch.is_grad_enabled()
    np.testing.assert_array_equal(found, expected)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("call", CALLS)
def test_a_model_loaded_in_inference_mode_runs_or_is_refused(call: str) -> None:
    with torch.inference_mode():
        bridge = ps.load_model(NAME, device="cpu")
    if call in NO_GRADIENT:
        np.testing.assert_allclose(
            CALLS[call](bridge, demo_pairs(NAME)), _expected(call), atol=1e-5
        )
        return
    with pytest.raises(ModelError, match=r"inference_mode.*load it outside"):
        CALLS[call](bridge, demo_pairs(NAME))


THREADED = ["auto", "hooked", "packed", "atp", "lens", "attention", "edges", "exact_edges", "check"]


@pytest.mark.parametrize("n", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_four_threads_give_what_one_gives(own: TransformerBridge, n: int) -> None:
    pairs = _pairs(own)
    expected = {call: CALLS[call](own, pairs) for call in THREADED}
    # most of them are of the kinds that set hooks on the bridge itself
    jobs = [*THREADED, *["auto", "hooked", "lens"] * n]
    random.Random(0).shuffle(jobs)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda call: CALLS[call](own, pairs), jobs))
    for call, values in zip(jobs, found, strict=True):
        np.testing.assert_array_equal(values, expected[call], err_msg=call)
