"""Recipes of the field's notebooks, each done its own way and by the call of the docs' page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.cli import main
from patchsweep.errors import ConfigError, PlanError, PromptError
from patchsweep.results import accessor as summary
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from torch import Tensor
from transformer_lens import patching
from transformer_lens.head_detector import detect_head

NAME = "tiny:llama"
EQUAL = {"atol": 1e-4, "rtol": 0}  # other orders of the same fp32 products
PAGE = Path(__file__).resolve().parents[1] / "docs" / "from_your_notebook.md"


class Notebook:
    """What the first cells of a notebook set up."""

    def __init__(self) -> None:
        self.model, self.pairs = model(NAME), demo_pairs(NAME)
        (pair,) = self.pairs
        self.clean, self.corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
        self.right, self.wrong = pair.answer[0], pair.wrong_answer[0]
        with torch.no_grad():
            self.clean_logits, self.clean_cache = self.model.run_with_cache(self.clean)
            self.corrupted_logits, self.cache = self.model.run_with_cache(self.corrupted)

    def metric(self, logits: Tensor) -> Tensor:
        return logits[0, -1, self.right] - logits[0, -1, self.wrong]


@pytest.fixture(scope="module")
def nb() -> Notebook:
    return Notebook()


def same(mine: Any, theirs: Any, size: float = 0.1) -> None:
    """Equal, and of a size that a wrong value would not have by chance."""
    mine, theirs = np.asarray(mine, float), np.asarray(theirs, float)
    assert np.ptp(theirs) > size
    np.testing.assert_allclose(mine, theirs, **EQUAL)


def test_activation_patching_of_the_stream_and_of_heads(nb: Notebook) -> None:
    with torch.no_grad():
        args = (nb.model, nb.corrupted, nb.clean_cache, nb.metric)
        stream = patching.get_act_patch_resid_pre(*args)
        heads = patching.get_act_patch_attn_head_out_all_pos(*args)
    same(ps.sweep(nb.model, nb.pairs, "resid_pre")["resid_pre"][0, 0], stream)
    same(ps.sweep(nb.model, nb.pairs, "z", positions="all")["z"][0, 0], heads)


def test_attribution_patching(nb: Notebook) -> None:
    grads: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook: Any, name: str) -> None:
        grads[name] = grad.detach().clone()

    names = [f"blocks.{layer}.hook_resid_pre" for layer in (1, 2)]
    with nb.model.hooks(bwd_hooks=[(name, partial(keep, name=name)) for name in names]):
        nb.metric(nb.model(nb.corrupted)).backward()
    nb.model.zero_grad()
    estimate = [((nb.clean_cache[n] - nb.cache[n]) * grads[n])[0].sum(-1).numpy() for n in names]
    found = ps.sweep(nb.model, nb.pairs, "resid_pre", method="atp")
    same(found["resid_pre_atp"][0, 0, 1:], estimate)


def test_path_patching_of_a_heads_direct_effect(nb: Notebook) -> None:
    layer, head = 1, 2
    z = f"blocks.{layer}.attn.hook_z"
    change = (nb.clean_cache[z] - nb.cache[z])[0, :, head]
    w_o = nb.model.blocks[layer].attn.W_O[head]
    last = f"blocks.{nb.model.cfg.n_layers - 1}.hook_resid_post"
    with torch.no_grad():
        final = nb.cache[last] + (change @ w_o)[None]
        value = nb.metric(nb.model.unembed(nb.model.ln_final(final))).item()
    found = ps.exact_edges(nb.model, nb.pairs, [f"a{layer}.h{head}->logits"])
    base = nb.metric(nb.corrupted_logits).item()
    assert abs(value - base) > 0.01
    assert found["edge"].item() == pytest.approx(value, abs=1e-4)


def test_the_logit_lens_of_pairs_and_of_one_text(nb: Notebook) -> None:
    with torch.no_grad():
        logs = [
            nb.model.unembed(
                nb.model.ln_final(nb.clean_cache[f"blocks.{i}.hook_resid_post"])
            ).log_softmax(-1)[0]
            for i in range(3)
        ]
    theirs = torch.stack(logs)
    found = ps.lens(nb.model, nb.pairs).isel(run=0, pair=0).sel(point="resid_post")
    same(found["answer_log_prob"], theirs[:, :, nb.right])
    text = ps.lens(nb.model, CLEAN, top=1).isel(run=0, pair=0).sel(point="resid_post")
    same(text["top_prob"].squeeze("top"), theirs.exp().amax(-1), size=0.001)
    first = nb.clean_logits[0, -1].topk(2).indices.tolist()
    names = [nb.model.tokenizer.decode([i]) for i in first]
    assert [text["answer"].item(), text["wrong_answer"].item()] == names


def test_removing_a_sublayer(nb: Notebook) -> None:
    def zero(x: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(x)

    with torch.no_grad():
        hooks = [("blocks.1.hook_mlp_out", zero)]
        logits = nb.model.run_with_hooks(nb.clean, fwd_hooks=hooks)
    theirs = logits[0].log_softmax(-1)[:, nb.right]
    found = ps.lens(nb.model, nb.pairs, remove=("mlp", 1)).sel(run="patched", point="resid_post")
    same(found["answer_log_prob"].isel(pair=0, layer=-1), theirs)


def test_ablating_every_head(nb: Notebook) -> None:
    def zero(z: Tensor, hook: Any, head: int) -> Tensor:
        z = z.clone()
        z[:, :, head] = 0
        return z

    with torch.no_grad():
        theirs = [
            [
                nb.metric(
                    nb.model.run_with_hooks(
                        nb.clean,
                        fwd_hooks=[(f"blocks.{layer}.attn.hook_z", partial(zero, head=head))],
                    )
                ).item()
                for head in range(4)
            ]
            for layer in range(3)
        ]
    same(ps.sweep(nb.model, nb.pairs, "z", positions="all", intervention="zero")["z"][0, 0], theirs)


def test_detecting_heads_on_a_text_of_ones_own(nb: Notebook) -> None:
    text = "When John went to the shops and John went to the park"
    found = ps.detect_heads(nb.model, text)
    for name in ("induction", "previous_token", "duplicate_token"):
        theirs = detect_head(nb.model, text, f"{name}_head", exclude_bos=True)
        same(found.sel(pattern=name), theirs, size=0.001)
    both = ps.detect_heads(nb.model, [text, CLEAN])
    same(both, (found + ps.detect_heads(nb.model, CLEAN)) / 2, size=0.001)
    with pytest.raises(PromptError, match="text=5 must be a text"):
        ps.detect_heads(nb.model, 5)  # type: ignore[arg-type]


def test_patterns_of_heads_of_one_text(nb: Notebook) -> None:
    found = ps.attention(nb.model, CLEAN, heads=["a1.h2", (-1, 0)])
    assert found["rank_layer"].values.tolist() == [1, 2]
    for rank, (layer, head) in enumerate([(1, 2), (2, 0)]):
        theirs = nb.clean_cache[f"blocks.{layer}.attn.hook_pattern"][0, head]
        same(found["pattern"].isel(run=0, pair=0, rank=rank), theirs)
    with pytest.raises(PlanError, match="no attributions to rank heads by"):
        ps.attention(nb.model, CLEAN)


def test_what_a_model_says_of_both_answers(nb: Notebook, tmp_path: Path, capsys: Any) -> None:
    check = ps.check_pairs(nb.model, nb.pairs)
    clean, corrupted = check.answers
    rows = (
        (clean, nb.clean_logits, (nb.right, nb.wrong)),
        (corrupted, nb.corrupted_logits, (nb.wrong, nb.right)),
    )
    for one, logits, (right, wrong) in rows:
        row = logits[0, -1]
        same([one.right_prob, one.wrong_prob], row.softmax(-1)[[right, wrong]], size=0)
        assert one.right_rank == (row > row[right]).sum()
        assert one.wrong_rank == (row > row[wrong]).sum()
    assert [clean.right, corrupted.right] == [" Mary", " John"]
    path = tmp_path / "pairs.csv"
    path.write_text(
        f'clean,corrupted,answer,wrong_answer\n"{CLEAN}","{CORRUPTED}"," Mary"," John"\n'
    )
    assert main(["task", "check", str(path), "--model", NAME]) == 0
    said = capsys.readouterr().out
    assert f"{clean.right_rank:,}".replace(",", "\u202f") in said
    assert main(["task", "check", str(tmp_path / "none.csv"), "--model", NAME]) == 2


def test_classes_of_heads_of_ones_own(nb: Notebook, caplog: pytest.LogCaptureFixture) -> None:
    asked: dict[str, Any] = {"ablations": ["resample", "zero"], "optimal": None}
    ds = ps.study(nb.model, nb.pairs, classes={"mine": [(1, 2), "a2.h0"]}, **asked)
    member = ds["member"].sel(head_class="mine").transpose("layer", "head").values
    assert np.argwhere(member).tolist() == [[1, 2], [2, 0]]
    effect = ds["ablated"] - ds["base_metric"]
    zero, resample = (effect.sel(ablation=a).isel(metric=0, pair=0) for a in ("zero", "resample"))
    theirs = float(abs(zero - resample).transpose("layer", "head").values[member].mean())
    table = ds["disagreement"].isel(metric=0).sel(table_class="mine", ablation="zero")
    assert table.item() == pytest.approx(theirs, abs=1e-5)
    assert ds["head_class"].values[-1] == "other"
    assert "mine" in ds.patchsweep.report().html
    assert "no name_mover, negative, s_inhibition, backup heads are told" in caplog.text
    for classes, error, words in (
        ({"induction": [(0, 0)]}, ConfigError, "give a name of your own"),
        ({"mine": [(9, 9)]}, PlanError, "is no head of 3 layers of 4"),
    ):
        with pytest.raises(error, match=words):
            ps.study(nb.model, nb.pairs, classes=classes, **asked)


def test_every_checked_row_of_the_page_has_its_call_in_a_test() -> None:
    tests = Path(__file__).read_text()
    rows = [line for line in PAGE.read_text().splitlines() if line.endswith("| ✓ |")]
    assert len(rows) >= 9
    for row in rows:
        calls = {part.split("(")[0] for part in row.split("`") if part.startswith("ps.")}
        assert calls
        assert all(call in tests for call in calls if call != "ps.sublayers")


def test_largest_names_what_the_page_normalises() -> None:
    ds = ps.sweep(model(NAME), demo_pairs(NAME), "resid_pre")
    one = summary.recovered(ds, "resid_pre").sel(layer=0, pos=10).item()
    assert one == pytest.approx(1, abs=1e-4)  # the whole difference enters there
