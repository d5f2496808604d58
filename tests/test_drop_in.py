"""`patchsweep.transformer_lens` gives what `transformer_lens.patching` gives."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pandas as pd
import patchsweep.transformer_lens as ours
import pytest
import torch
from patchsweep.models import load_model
from subjects import CLEAN, CORRUPTED, model
from torch import Tensor
from transformer_lens import patching as theirs
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

# a sum over 17 positions of fp32 logits of order 10; measured 5e-5 at most
TOLERANCE = 1e-4
FAMILIES = ["gpt2", "llama", "gemma2"]
SWEEPS = sorted(
    name
    for name in dir(theirs)
    if name.startswith("get_act_patch_") and isinstance(getattr(theirs, name), partial)
)
ENTRIES = "get_act_patch_attn_head_pattern_dest_src_pos"  # thousands of cells: sampled
OTHER = (CLEAN.replace("John", "Tom", 1), CORRUPTED.replace("John", "Paul", 1))


@pytest.fixture(autouse=True)
def _no_loop() -> Iterator[None]:
    """A sweep that silently took TransformerLens's loop would prove nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*own loop")
        yield


@cache
def prompts(name: str) -> tuple[TransformerBridge, Tensor, ActivationCache]:
    """A model, two corrupted prompts, and the cache of the clean ones."""
    bridge = model(name)
    clean, corrupted = (
        torch.cat([bridge.to_tokens(text) for text in texts])
        for texts in ((CLEAN, OTHER[0]), (CORRUPTED, OTHER[1]))
    )
    return bridge, corrupted, bridge.run_with_cache(clean)[1]


@cache
def _weights(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) / 50


def everywhere(logits: Tensor) -> Tensor:
    """A scalar that depends on every logit of every position and prompt."""
    return (logits.log_softmax(-1) * _weights(tuple(logits.shape))).sum()


def per_prompt(logits: Tensor) -> Tensor:
    return (logits.log_softmax(-1) * _weights(tuple(logits.shape))).sum(dim=(1, 2))


def _index(
    bridge: TransformerBridge, tokens: Tensor, axes: tuple[str, ...], n: int
) -> pd.DataFrame:
    """A sample of the cells of `axes`."""
    sizes = {"layer": bridge.cfg.n_layers, "head_index": bridge.cfg.n_heads}
    ranges = [sizes.get(axis, tokens.shape[1]) for axis in axes]
    return theirs.make_df_from_ranges(ranges, axes).sample(n, random_state=0)


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != ENTRIES])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_values_as_transformer_lens(family: str, name: str) -> None:
    arguments = (*prompts(f"tiny:{family}"), everywhere)
    expected = getattr(theirs, name)(*arguments)
    found = getattr(ours, name)(*arguments)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert expected.std() > 0.05  # else equality would prove nothing
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_same_values_for_entries_of_the_pattern(family: str) -> None:
    bridge, tokens, cache = prompts(f"tiny:{family}")
    axes = getattr(theirs, ENTRIES).keywords["index_axis_names"]
    index = _index(bridge, tokens, axes, 60)
    expected, found = (
        getattr(module, ENTRIES)(
            bridge, tokens, cache, everywhere, index_axis_names=None, index_df=index
        )
        for module in (theirs, ours)
    )
    assert expected.std() > 0.02
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_resid_mid_follows_grad_mode(family: str) -> None:
    """With gradients on, TransformerLens patches what the norm reads, not the residual stream."""
    arguments = (*prompts(f"tiny:{family}"), everywhere)
    found = {}
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            expected = theirs.get_act_patch_resid_mid(*arguments)
            found[grad] = ours.get_act_patch_resid_mid(*arguments)
        torch.testing.assert_close(found[grad], expected, atol=TOLERANCE, rtol=0)
    assert (found[True] - found[False]).abs().max() > 0.1


@pytest.mark.parametrize(
    "name",
    [
        "get_act_patch_attn_head_all_pos_every",
        "get_act_patch_attn_head_by_pos_every",
        "get_act_patch_block_every",
    ],
)
@pytest.mark.parametrize(
    "kwargs", [{}, {"reduce": "none", "baseline": True}], ids=["tensor", "result"]
)
def test_every_pads_and_stacks_like_transformer_lens(name: str, kwargs: dict) -> None:
    metric = per_prompt if kwargs else everywhere
    arguments = (*prompts("tiny:llama"), metric)  # two key heads for four heads
    expected = getattr(theirs, name)(*arguments, **kwargs)
    found = getattr(ours, name)(*arguments, **kwargs)
    if not kwargs:
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        return
    _same_result(found, expected)


