"""Weights of 16 bits computed with in fp32: the fp32 model's values, and no second copy of it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import circuit, edges, exact_edges
from patchsweep.analyses.heads import study
from patchsweep.analyses.heads.optimal import OptimalSettings
from patchsweep.analyses.logit_lens import lens
from patchsweep.attribution.patterns import pattern_scores
from patchsweep.errors import ConfigError, MetricError
from patchsweep.forward import weight_streaming as stations
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from patchsweep.sweeps.sample import sample_exact
from patchsweep.sweeps.screen_settings import Screen
from subjects import CLEAN, CORRUPTED, quick
from transformer_lens.model_bridge import TransformerBridge

FAMILIES = ["llama", "gpt2", "gemma2", "gemma3", "gpt_neox", "mistral", "mixtral", "opt", "phi3"]
SITES = ["z", "q", "mlp_out", "resid_pre"]


@cache
def bridges(family: str, dtype: str = "bfloat16") -> tuple[TransformerBridge, TransformerBridge]:
    """A model of 16 bits, and the fp32 model of the same weights."""
    low, wide = (ps.load_model(f"tiny:{family}", dtype=dtype, device="cpu") for _ in range(2))
    wide.to(torch.float32)
    return low, wide


def pairs_of(bridge: TransformerBridge, n: int = 1) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, CLEAN.replace("shops", "park")][:n],
        corrupted=[CORRUPTED, CORRUPTED.replace("shops", "park")][:n],
        answers=[(" Mary", " John")] * n,
    )


def equal(family: str, run: Callable[[TransformerBridge, ps.PromptPairs], Any], n: int = 1) -> None:
    low, wide = (run(bridge, pairs_of(bridge, n)) for bridge in bridges(family))
    assert set(low.data_vars) == set(wide.data_vars)
    for name, values in wide.data_vars.items():
        if values.dtype.kind in "iuf":
            # the same products of the same numbers: only how torch splits them may differ
            np.testing.assert_allclose(low[name], values, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "family", quick(FAMILIES, "llama", "gpt2", "gemma2", "gpt_neox", "mixtral")
)
@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_values_are_those_of_the_fp32_model(family: str, runner: str) -> None:
    metrics = ["logit_diff", "kl_base"]
    equal(family, lambda m, p: ps.sweep(m, p, SITES, metrics, layers=[0, 2], runner=runner))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_estimates_are_those_of_the_fp32_model(family: str) -> None:
    methods = ["exact", "atp", "atp_star", "ig", "relp"]
    equal(
        family, lambda m, p: ps.sweep(m, p, ["z", "q"], method=methods, layers=[2], runner="packed")
    )


ANALYSES: dict[str, Callable[[TransformerBridge, ps.PromptPairs], Any]] = {
    "mean": lambda m, p: ps.sweep(m, p, "z", intervention="mean_all", runner="packed"),
    "auto": lambda m, p: ps.sweep(m, p, "z", layers=[1]),
    "mean_hooked": lambda m, p: ps.sweep(m, p, "z", intervention="mean_all", runner="hooked"),
    "bf16": lambda m, p: ps.sweep(m, p, "z", precision="bf16", runner="packed")[
        ["z", "base_metric"]
    ],
    "screen": lambda m, p: ps.sweep(m, p, "z", method=Screen(k=5, inclusion=0.3)),
    "sample": lambda m, p: sample_exact(m, p, "z", n=5),
    "edges": edges,
    "exact_edges": lambda m, p: exact_edges(m, p, ["a0.h1->m1"]),
    "circuit": lambda m, p: circuit(m, p, sizes=[5]),
    "lens": lambda m, p: lens(m, p, remove=("mlp", 1)),
    "attention": lambda m, p: attention(m, p, top=2),
    "patterns": lambda m, p: pattern_scores(m, p).scores,
    "study": lambda m, p: study(m, p, optimal=OptimalSettings(heads=2, steps=2, prompts=1)),
}


@pytest.mark.parametrize("call", ANALYSES)
def test_every_analysis_gives_the_values_of_the_fp32_model(call: str) -> None:
    equal("llama", ANALYSES[call], n=2)


def test_model_arithmetic_is_the_bridges_own() -> None:
    low, wide = bridges("llama")
    own = ps.sweep(low, pairs_of(low), "z", compute_dtype="model")
    pair = pairs_of(low)[0]
    with torch.no_grad():
        logits = low(torch.tensor([pair.corrupted]))[0, -1].float()
    base = logits[pair.answer[0]] - logits[pair.wrong_answer[0]]
    assert abs(own.base_metric.item() - float(base)) < 0.1
    rounded = abs(own["z"] - ps.sweep(wide, pairs_of(wide), "z")["z"])
    assert float(rounded.max()) > 1e-3


@pytest.mark.parametrize(
    ("dtype", "wanted", "expected"),
    [
        ("bfloat16", "auto", "float32"),
        ("float16", "auto", "float32"),
        ("bfloat16", "float32", "float32"),
        ("bfloat16", "model", "bfloat16"),
        ("float32", "auto", "float32"),
        ("float32", "model", "float32"),
    ],
)
def test_which_dtype_is_computed_in(dtype: str, wanted: Any, expected: str) -> None:
    bridge = bridges("llama", dtype)[0] if dtype != "float32" else bridges("llama")[1]
    ds = ps.sweep(bridge, pairs_of(bridge), "z", layers=[2], compute_dtype=wanted, runner="packed")
    provenance = attributes(ds)["provenance"]
    assert (provenance["dtype"], provenance["compute_dtype"]) == (dtype, expected)


def test_fp16_weights_are_computed_with_in_fp32() -> None:
    low, wide = bridges("gpt2", "float16")
    found, expected = (
        ps.sweep(m, pairs_of(m), SITES, layers=[1], runner="packed") for m in (low, wide)
    )
    for name in SITES:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5)


@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_the_model_is_untouched_afterwards(runner: Any) -> None:
    bridge, _ = bridges("gpt2")
    tokens = torch.tensor([pairs_of(bridge)[0].clean])
    before = dict(bridge.original_model.named_parameters())
    logits = bridge(tokens)

    calls = []

    def failing(logits: torch.Tensor) -> torch.Tensor:
        calls.append(len(logits))
        if len(calls) > 3:  # when patches run
            raise ZeroDivisionError
        return logits[:, 0, 0]

    ps.sweep(bridge, pairs_of(bridge), "z", layers=[1], runner=runner)
    with pytest.raises((ZeroDivisionError, MetricError)):
        ps.sweep(bridge, pairs_of(bridge), "z", failing, layers=[1], runner=runner)
    after = dict(bridge.original_model.named_parameters())
    assert all(before[name] is weight for name, weight in after.items())
    assert torch.equal(bridge(tokens), logits)


class Casts:
    """The bytes of cast weights that are alive, and the most there were at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        original = stations.Away.values

        def values(weight: stations.Away) -> torch.Tensor:
            cast = original(weight)
            if weight.placeholder.ndim > 1:
                self._add(cast.numel() * 4)
                # views keep the storage alive, not the tensor
                weakref.finalize(cast.untyped_storage(), self._add, -cast.numel() * 4)
            return cast

        monkeypatch.setattr(stations.Away, "values", values)

    def _add(self, n: int) -> None:
        self.now += n
        self.most = max(self.most, self.now)


