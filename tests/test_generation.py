"""Continuations under a patch held at the prompt, beside a loop of hooked greedy decoding."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import PlanError, PromptError
from subjects import demo_pairs, model
from torch import Tensor

N_TOKENS = 4


def put(x: Tensor, hook: Any, *, new: Tensor, span: slice, head: int | None) -> Tensor:
    """Write `new` at the prompt's positions, whatever follows them."""
    x = x.clone()
    if head is None:
        x[:, span] = new[:, span]
    else:
        x[:, span, head] = new[:, span, head]
    return x


def decoded(bridge: Any, prompt: Tensor, hooks: list, reference: list[int]) -> tuple:
    """(log-probability of the reference, first divergence) by running the model token by token."""
    tokens, forced, shared, log_prob = prompt, prompt, None, 0.0
    with torch.no_grad():
        for i, token in enumerate(reference):
            own = bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
            read = bridge.run_with_hooks(forced, fwd_hooks=hooks)[0, -1]
            log_prob += read.log_softmax(-1)[token].item()
            if shared is None and own.argmax().item() != token:
                shared = i
            tokens = torch.cat([tokens, own.argmax().view(1, 1)], dim=1)
            forced = torch.cat([forced, torch.tensor([[token]])], dim=1)
    return log_prob, len(reference) if shared is None else shared


@pytest.mark.parametrize(
    "name",
    [
        "tiny:llama",
        "tiny:gpt2",
        "tiny:mixtral",
        pytest.param("smollm2-135m", marks=pytest.mark.slow),
    ],
)
def test_continuations_equal_hooked_greedy_decoding(name: str) -> None:
    bridge, pairs = model(name), demo_pairs(name)
    clean, corrupted = torch.tensor([pairs[0].clean]), torch.tensor([pairs[0].corrupted])
    n, n_layers = clean.shape[1], bridge.cfg.n_layers
    layers = [0, n_layers // 2, n_layers - 1]
    places = {"resid_pre": [n - 1, n - 6, "all"], "z": [n - 1, "all"]}
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        tokens, reference = clean, []
        for _ in range(N_TOKENS):
            reference.append(bridge(tokens)[0, -1].argmax().item())
            tokens = torch.cat([tokens, torch.tensor([[reference[-1]]])], dim=1)
    seen, log_probs = [], []
    for site, positions in places.items():
        hook = {"resid_pre": "hook_resid_pre", "z": "attn.hook_z"}[site]
        for position in positions:
            span = slice(0, n) if position == "all" else slice(position, position + 1)
            asked = "all" if position == "all" else [position]
            heads = {} if site == "resid_pre" else {"heads": [1]}
            ds = ps.continuations(
                bridge, pairs, site, n_tokens=N_TOKENS, layers=layers, positions=asked, **heads
            )
            assert ds["continuation"].item() == bridge.tokenizer.decode(reference)
            for layer in layers:
                at = f"blocks.{layer}.{hook}"
                head = None if site == "resid_pre" else 1
                write = partial(put, new=cache[at], span=span, head=head)
                expected = decoded(bridge, corrupted, [(at, write)], reference)
                mine = ds[site].sel(layer=layer).values.reshape(3, -1)[:, 0]
                # sums of log-probabilities of order 30 from other orders of fp32 products
                assert mine[0] == pytest.approx(expected[0], abs=2e-3)
                assert mine[1] == expected[1]
                assert mine[2] == (expected[1] == N_TOKENS)
                seen.append(expected[1])
                log_probs.append(expected[0])
    assert np.ptp(log_probs) > 0.1
    assert len(set(seen)) > 1  # some patches bring the continuation back, some do not
    assert ds["source_metric"].sel(metric="exact_match").item() == 1


def test_the_base_runs_continuation_can_be_the_reference() -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    ds = ps.continuations(bridge, pairs, "resid_pre", n_tokens=3, reference="base")
    assert ds["base_metric"].sel(metric="first_divergence").item() == 3
    assert ds.sizes["pos"] == len(pairs[0])
    dead = ds["resid_pre"].sel(metric="exact_match", layer=0, pos=0)
    assert dead.item() == 1
    assert float(ds["resid_pre"].sel(metric="first_divergence").min()) < 3
    noising = ps.continuations(bridge, pairs, "resid_pre", n_tokens=3, direction="noising")
    assert noising["source_metric"].sel(metric="exact_match").item() == 1
    assert noising["continuation"].item() == ds["continuation"].item()  # the corrupted prompt's
    assert np.isfinite(noising["resid_pre"]).all()


def test_what_does_not_fit_is_refused() -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    with pytest.raises(PromptError, match="context of 128 tokens; use at most 112"):
        ps.continuations(bridge, pairs, n_tokens=113)
    with pytest.raises(PlanError, match="n_tokens=0 must be"):
        ps.continuations(bridge, pairs, n_tokens=0)