@pytest.mark.parametrize("reduce", ["scalar", "mean", "none"])
@pytest.mark.parametrize("baseline", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_reduce_baseline_and_mappings(reduce: str, baseline: bool, several: bool) -> None:
    one = everywhere if reduce == "scalar" else per_prompt
    last = (lambda x: x[:, -1, 5].sum()) if reduce == "scalar" else (lambda x: x[:, -1, 5])
    metric = {"everywhere": one, "last": last} if several else one
    arguments = (*prompts("tiny:llama"), metric)
    expected, found = (
        module.get_act_patch_resid_pre(*arguments, reduce=reduce, baseline=baseline)
        for module in (theirs, ours)
    )
    if isinstance(expected, theirs.PatchingResult):
        _same_result(found, expected)
    else:
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def _same_result(found: object, expected: theirs.PatchingResult) -> None:
    assert isinstance(found, theirs.PatchingResult)
    torch.testing.assert_close(found.values, expected.values, atol=TOLERANCE, rtol=0)
    if expected.baseline is None:
        assert found.baseline is None
    else:
        torch.testing.assert_close(found.baseline, expected.baseline, atol=TOLERANCE, rtol=0)
    pd.testing.assert_frame_equal(found.index_df, expected.index_df)
    for name in ("axis_names", "metric_names", "reduced", "has_metric_axis", "patch_type_names"):
        assert getattr(found, name) == getattr(expected, name), name


def test_index_df_in_any_order_with_negative_positions() -> None:
    bridge, tokens, cache = prompts("tiny:gemma2")
    cells = [(2, -1, 3), (0, 12, 0), (1, 3, 1), (0, -4, -1), (2, 0, 2), (0, 12, 0), (1, 16, 1)]
    index = pd.DataFrame(cells, columns=["layer", "pos", "head"])
    arguments = (bridge, tokens, cache, everywhere)
    expected, found = (
        module.get_act_patch_attn_head_out_by_pos(
            *arguments, index_axis_names=None, index_df=index, return_index_df=True
        )
        for module in (theirs, ours)
    )
    assert found[1] is index
    torch.testing.assert_close(found[0], expected[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("activation", ["resid_post", "z", "mlp_post", "rot_q"])
def test_generic_patch_of_other_activations(activation: str) -> None:
    arguments = (*prompts("tiny:llama"), everywhere, theirs.layer_pos_patch_setter, activation)
    expected, found = (
        module.generic_activation_patch(*arguments, index_axis_names=("layer", "pos"))
        for module in (theirs, ours)
    )
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_patch_setter_of_the_users_own_runs_in_the_loop() -> None:
    def double(activation: Tensor, index: list[int], clean: Tensor) -> Tensor:
        activation[:, index[1]] *= 2
        return activation

    arguments = (*prompts("tiny:gpt2"), everywhere, double, "attn_out")
    with pytest.warns(UserWarning, match="own loop"):
        found = ours.generic_activation_patch(*arguments, index_axis_names=("layer", "pos"))
    expected = theirs.generic_activation_patch(*arguments, index_axis_names=("layer", "pos"))
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_hook_of_the_users_own_sees_every_run() -> None:
    bridge, tokens, cache = prompts("tiny:gpt2")

    def sweep(module: object) -> Tensor:
        return module.get_act_patch_attn_head_out_all_pos(bridge, tokens, cache, everywhere)  # type: ignore[attr-defined]

    plain = sweep(ours)
    with bridge.hooks(fwd_hooks=[("blocks.1.hook_mlp_out", lambda x, hook: 0.5 * x)]):
        expected = sweep(theirs)
        with pytest.warns(UserWarning, match=r"carries a hook at blocks\.1"):
            found = sweep(ours)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert (found - plain).abs().max() > 0.1


def test_cache_of_the_base_run_leaves_every_cell_dead() -> None:
    bridge, tokens, _ = prompts("tiny:gpt2")
    _, cache = bridge.run_with_cache(tokens)
    calls = []

    def metric(logits: Tensor) -> Tensor:
        calls.append(1)
        return everywhere(logits)

    found = ours.get_act_patch_attn_head_out_by_pos(bridge, tokens, cache, metric)
    assert len(calls) == found.numel()
    assert (found == everywhere(bridge(tokens))).all()


def test_cache_that_the_user_changed_is_the_donor() -> None:
    bridge, tokens, _ = prompts("tiny:gpt2")
    _, cache = bridge.run_with_cache(tokens)
    cache["blocks.1.attn.hook_z"][:, 2, 3] = 0.0  # before the first token that differs
    expected, found = (
        module.get_act_patch_attn_head_out_by_pos(bridge, tokens, cache, everywhere)
        for module in (theirs, ours)
    )
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (found != found[0, 0, 0]).sum() == 1
    assert (found[1, 2, 3] - found[0, 0, 0]).abs() > 1e-3


def test_cache_of_one_prompt_serves_a_batch() -> None:
    bridge, tokens, _ = prompts("tiny:llama")
    _, cache = bridge.run_with_cache(bridge.to_tokens(CLEAN))
    expected, found = (
        module.get_act_patch_resid_pre(bridge, tokens, cache, everywhere)
        for module in (theirs, ours)
    )
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def _that_changes(logits: Tensor) -> Tensor:
    logits -= logits.logsumexp(-1, keepdim=True)
    logits[:, :4].zero_()
    return logits[:, :, 7].sum()


@pytest.mark.parametrize("inference", [False, True])
def test_metric_may_change_its_logits(inference: bool) -> None:
    arguments = (*prompts("tiny:llama"), _that_changes)
    with torch.inference_mode(inference), torch.no_grad():
        expected, found = (module.get_act_patch_mlp_out(*arguments) for module in (theirs, ours))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x[:, -1], lambda x: x.detach().numpy()])
def test_metric_may_keep_its_logits(view: Callable[[Tensor], object]) -> None:
    """What a metric keeps is what TransformerLens would have given it, cell by cell."""
    bridge, tokens, cache = prompts("tiny:llama")
    kept: list[object] = []

    def metric(logits: Tensor) -> Tensor:
        kept.append(view(logits.detach()))
        return logits[0, -1, 0]

    found = []
    for module in (theirs, ours):
        kept.clear()
        module.get_act_patch_attn_out(bridge, tokens, cache, metric)
        found.append(torch.stack([torch.as_tensor(logits) for logits in kept]))
    assert found[1].shape == found[0].shape
    torch.testing.assert_close(found[1], found[0], atol=TOLERANCE, rtol=0)


# a sum over logits of order 10, each rounded to 8 or 11 bits: half and a twentieth of its spread
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.3), (torch.float16, 0.03)])
def test_models_of_16_bits_run_in_packed_batches(dtype: torch.dtype, tolerance: float) -> None:
    bridge = load_model("tiny:llama", device="cpu", dtype=dtype)
    clean, corrupted = bridge.to_tokens(CLEAN), bridge.to_tokens(CORRUPTED)
    arguments = (bridge, corrupted, bridge.run_with_cache(clean)[1], everywhere)
    expected, found = (module.get_act_patch_resid_pre(*arguments) for module in (theirs, ours))
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_an_enclosing_autocast_is_left_to_the_loop() -> None:
    arguments = (*prompts("tiny:llama"), everywhere)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = theirs.get_act_patch_attn_out(*arguments)
        with pytest.warns(UserWarning, match="autocast"):
            found = ours.get_act_patch_attn_out(*arguments)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_hook_on_a_module_of_the_model_sees_every_run() -> None:
    bridge, tokens, cache = prompts("tiny:gpt2")
    layer = bridge.original_model.transformer.h[1]
    handle = layer.mlp.register_forward_hook(lambda module, args, output: 0.5 * output)
    try:
        expected = theirs.get_act_patch_attn_out(bridge, tokens, cache, everywhere)
        with pytest.warns(UserWarning, match=r"carries a hook at .*mlp"):
            found = ours.get_act_patch_attn_out(bridge, tokens, cache, everywhere)
    finally:
        handle.remove()
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_hooks_of_the_bridge_itself_are_no_hooks_of_the_users() -> None:
    arguments = (*prompts("tiny:opt"), everywhere)
    expected, found = (module.get_act_patch_mlp_out(*arguments) for module in (theirs, ours))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_four_threads_give_what_one_gives() -> None:
    arguments = (*prompts("tiny:llama"), everywhere)
    names = ["get_act_patch_attn_out", "get_act_patch_mlp_out", "get_act_patch_resid_pre"]
    expected = {name: getattr(ours, name)(*arguments) for name in names}
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda name: getattr(ours, name)(*arguments), names * 4))
    for name, values in zip(names * 4, found, strict=True):
        torch.testing.assert_close(values, expected[name], atol=0, rtol=0)