@pytest.mark.parametrize("call", ["packed", "hooked", "atp", "edges", "lens"])
def test_one_block_is_cast_at_a_time(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    bridge, _ = bridges("llama")
    casts = Casts(monkeypatch)
    gc.disable()  # what a cycle keeps counts
    try:
        if call == "edges":
            edges(bridge, pairs_of(bridge))
        elif call == "lens":
            lens(bridge, pairs_of(bridge))
        elif call == "atp":
            ps.sweep(bridge, pairs_of(bridge), "z", method="atp")
        else:
            ps.sweep(bridge, pairs_of(bridge), "z", runner=call)
    finally:
        gc.enable()
    block = 4 * sum(p.numel() for p in bridge.blocks[0].parameters())
    around = 4 * bridge.original_model.lm_head.weight.numel()
    around *= 1 + (call == "lens")  # which reads the unembedding while the embedding looks up
    assert 0 < casts.most <= max(block, around) + block  # one of each, while a block is visited
    assert casts.now == 0


def test_bf16_products_of_bf16_weights_are_proven_in_fp32() -> None:
    bridge, _ = bridges("llama")
    ds = ps.sweep(bridge, pairs_of(bridge), "z", precision="bf16", runner="packed")
    error = abs(ds["z_bf16"] - ps.sweep(bridge, pairs_of(bridge), "z", runner="packed")["z"])
    assert 1e-6 < float(error.max()) < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"compute_dtype": "bfloat16"}, "auto, float32 .* or model"),
        ({"compute_dtype": "model", "precision": "bf16"}, "compute those in bfloat16"),
    ],
)
def test_what_cannot_be_computed_is_refused(arguments: dict[str, Any], words: str) -> None:
    bridge, _ = bridges("llama")
    with pytest.raises(ConfigError, match=words):
        ps.sweep(bridge, pairs_of(bridge), "z", **arguments)


def test_float64_is_not_rounded() -> None:
    bridge = ps.load_model("tiny:llama", dtype=torch.float64, device="cpu")
    assert make_request(bridge, pairs_of(bridge), SweepSpec("z")).compute_dtype == torch.float64
    with pytest.raises(ConfigError, match="would round weights of float64"):
        ps.sweep(bridge, pairs_of(bridge), "z", compute_dtype="float32")
