"""A model placed as `device="cpu"` on a machine with a GPU: nothing goes to the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import patchsweep as ps
import patchsweep.transformer_lens as patching
import pytest
import torch
from patchsweep.analyses import heads
from patchsweep.analyses.attention import attention
from patchsweep.attribution.patterns import pattern_scores
from patchsweep.sweeps.screen_settings import Screen
from patchsweep.tasks import check_task
from transformer_lens import patching as theirs
from transformer_lens.model_bridge import TransformerBridge
from visible_gpu import Touched, visible_gpu

TEXT = "When {0} and {1} went to the shops, {2} gave a bottle of milk to"
NAMES = [("John", "Mary"), ("Paul", "Anna"), ("Tom", "Lucy"), ("James", "Emma")]
METHODS = ("atp", "atp_star", "atp_star_drop", "ig", "ig_inputs", "relp", "relp_ah")


def pairs(model: TransformerBridge) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        model,
        clean=[TEXT.format(a, b, a) for a, b in NAMES],
        corrupted=[TEXT.format(a, b, b) for a, b in NAMES],
        answers=[(f" {b}", f" {a}") for a, b in NAMES],
    )


def swept(**settings: Any) -> Callable[[TransformerBridge], Any]:
    settings.setdefault("sites", ["resid_pre", "z", "pattern"])
    return lambda model: ps.sweep(model, pairs(model), **settings)


def drop_in(model: TransformerBridge) -> Any:
    one = pairs(model)[0]
    clean, corrupted = (torch.tensor([ids]) for ids in (one.clean, one.corrupted))
    _, cache = model.run_with_cache(clean)
    return patching.generic_activation_patch(
        model,
        corrupted,
        cache,
        lambda logits: logits[0, -1, one.answer[0]],
        theirs.layer_pos_patch_setter,
        "resid_pre",
        index_axis_names=("layer", "pos"),
    )


CALLS: dict[str, Callable[[TransformerBridge], Any]] = {
    **{f"sweep-{name}": swept(runner=name) for name in ("packed", "hooked", "auto")},
    "sweep-mean-all": swept(intervention="mean_all"),
    "sweep-bf16-products": swept(precision="bf16", sites=["z"]),
    "sweep-vocabulary": swept(metrics=["kl_base", "tv_source", "rank"]),
    **{f"sweep-{name}": swept(method=name, sites=["z", "mlp_out"]) for name in METHODS},
    "sweep-screen": swept(method=Screen(k=5), sites=["z"]),
    "edges": lambda model: ps.edges(model, pairs(model)),
    "exact-edges": lambda model: ps.exact_edges(model, pairs(model), ["m0->logits"]),
    "screened-edges": lambda model: ps.screen_edges(model, pairs(model), top=4),
    "circuit": lambda model: ps.circuit(model, pairs(model), sizes=[0.1]),
    "pattern-scores": lambda model: pattern_scores(model, pairs(model)),
    "attention": lambda model: attention(model, pairs(model), top=2),
    "lens": lambda model: ps.lens(model, pairs(model), remove=("mlp", 1)),
    "sublayers": lambda model: ps.sublayers(model, pairs(model)),
    "heads": lambda model: heads.study(
        model, pairs(model), optimal=heads.OptimalSettings(heads=1, steps=1)
    ),
    "task": lambda model: check_task(model, "ioi", n_pairs=2),
    "drop-in": drop_in,
}


@pytest.mark.parametrize("name", CALLS)
def test_model_on_the_cpu_leaves_a_visible_gpu_alone(name: str) -> None:
    with visible_gpu() as touched:
        model = ps.load_model("tiny:llama", device="cpu")
        assert str(model.cfg.device) == "cpu"
        CALLS[name](model)
    assert touched == []


def test_bridge_of_a_given_model_is_run_where_its_weights_are() -> None:
    """A bridge that its user made records the GPU that it saw; prompts go to the weights."""
    with visible_gpu() as touched:
        model = ps.load_model("tiny:llama", device="cpu")
        expected = ps.sweep(model, pairs(model), "z")
        model.cfg.device = "cuda"
        found = ps.sweep(model, pairs(model), "z")
    assert touched == []
    np.testing.assert_allclose(found["z"], expected["z"], atol=1e-4)


def test_visible_gpu_tells_on_what_touches_it() -> None:
    # where a virtual GPU has run before, C++ takes CUDA for initialised and fails by itself
    words = "CUDA was initialised|not linked with support for cuda"
    with visible_gpu(), pytest.raises((Touched, RuntimeError), match=words):
        torch.zeros(1).to("cuda")