def test_errors_are_those_of_transformer_lens() -> None:
    bridge, tokens, cache = prompts("tiny:llama")
    for bad in (
        {"patching_metric": per_prompt},
        {"patching_metric": {}},
        {"patching_metric": everywhere, "reduce": "sum"},
        {"patching_metric": everywhere, "reduce": "mean"},
        {"patching_metric": per_prompt, "reduce": "none", "return_index_df": True},
    ):
        texts = []
        for module in (theirs, ours):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 (compared below)
                module.get_act_patch_resid_pre(bridge, tokens, cache, **bad)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


def test_training_mode_is_refused() -> None:
    bridge, tokens, cache = prompts("tiny:gpt2")
    bridge.train()
    try:
        with pytest.raises(ValueError, match="evaluation mode"):
            ours.get_act_patch_resid_pre(bridge, tokens, cache, everywhere)
    finally:
        bridge.eval()


def test_missing_hook_is_the_error_of_transformer_lens() -> None:
    bridge = model("tiny:gpt_neox")  # attention and MLP in parallel: there is no resid_mid
    tokens, (_, cache) = bridge.to_tokens(CORRUPTED), bridge.run_with_cache(CLEAN)
    with pytest.raises(KeyError, match="hook_resid_mid"):
        theirs.get_act_patch_resid_mid(bridge, tokens, cache, everywhere)
    with pytest.raises(KeyError, match="hook_resid_mid"):
        ours.get_act_patch_resid_mid(bridge, tokens, cache, everywhere)


