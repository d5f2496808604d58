"""Metrics over the vocabulary are the same whether whole logits are made or their sums alone."""

from __future__ import annotations

from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.forward.unembed import Unembed
from subjects import CLEAN
from transformer_lens.model_bridge import TransformerBridge

from tools.architectures.table import tiny_bridge

SUMS = ["log_prob", "kl_base", "kl_source", "tv_base", "tv_source"]


@cache
def _subject(family: str) -> tuple[TransformerBridge, PromptPairs]:
    bridge = tiny_bridge(f"{family}ForCausalLM")
    head = bridge.original_model.get_output_embeddings()
    if head.bias is not None:
        with torch.no_grad():
            head.bias.copy_(torch.linspace(-2, 2, len(head.bias)))
    # another last word: tiny models say nearly the same whatever stands before
    corrupted = CLEAN.removesuffix(" to") + " at"
    pairs = PromptPairs.from_strings(bridge, [CLEAN], [corrupted], [(" Mary", " John")])
    return bridge, pairs


def _values(family: str, metric: str) -> np.ndarray:
    ds = ps.sweep(*_subject(family), "resid_pre", [metric], layers=[1], runner="packed")
    every = (ds["resid_pre"], ds.base_metric, ds.source_metric)
    return np.concatenate([x.values.ravel() for x in every])


@pytest.mark.parametrize("metric", SUMS)
@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Phi", "Cohere"])
def test_sums_equal_whole_logits(family: str, metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma2 caps its logits, Phi adds a bias, Cohere scales them."""
    made: list[int] = []
    whole = Unembed.logits

    def counted(self: Unembed, resid: torch.Tensor) -> torch.Tensor:
        made.append(len(resid))
        return whole(self, resid)

    monkeypatch.setattr(Unembed, "logits", counted)
    streamed = _values(family, metric)
    assert sum(made) <= 8, "whole logits are made of the few rows that are tried, no others"
    monkeypatch.setattr(Unembed, "is_direct", lambda self, resid: False)
    expected = _values(family, metric)
    # fp32 logits of order 10, and sums of them in another order
    np.testing.assert_allclose(streamed, expected, atol=1e-5, rtol=1e-5)
    assert np.ptp(expected) > 1e-3
