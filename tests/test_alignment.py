"""Pairs whose prompts have unequal lengths, beside hooks that write the partner's activation."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.cli.main import main
from patchsweep.data.alignment import NONE, partners
from patchsweep.data.pairs import PromptPairs
from subjects import model
from torch import Tensor

CLEAN = "When John and Mary went to the shops, John gave a bottle of milk to"
CORRUPTED = "When John and Mary went to the big old shops, Mary gave a bottle of milk to"
HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "z": "blocks.{}.attn.hook_z",
    "k": "blocks.{}.attn.hook_k",
}
FAMILIES = ("tiny:llama", "tiny:gpt2", "tiny:gemma2", "tiny:gpt_neox")


@cache
def aligned(name: str, labels: bool = False) -> PromptPairs:
    return PromptPairs.from_strings(
        model(name),
        clean=[CLEAN],
        corrupted=[CORRUPTED],
        answers=[(" Mary", " John")],
        labels=[{"shops": " shops, John"}] if labels else None,
        align="end",
    )


def prompts(pairs: PromptPairs, direction: str) -> tuple[list[int], list[int]]:
    clean, corrupted = list(pairs[0].clean), list(pairs[0].corrupted)
    return (corrupted, clean) if direction == "denoising" else (clean, corrupted)


def logit_diff(pairs: PromptPairs, logits: Tensor) -> Tensor:
    last = logits[:, -1]
    return last[:, pairs[0].answer[0]] - last[:, pairs[0].wrong_answer[0]]


@torch.no_grad()
def looped(name: str, direction: str, site: str) -> np.ndarray:
    """[layer, pos(, head)] the metric with one partner's activation written, NaN without one."""
    bridge, pairs = model(name), aligned(name)
    base, source = prompts(pairs, direction)
    _, cache_ = bridge.run_with_cache(torch.tensor([source]))
    hooks = [HOOKS[site].format(layer) for layer in range(bridge.cfg.n_layers)]
    heads = range(cache_[hooks[0]].shape[2]) if site in ("z", "k") else [slice(None)]
    found = np.full((len(hooks), len(base), len(heads)), np.nan)
    for layer, hook in enumerate(hooks):
        for pos, partner in enumerate(partners(base, source)):
            for i, head in enumerate(heads if partner != NONE else ()):

                def write(x: Tensor, hook: Any) -> Tensor:
                    x[0, pos, head] = cache_[hook.name][0, partner, head]  # noqa: B023
                    return x

                logits = bridge.run_with_hooks(torch.tensor([base]), fwd_hooks=[(hook, write)])
                found[layer, pos, i] = logit_diff(pairs, logits)
    return found if site in ("z", "k") else found[..., 0]


def test_partners() -> None:
    longer, shorter = [0, 1, 7, 8, 9, 2, 3], [0, 1, 5, 2, 3]
    assert partners(shorter, longer).tolist() == [0, 1, 4, 5, 6]
    assert partners(longer, shorter).tolist() == [0, 1, NONE, NONE, 2, 3, 4]
    assert partners([0, 1], [0, 1, 2]).tolist() == [0, 1]
    assert partners([0, 1, 2], [0, 1]).tolist() == [0, 1, NONE]
    assert partners([0, 1, 2], [9, 1, 3]).tolist() == [0, 1, 2]


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", FAMILIES)
def test_sweeps_write_the_partners_activation(name: str, direction: Any) -> None:
    pairs = aligned(name)
    packed, hooked = (
        ps.sweep(model(name), pairs, [*HOOKS], direction=direction, runner=runner)
        for runner in ("packed", "hooked")
    )
    base, source = prompts(pairs, direction)
    with torch.no_grad():
        for run, tokens in (("base_metric", base), ("source_metric", source)):
            expected = float(logit_diff(pairs, model(name)(torch.tensor([tokens]))))
            assert packed[run].item() == pytest.approx(expected, abs=1e-4)
    for site in HOOKS:
        expected = looped(name, direction, site)
        assert np.isnan(expected).any() == (direction == "denoising")
        effect = np.nanmax(np.abs(expected - packed["base_metric"].item()))
        assert effect > 0.15, "else equal values would show nothing"
        for ds in (packed, hooked):
            np.testing.assert_allclose(ds[site].values[0, 0], expected, atol=1e-4)
    assert packed.attrs["align"] == "end"
    tokens = packed["source_token"].values[0]
    assert ("" in tokens) == (direction == "denoising")
    assert tokens[-1] == packed["base_token"].values[0][-1] == " to"


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_gradients_multiply_the_partners_change(site: str, direction: Any) -> None:
    name = "tiny:llama"
    bridge, pairs = model(name), aligned(name)
    base, source = prompts(pairs, direction)
    with torch.no_grad():
        _, cache_ = bridge.run_with_cache(torch.tensor([source]))
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any, name: str) -> Tensor:
        kept[name] = x if x.requires_grad else x.requires_grad_()
        kept[name].retain_grad()
        return kept[name]

    hooks = [HOOKS[site].format(layer) for layer in range(bridge.cfg.n_layers)]
    logits = bridge.run_with_hooks(
        torch.tensor([base]), fwd_hooks=[(h, partial(keep, name=h)) for h in hooks]
    )
    logit_diff(pairs, logits).sum().backward()
    at = partners(base, source)
    expected = np.stack(
        [
            ((cache_[h][0, at] - kept[h][0]) * kept[h].grad[0]).sum(-1).detach().numpy()
            for h in hooks
        ]
    )
    expected[:, at == NONE] = np.nan
    ds = ps.sweep(bridge, pairs, site, method="atp", direction=direction)
    assert np.nanmax(np.abs(expected)) > 0.1
    np.testing.assert_allclose(ds[f"{site}_atp"].values[0, 0], expected, atol=1e-4)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_a_tolerance_holds(direction: Any) -> None:
    bridge, pairs = model("tiny:llama"), aligned("tiny:llama")
    exact, within = (
        ps.sweep(bridge, pairs, ["resid_pre", "z"], direction=direction, tolerance=tolerance)
        for tolerance in (None, 0.05)
    )
    for site in ("resid_pre", "z"):
        np.testing.assert_allclose(within[site], exact[site], atol=0.05)
        assert (np.isnan(exact[site]) == np.isnan(within[site])).all()


