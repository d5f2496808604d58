"""Every hook point of ten families: what a patch there does equals a hook, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.logit_lens import Patch, lens
from patchsweep.errors import SiteError
from patchsweep.models import TINY_FAMILIES
from patchsweep.models.load import as_bridge
from patchsweep.models.running import running
from patchsweep.models.tiny import draw_weights, tiny_tokenizer
from patchsweep.runners.hook_points import STREAM, check_names, refusals
from patchsweep.spec.sites import Site, get_sites
from patchsweep.spec.spec import model_shape
from patchsweep.store.attributes import attributes
from subjects import CLEAN, CORRUPTED, demo_pairs, model, quick
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM

# fp32 logits of order 10 after two passes of different batch shapes
TOLERANCE = 1e-4


def change(x: Tensor) -> Tensor:
    """Another value at every place of a vector; positive numbers, such as scales, stay positive."""
    flat = x.flatten(2)
    return (flat * torch.linspace(0.3, 1.1, flat.shape[-1]) + 0.1).view_as(x)


def changed(site: Any, layer: int, base: Tensor, source: Tensor) -> Tensor:
    return change(base)


@contextmanager
def settings_on(bridge: TransformerBridge, hook: str) -> Iterator[None]:
    """What a user would switch on before hooking `hook`."""
    endings = {
        "attn.hook_result": "use_attn_result",
        "_input": "use_split_qkv_input",
        "mlp_in": "use_hook_mlp_in",
        "attn_in": "use_attn_in",
    }
    names = [name for end, name in endings.items() if hook.endswith(end)]
    for name in names:
        getattr(bridge, f"set_{name}")(True)
    try:
        yield
    finally:
        for name in names:
            getattr(bridge, f"set_{name}")(False)


def by_hook(bridge: TransformerBridge, tokens: Tensor, hook: str) -> Tensor:
    """Logits `[d_vocab]` of a plain pass with one hook, which returns its new value."""

    def put(x: Tensor, hook: Any) -> Tensor:
        if name.rpartition(".")[2] in STREAM:  # documented: replaced for every reader
            return x.copy_(change(x))
        return change(x)

    name = hook
    with settings_on(bridge, hook), torch.no_grad():
        logits: Tensor = bridge.run_with_hooks(tokens, fwd_hooks=[(hook, put)])
    return logits[0, -1]


def distinct(bridge: TransformerBridge) -> list[str]:
    """Names of hook points, one for each and one more for the stream."""
    found: dict[tuple[int, bool], str] = {}
    for name, point in bridge.hook_dict.items():
        found.setdefault((id(point), name.rpartition(".")[2] in STREAM), name)
    return list(found.values())


def partition(
    bridge: TransformerBridge, names: list[str], tokens: Tensor
) -> tuple[list[Site], dict[str, str]]:
    """Sites that can be patched, and why the others cannot."""
    refused: dict[str, str] = {}
    sites = []
    for name in names:
        (site,) = get_sites([name])
        try:
            check_names(bridge, [site])
            sites.append(site)
        except SiteError as error:
            refused[name] = str(error)
    for site, reason in refusals(bridge, sites, model_shape(bridge), tokens).items():
        refused[site.hook] = reason
    return [site for site in sites if site.hook not in refused], refused


@cache
def one_key_head() -> TransformerBridge:
    """Grouped heads with a single key head, which hooks see as a view broadcast over the heads."""
    sizes = {**TINY_FAMILIES["llama"][1], "num_key_value_heads": 1}
    tokenizer = tiny_tokenizer()
    config = AutoConfig.for_model("llama", **sizes, vocab_size=len(tokenizer))
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    plain.config.architectures = [type(plain).__name__]
    draw_weights(plain, seed=0)
    return as_bridge("one-key-head", plain, tokenizer)


@pytest.mark.parametrize(
    "family",
    quick([*TINY_FAMILIES, "one key head"], "gpt2", "llama", "gemma2", "gpt_neox", "one key head"),
)
def test_every_hook_point_equals_a_hook_or_is_refused(family: str) -> None:
    bridge = one_key_head() if family == "one key head" else model(f"tiny:{family}")
    pairs = ps.PromptPairs.from_strings(
        bridge, clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
    tokens = torch.tensor([pairs[0].clean])
    with running(bridge):
        sites, refused = partition(bridge, distinct(bridge), tokens)
    assert not any(text == "" for text in refused.values())
    answer, wrong = pairs[0].answer[0], pairs[0].wrong_answer[0]
    names = [site.hook for site in sites]
    ds = ps.sweep(
        bridge,
        pairs,
        names,
        positions="all",
        intervention=changed,
        direction="noising",
        runner="hooked",
    )
    effects = []
    for site in sites:
        logits = by_hook(bridge, tokens, site.hook)
        expected = float(logits[answer] - logits[wrong])
        assert abs(ds[site.name].item() - expected) < TOLERANCE, site.hook
        effects.append(abs(expected - ds["base_metric"].item()))
    assert len(effects) > 90
    assert np.mean(np.array(effects) > 1e-2) > 0.9  # else equality would prove little


# hook point -> a word of the reason
REFUSED = {
    "embed.hook_in": "int64",
    "blocks.1.attn.hook_attn_scores": "shape",
    "rotary_emb.hook_in": "reaches no logit",
}


@pytest.mark.parametrize("hook", REFUSED)
def test_a_hook_point_that_cannot_be_patched_is_a_site_error(hook: str) -> None:
    with pytest.raises(SiteError, match=REFUSED[hook]):
        ps.sweep(model("tiny:llama"), demo_pairs("tiny:llama"), [hook], positions="all")


def test_a_hook_that_fires_twice_is_refused() -> None:
    with pytest.raises(SiteError, match="fires 2 times"):
        ps.sweep(
            model("tiny:gemma3"),
            demo_pairs("tiny:gemma3"),
            ["rotary_emb.hook_cos"],
            positions="all",
        )


@pytest.mark.parametrize("hook", ["blocks.1.ln2.hook_normalized", "blocks.1.ln1.hook_in"])
def test_the_lens_patches_a_hook_point_as_a_hook_does(hook: str) -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    answer = pairs[0].answer[0]
    ds = lens(bridge, pairs, patch=Patch(hook, intervention=changed), which="clean")
    found = ds["answer_log_prob"].sel(run="patched", point="resid_post").isel(pair=0, layer=-1)
    logits = by_hook(bridge, torch.tensor([pairs[0].clean]), hook)
    assert abs(found.values[-1] - float(logits.log_softmax(-1)[answer])) < TOLERANCE
    unpatched = (
        ds["answer_log_prob"].sel(run="unpatched", point="resid_post").isel(pair=0, layer=-1)
    )
    assert abs(found.values[-1] - unpatched.values[-1]) > 1e-2


def test_settings_are_as_they_were_after_a_sweep() -> None:
    bridge, pairs = model("tiny:llama"), demo_pairs("tiny:llama")
    names = ("use_attn_result", "use_split_qkv_input", "use_hook_mlp_in", "use_attn_in")
    hooks = ["blocks.1.hook_mlp_in", "blocks.1.attn.hook_q_input", "blocks.1.attn.hook_attn_in"]
    before = [bool(getattr(bridge.cfg, name)) for name in names]
    ps.sweep(bridge, pairs, [*hooks, "result"], positions=[16], layers=[1], runner="hooked")
    assert [bool(getattr(bridge.cfg, name)) for name in names] == before


def test_result_without_its_setting_is_refused_with_the_remedy() -> None:
    bridge, pairs = model("tiny:opt"), demo_pairs("tiny:opt")
    options: dict[str, Any] = {"layers": [1], "positions": [9, 16]}
    with pytest.raises(SiteError, match=r"site result: .*use_attn_result.*runner=packed"):
        ps.sweep(bridge, pairs, "result", runner="hooked", **options)
    found = ps.sweep(bridge, pairs, "result", runner="packed", **options)["result"]
    expected = ps.sweep(bridge, pairs, "z", runner="hooked", **options)["z"]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


THINGS = ("milk", "drink", "bag", "ring")


@pytest.mark.parametrize("intervention", ["resample", "zero", "mean", "mean_all"])
def test_result_runs_in_packed_passes_under_means_too(intervention: str) -> None:
    bridge = model("tiny:llama")
    pairs = ps.PromptPairs.from_strings(
        bridge,
        clean=[CLEAN.replace("milk", word) for word in THINGS],
        corrupted=[CORRUPTED.replace("milk", word) for word in THINGS],
        answers=[(" Mary", " John")] * len(THINGS),
    )
    options: dict[str, Any] = {"sites": "result", "intervention": intervention, "layers": [0, 1]}
    found = ps.sweep(bridge, pairs, **options)
    assert attributes(found)["provenance"]["runner"] == "packed"
    expected = ps.sweep(bridge, pairs, runner="hooked", **options)
    np.testing.assert_allclose(found["result"], expected["result"], atol=TOLERANCE)
    assert float(abs(expected["result"] - expected["base_metric"]).max()) > 1e-2
