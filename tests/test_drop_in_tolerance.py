"""The drop-in with a tolerance: beside its exact values, and what it refuses."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import numpy as np
import patchsweep.transformer_lens as patching
import pytest
import torch
from patchsweep.errors import ConfigError
from patchsweep.models import load_model
from patchsweep.sweeps import calibration
from patchsweep.transformer_lens import adaptive
from subjects import CLEAN, CORRUPTED, model, quick
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

OTHER = (CLEAN.replace("John", "Tom", 1), CORRUPTED.replace("John", "Paul", 1))
SWEEPS = sorted(
    name
    for name, value in vars(patching).items()
    if name.startswith("get_act_patch_") and isinstance(value, partial)
)
ENTRIES = "get_act_patch_attn_head_pattern_dest_src_pos"
TOLERANCE = 0.01


def both(bridge: TransformerBridge, texts: tuple[str, str]) -> Tensor:
    return torch.cat([bridge.to_tokens(text) for text in texts])


def prompts(name: str) -> tuple[TransformerBridge, Tensor, ActivationCache]:
    """A model, two corrupted prompts, and the cache of the clean ones."""
    bridge = model(name)
    corrupted = both(bridge, (CORRUPTED, OTHER[1]))
    return bridge, corrupted, bridge.run_with_cache(both(bridge, (CLEAN, OTHER[0])))[1]


def per_prompt(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, -1, 9]


def last(logits: Tensor) -> Tensor:
    return per_prompt(logits).mean()


def everywhere(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1)[:, :, 5:9].sum() / 10


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != ENTRIES])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("metric", quick([last, everywhere], last))
def test_errors_are_within_the_tolerance(family: str, name: str, metric: Any) -> None:
    arguments = (*prompts(f"tiny:{family}"), metric)
    exact = getattr(patching, name)(*arguments)
    base = metric(arguments[0](arguments[1])).detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(own loop|exactly)")
        within = getattr(patching, name)(*arguments, tolerance=TOLERANCE)
    assert within.shape == exact.shape
    assert (within - exact).abs().max() <= TOLERANCE
    assert (exact - base).abs().max() > 3 * TOLERANCE, "else the tolerance alone would do"
    if exact.shape[1] == arguments[1].shape[1]:  # by position
        first = int((arguments[1] != both(arguments[0], (CLEAN, OTHER[0]))).any(0).nonzero().min())
        assert first > 1
        assert (within[:, :first] == exact[0, 0].flatten()[0]).all(), "dead cells do not change"


def test_entries_of_the_pattern() -> None:
    bridge, tokens, cache = prompts("tiny:llama")
    axes = getattr(patching, ENTRIES).keywords["index_axis_names"]
    sizes = [bridge.cfg.n_layers, bridge.cfg.n_heads, tokens.shape[1], tokens.shape[1]]
    index = patching.make_df_from_ranges(sizes, axes).sample(300, random_state=0)
    exact, within = (
        getattr(patching, ENTRIES)(
            bridge, tokens, cache, last, index_axis_names=None, index_df=index, **more
        )
        for more in ({}, {"tolerance": 0.001})
    )
    assert (within - exact).abs().max() <= 0.001
    assert exact.std() > 0.001


@pytest.mark.parametrize("grad", [False, True])
def test_resid_mid_follows_grad_mode(grad: bool) -> None:
    arguments = (*prompts("tiny:llama"), last)
    with torch.set_grad_enabled(grad):
        exact = patching.get_act_patch_resid_mid(*arguments)
        within = patching.get_act_patch_resid_mid(*arguments, tolerance=TOLERANCE)
    assert (within - exact).abs().max() <= TOLERANCE
    with torch.inference_mode():
        within = patching.get_act_patch_resid_mid(*arguments, tolerance=TOLERANCE)
        exact = patching.get_act_patch_resid_mid(*arguments)
    assert (within - exact).abs().max() <= TOLERANCE


@pytest.mark.parametrize("reduce", ["none", "mean"])
def test_mappings_of_metrics_by_prompt(reduce: str) -> None:
    metric = {"diff": per_prompt, "other": lambda x: x[:, 3, 7] / 2}
    arguments = (*prompts("tiny:llama"), metric)
    exact, within = (
        patching.get_act_patch_attn_head_out_by_pos(
            *arguments, reduce=reduce, baseline=True, **more
        )
        for more in ({}, {"tolerance": TOLERANCE})
    )
    assert (within.values - exact.values).abs().max() <= TOLERANCE
    assert (exact.values - exact._broadcast_baseline()).abs().max() > 3 * TOLERANCE
    torch.testing.assert_close(within.baseline, exact.baseline)


def test_a_share_of_what_the_prompts_differ_by() -> None:
    bridge, tokens, cache = prompts("tiny:llama")
    clean = both(bridge, (CLEAN, OTHER[0]))
    gap = float((last(bridge(clean)) - last(bridge(tokens))).detach().abs())
    exact, within = (
        patching.get_act_patch_attn_head_out_by_pos(bridge, tokens, cache, last, **more)
        for more in ({}, {"tolerance": "1%"})
    )
    assert (within - exact).abs().max() <= 0.01 * gap
    _, few = bridge.run_with_cache(clean, names_filter=lambda name: name.endswith("hook_z"))
    patching.get_act_patch_attn_head_out_by_pos(bridge, tokens, few, last, tolerance=0.1)
    with pytest.raises(ConfigError, match=r"nothing that fits blocks\.\d+\.hook_resid_post"):
        patching.get_act_patch_attn_head_out_by_pos(bridge, tokens, few, last, tolerance="1%")


def test_every_activation_and_few_cells() -> None:
    arguments = (*prompts("tiny:llama"), last)
    exact = patching.get_act_patch_block_every(*arguments)
    within = patching.get_act_patch_block_every(*arguments, tolerance=TOLERANCE)
    assert (within - exact).abs().max() <= TOLERANCE
    index = patching.make_df_from_ranges([1, 3], ["layer", "pos"])
    few = {"index_axis_names": None, "index_df": index}
    torch.testing.assert_close(
        patching.get_act_patch_resid_pre(*arguments, tolerance=1e-9, **few),
        patching.get_act_patch_resid_pre(*arguments, **few),
    )


def test_most_cells_are_not_run_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []
    real = adaptive.AdaptiveBlocks.run

    def counted(*arguments: Any) -> Any:
        ran.append(real(*arguments))
        return ran[-1]

    monkeypatch.setattr(adaptive.AdaptiveBlocks, "run", counted)
    arguments = (*prompts("tiny:llama"), last)
    patching.get_act_patch_attn_head_out_by_pos(*arguments, tolerance=0.1)
    token_layers = ran[-1].token_layers
    whole = 17 - np.arange(17)
    assert float(token_layers.float().mean()) < 0.5 * whole.mean() * arguments[0].cfg.n_layers


def test_what_cannot_be_met_runs_exactly_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (*prompts("tiny:llama"), last)
    monkeypatch.setattr(calibration, "MARGIN", -1.0)
    with pytest.warns(UserWarning, match=r"resid_pre is patched exactly: no thresholds met"):
        within = patching.get_act_patch_resid_pre(*arguments, tolerance=TOLERANCE)
    torch.testing.assert_close(within, patching.get_act_patch_resid_pre(*arguments))


def _by_jumps(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1).float().mean()


def _mixing(logits: Tensor) -> Tensor:
    return per_prompt(logits) - per_prompt(logits).mean()


def _from_base(logits: Tensor, base: Tensor) -> Tensor:
    return (logits - base).square().sum()


@pytest.mark.parametrize(
    ("metric", "options", "words"),
    [
        (last, {"tolerance": 0}, "tolerance=0 must be a positive number"),
        (last, {"tolerance": "one"}, "tolerance='one' must be a positive number"),
        (_by_jumps, {}, "metric metric returns numbers that have no gradient"),
        ({"it": lambda x: x[0, -1, 0].item()}, {}, "metric it returns numbers that have no"),
        (_mixing, {"reduce": "none"}, "a number that depends on other prompts"),
        (lambda x: x[:, -1], {}, r"returns the shape \(2, \d+\)"),
        (lambda x: x[:, -1, 0].detach().numpy().mean(), {}, "no gradient"),
    ],
)
def test_refused_before_any_pass(
    metric: Any, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (*prompts("tiny:llama"), metric)
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a pass ran"))
    with pytest.raises(ConfigError, match=words):
        patching.get_act_patch_attn_out(*arguments, **{"tolerance": TOLERANCE} | options)


def test_what_the_base_run_refuses() -> None:
    bridge, tokens, cache = prompts("tiny:llama")
    flat = partial(_from_base, base=bridge(tokens).detach())
    with pytest.raises(ConfigError, match="gradient of zero at the base run"):
        patching.get_act_patch_attn_out(bridge, tokens, cache, flat, tolerance=TOLERANCE)
    with (
        bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: x)]),
        pytest.raises(ConfigError, match=r"needs packed batches, and attn_out .* carries a hook"),
    ):
        patching.get_act_patch_attn_out(bridge, tokens, cache, last, tolerance=TOLERANCE)


def test_patch_setters_of_the_users_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def double(activation: Tensor, index: list[int], clean: Tensor) -> Tensor:
        return activation * 2

    arguments = (*prompts("tiny:gpt2"), last, double, "attn_out")
    monkeypatch.setattr(torch.nn.Module, "__call__", lambda *a, **k: pytest.fail("a pass ran"))
    with pytest.raises(ConfigError, match="the patch setter is not one of TransformerLens's own"):
        patching.generic_activation_patch(
            *arguments, index_axis_names=("layer", "pos"), tolerance=TOLERANCE
        )


def test_models_of_16_bits_are_refused() -> None:
    bridge = load_model("tiny:llama", device="cpu", dtype=torch.bfloat16)
    tokens, cache = bridge.to_tokens(CORRUPTED), bridge.run_with_cache(bridge.to_tokens(CLEAN))[1]
    with pytest.raises(ConfigError, match="computes in bfloat16; load it with dtype=float32"):
        patching.get_act_patch_attn_out(bridge, tokens, cache, last, tolerance=TOLERANCE)


def _finite(logits: Tensor) -> Tensor:
    if not logits.isfinite().all():
        raise ValueError("not finite")
    return last(logits)


def test_a_metric_that_takes_no_nan() -> None:
    arguments = (*prompts("tiny:llama"), _finite)
    exact = patching.get_act_patch_attn_out(*arguments)
    within = patching.get_act_patch_attn_out(*arguments, tolerance=TOLERANCE)
    assert (within - exact).abs().max() <= TOLERANCE


def test_a_metric_of_some_positions_reads_no_others() -> None:
    """Patches after the last position that is read are not run."""
    bridge, tokens, cache = prompts("tiny:llama")
    exact, within = (
        patching.get_act_patch_resid_pre(
            bridge, tokens, cache, lambda x: x[:, 11, 5].mean() + x[0, 4, 2], **more
        )
        for more in ({}, {"tolerance": TOLERANCE})
    )
    assert (within - exact).abs().max() <= TOLERANCE
    assert (within[:, 12:] == within[0, -1]).all()
    hinge = lambda x: x[:, -1, 5].mean() + (x[:, 3, 2].abs() - 99).relu().mean()  # noqa: E731
    read = patching.get_act_patch_resid_pre(bridge, tokens, cache, hinge, tolerance=TOLERANCE)
    assert (read - patching.get_act_patch_resid_pre(bridge, tokens, cache, hinge)).abs().max() <= (
        TOLERANCE
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["get_act_patch_attn_head_out_by_pos", "get_act_patch_mlp_out"])
def test_smollm2_is_within_the_tolerance(name: str, smollm2: TransformerBridge) -> None:
    tokens = smollm2.to_tokens(CORRUPTED)
    _, cache = smollm2.run_with_cache(smollm2.to_tokens(CLEAN))
    mary, john = (smollm2.to_single_token(text) for text in (" Mary", " John"))

    def logit_diff(logits: Tensor) -> Tensor:
        return (logits[:, -1, mary] - logits[:, -1, john]).mean()

    exact, within = (
        getattr(patching, name)(smollm2, tokens, cache, logit_diff, **more)
        for more in ({}, {"tolerance": 0.01})
    )
    assert (within - exact).abs().max() <= 0.01
    assert exact.std() > 0.1
    first, second = (x.flatten().sub(exact[0, 0].flatten()[0]).abs() for x in (exact, within))
    assert set(first.topk(20).indices.tolist()) == set(second.topk(20).indices.tolist())