def test_same_public_names_and_signatures() -> None:
    public = {
        name: value
        for name, value in vars(theirs).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == theirs.__name__
    } | {name: getattr(theirs, name) for name in SWEEPS}
    for name, value in public.items():
        assert hasattr(ours, name), name
        if isinstance(value, partial) or inspect.isfunction(value):
            expected = list(inspect.signature(value).parameters.items())
            found = list(inspect.signature(getattr(ours, name)).parameters.items())
            found = [(k, p) for k, p in found if k != "tolerance"]  # our only addition
            assert [(k, p.kind, p.default) for k, p in found] == [
                (k, p.kind, p.default) for k, p in expected
            ], name


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SWEEPS])
def test_same_values_on_smollm2(name: str, smollm2: TransformerBridge) -> None:
    tokens = smollm2.to_tokens(CORRUPTED)
    _, cache = smollm2.run_with_cache(smollm2.to_tokens(CLEAN))
    sweep = getattr(theirs, name)
    sizes = {
        "layer": smollm2.cfg.n_layers,
        "pos": tokens.shape[1],
        "dest_pos": tokens.shape[1],
        "src_pos": tokens.shape[1],
    }
    heads = smollm2.cfg.n_heads
    if sweep.keywords["activation_name"] in ("k", "v"):
        heads = smollm2.cfg.n_key_value_heads
    axes = sweep.keywords["index_axis_names"]
    every = theirs.make_df_from_ranges([sizes.get(axis, heads) for axis in axes], axes)
    index = every.sample(12, random_state=1)
    kwargs = {"index_axis_names": None, "index_df": index}
    expected = sweep(smollm2, tokens, cache, everywhere, **kwargs)
    found = getattr(ours, name)(smollm2, tokens, cache, everywhere, **kwargs)
    # the metric sums 17 x 49152 weighted log-probabilities: in units of its own size
    scale = max(1.0, float(expected.abs().max()) / 10)
    torch.testing.assert_close(found / scale, expected / scale, atol=TOLERANCE, rtol=0)
