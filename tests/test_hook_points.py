"""Every hook point of ten families: what a patch there does equals a hook, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import SiteError
from patchsweep.hook_points import STREAM, check_names, refusals
from patchsweep.models import TINY_FAMILIES
from patchsweep.request import model_shape
from patchsweep.running import running
from patchsweep.sites import Site, get_sites
from subjects import demo_pairs, model
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

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


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_hook_point_equals_a_hook_or_is_refused(family: str) -> None:
    bridge, pairs = model(f"tiny:{family}"), demo_pairs(f"tiny:{family}")
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
