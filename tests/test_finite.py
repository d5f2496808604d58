"""NaN and infinity end a run, with layer, position and head in words: they are never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import circuit, edges, exact_edges
from patchsweep.analyses.logit_lens import lens
from patchsweep.attribution.patterns import pattern_scores
from patchsweep.errors import ModelError
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

NAME = "tiny:llama"


@pytest.fixture(scope="module")
def overflowing() -> TransformerBridge:
    """A model of the test's own whose last MLP writes NaN, as float16 does where it overflows."""
    bridge = ps.load_model(NAME, device="cpu")
    with torch.no_grad():
        bridge.original_model.model.layers[2].mlp.down_proj.weight[3, 5] = float("nan")
    return bridge


def _pairs(bridge: TransformerBridge, **options: Any) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")], **options
    )


CALLS: dict[str, Callable[[TransformerBridge, ps.PromptPairs], Any]] = {
    "packed": lambda m, p: ps.sweep(m, p, "z", runner="packed"),
    "hooked": lambda m, p: ps.sweep(m, p, "z", runner="hooked"),
    "bf16": lambda m, p: ps.sweep(m, p, "z", runner="packed", precision="bf16"),
    **{
        method: lambda m, p, method=method: ps.sweep(m, p, "z", method=method)
        for method in ("atp", "atp_star", "ig", "relp")
    },
    "edges": edges,
    "exact_edges": lambda m, p: exact_edges(m, p, ["a0.h1->m1"]),
    "circuit": lambda m, p: circuit(m, p, sizes=[5]),
    "pattern_scores": pattern_scores,
    "attention": lambda m, p: attention(m, p, top=2),
    "lens": lens,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_model_that_gives_nan_is_refused(overflowing: TransformerBridge, call: str) -> None:
    with pytest.raises(ModelError, match=r"(pair 0|prompt 0|trial prompt).*float"):
        CALLS[call](overflowing, _pairs(overflowing))


def test_nan_of_a_patch_names_layer_label_and_head() -> None:
    bridge = model(NAME)
    pairs = _pairs(bridge, labels=[{"subject": " Mary"}])

    def poison(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
        values = base.clone()
        if layer == 1:
            values.view(*base.shape[:2], 4, -1)[:, :, 2] = float("inf")
        return values

    with pytest.raises(ModelError, match=r"z at pair 0, layer 1, pos subject, head 2 gave nan"):
        ps.sweep(bridge, pairs, "z", intervention=poison, positions=["subject"])


def test_a_metric_that_is_nan_for_the_base_run_is_refused() -> None:
    def fussy(logits: Tensor) -> Tensor:
        return (logits[:, 0, 0] - logits[:, 0, 0].detach()) / 0.0

    with pytest.raises(ModelError, match=r"the base run of pair 0 gave nan for fussy"):
        ps.sweep(model(NAME), demo_pairs(NAME), "z", fussy, method="atp")
    with pytest.raises(ModelError, match=r"the base run of pair 0 gave nan for fussy"):
        ps.sweep(model(NAME), demo_pairs(NAME), "z", fussy)


def test_an_infinite_gradient_is_refused_with_its_place() -> None:
    def steep(logits: Tensor) -> Tensor:  # finite everywhere, its gradient is not
        gap = logits[:, 0, 0] - logits[:, 0, 0].detach()
        return gap.abs().sqrt()

    with pytest.raises(
        ModelError, match=r"the atp estimate of z at pair 0, layer 0, pos 10, head 0"
    ):
        ps.sweep(model(NAME), demo_pairs(NAME), "z", steep, method="atp")
    with pytest.raises(ModelError, match=r"the estimate of edge embed->a0\.h0\.q in pair 0"):
        edges(model(NAME), demo_pairs(NAME), steep)
    with pytest.raises(ModelError, match=r"the gradient of pattern at pair 0, layer 2, head 0"):
        pattern_scores(model(NAME), demo_pairs(NAME), steep)