@pytest.mark.parametrize("runner", ["packed", "hooked"])
def test_joint_patches_are_those_of_the_sweep(runner: Any) -> None:
    bridge, pairs = model("tiny:llama"), aligned("tiny:llama", labels=True)
    ds = ps.sweep(bridge, pairs, "z", positions=[-1, "shops"])
    sets = [ps.Patch("z", layer=1, head=2, pos=pos) for pos in (-1, "end", "shops")]
    joint = ps.run_patches(bridge, pairs, sets, runner=runner)["patched"].values[0, 0]
    cells = ds["z"].sel(layer=1, head=2).values[0, 0]
    np.testing.assert_allclose(joint, [cells[0], cells[0], cells[1]], atol=1e-4)
    # the same prompts, the other way round: the label is where the clean prompt has it
    other = ps.sweep(bridge, pairs, "z", positions=["shops"], direction="noising")
    assert other["base_token"].item() == " shops, John"
    assert ds["base_token"].values[0, 1] == " shops, Mary"


def test_pairs_of_several_lengths_share_a_sweep() -> None:
    bridge = model("tiny:llama")
    equal = CLEAN.replace("John gave", "Mary gave")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, CLEAN, CORRUPTED],
        corrupted=[CORRUPTED, equal, CLEAN],
        answers=[(" Mary", " John")] * 2 + [(" John", " Mary")],
        align="end",
    )
    together = ps.sweep(bridge, pairs, "z", tolerance=None)
    assert together["pos"].values.tolist()[-1] == -1
    for i in range(3):
        alone = ps.sweep(bridge, pairs[i : i + 1], "z")["z"].values[0, 0]
        mine = together["z"].values[0, i, :, -alone.shape[1] :]
        np.testing.assert_allclose(mine, alone, atol=1e-5)


def test_a_store_keeps_and_the_command_line_takes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["task=strings", f"task.clean='{CLEAN}'", f"task.corrupted='{CORRUPTED}'"]
    words += ["task.answer=' Mary'", "task.wrong_answer=' John'", "model=tiny:llama"]
    words += ["sites=[resid_pre,z]"]
    assert main(["run", *words, "store=a.zarr"]) == 2
    assert main(["run", *words, "task.align=end", "store=a.zarr"]) == 0
    assert main(["report", "a.zarr"]) == 0
    page = Path("report.html").read_text()
    assert "unfinished" not in page  # all that can run has
    assert "no position of the source prompt corresponds" in page
    expected = ps.sweep(model("tiny:llama"), aligned("tiny:llama"), ["resid_pre", "z"])
    np.testing.assert_array_equal(ps.open_store("a.zarr")["z"], expected["z"])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sites": "rot_k"}, "site rot_k holds the positions of its prompt"),
        ({"sites": "pattern"}, "site pattern holds the positions of its prompt"),
        ({"sites": "z", "intervention": "mean"}, "takes values from other prompts"),
        ({"sites": "z", "intervention": "shuffle"}, "takes values from other prompts"),
        ({"sites": "z", "positions": "all"}, "positions='all' covers position"),
        ({"sites": "z", "method": "ig_inputs"}, "prompts of unequal lengths; use atp"),
        ({"sites": "z", "method": "atp_ends"}, "prompts of unequal lengths; use atp"),
        ({"sites": "z", "read": 8}, "read=8 is a position of the base prompt that no position"),
    ],
)
def test_what_has_no_meaning_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ps.PatchsweepError, match=words):
        ps.sweep(model("tiny:llama"), aligned("tiny:llama"), **given)


@pytest.mark.parametrize(
    "analysis",
    [ps.edges, ps.circuit, ps.attention, ps.study, ps.continuations],
)
def test_analyses_that_compare_tokens_refuse_them(analysis: Any) -> None:
    with pytest.raises(ps.PatchsweepError, match="token by token"):
        analysis(model("tiny:llama"), aligned("tiny:llama"))


def test_a_joint_patch_without_a_partner_is_refused() -> None:
    bridge, pairs = model("tiny:llama"), aligned("tiny:llama")
    for patch in (ps.Patch("z", layer=0), ps.Patch("z", layer=0, pos=8)):
        with pytest.raises(ps.PatchsweepError, match="to which no position of the source"):
            ps.run_patches(bridge, pairs, [patch])
    zero = ps.Patch("z", layer=0, intervention="zero")
    ps.run_patches(bridge, pairs, [zero], direction="denoising")  # needs no source value
    ps.run_patches(bridge, pairs, [ps.Patch("z", layer=0)], direction="noising")


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_the_lens_patches_in_the_partner(direction: Any) -> None:
    name = "tiny:llama"
    bridge, pairs = model(name), aligned(name)
    base, _ = prompts(pairs, direction)
    patch = ps.Patch("z", layer=1, head=2, pos=len(base) - 2)
    ds = ps.lens(bridge, pairs, patch=[patch], direction=direction)
    last = ds.sel(run="patched", layer=bridge.cfg.n_layers - 1, point="resid_post").isel(pos=-1)
    read = (last["answer_log_prob"] - last["wrong_log_prob"]).item()
    swept = ps.sweep(bridge, pairs, "z", direction=direction)["z"]
    expected = swept.sel(layer=1, head=2).values[0, 0, len(base) - 2]
    assert read == pytest.approx(float(expected), abs=1e-4)
    unpatched = ps.sweep(bridge, pairs, "z", direction=direction)["base_metric"].item()
    assert abs(read - unpatched) > 1e-3


@pytest.mark.slow
@torch.no_grad()
def test_a_trained_model_takes_the_partners_activation() -> None:
    name = "smollm2-135m"
    bridge, pairs = model(name), aligned(name)
    base, source = prompts(pairs, "denoising")
    _, cache_ = bridge.run_with_cache(torch.tensor([source]))
    ds = ps.sweep(bridge, pairs, ["resid_pre", "z"], layers=[3, 23], positions=[-7, -1])
    base_metric = ds["base_metric"].item()
    for site, cells in (("resid_pre", [(3, -7), (23, -1)]), ("z", [(23, -1, 3), (23, -7, 0)])):
        for layer, pos, *head in cells:
            partner = partners(base, source)[pos]

            def write(x: Tensor, hook: Any) -> Tensor:
                x[(0, pos, *head)] = cache_[hook.name][(0, partner, *head)]  # noqa: B023
                return x

            hooks = [(HOOKS[site].format(layer), write)]
            logits = bridge.run_with_hooks(torch.tensor([base]), fwd_hooks=hooks)
            cell = ds[site].sel(layer=layer, pos=pos, **({"head": head[0]} if head else {}))
            assert cell.item() == pytest.approx(logit_diff(pairs, logits).item(), abs=1e-3)
    # the name that differs brings the answer back, and head a23.h3 at the end half of it
    gap = ds["source_metric"].item() - base_metric
    assert (ds["resid_pre"].sel(layer=3, pos=-7).item() - base_metric) / gap > 0.9
    assert (ds["z"].sel(layer=23, pos=-1, head=3).item() - base_metric) / gap > 0.3


def test_a_trace_needs_no_partner() -> None:
    bridge = model("tiny:llama")
    pairs = [
        PromptPairs.from_strings(
            bridge,
            clean=[CORRUPTED],
            corrupted=[other],
            answers=[(" John", " Mary")],
            labels=[{"subject": (2, 4)}],
            align="end",
        )
        for other in (CLEAN, CORRUPTED.replace("Mary gave", "John gave"))
    ]
    unequal, equal = (
        ps.trace(bridge, one, ps.Noise("subject", samples=2), window=2) for one in pairs
    )
    np.testing.assert_allclose(unequal["effect"], equal["effect"], atol=1e-6)
