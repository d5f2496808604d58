"""Heads: ablations side by side, optimal constants, classes, and how far the ablations part."""

from __future__ import annotations

from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import subjects
import torch
import xarray as xr
from patchsweep.analyses.heads import OptimalSettings, Thresholds, disagreement, effects, study
from patchsweep.analyses.heads.classes import (
    Behaviour,
    detected_classes,
    member_table,
    task_classes,
)
from patchsweep.analyses.heads.findings import ALL, TRAINED
from patchsweep.analyses.heads.optimal import Trainer
from patchsweep.analyses.heads.scores import DETECTED, detect_heads, texts
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, ModelError, PatchsweepError
from patchsweep.store.attributes import attributes
from patchsweep.tasks import load_task
from torch import Tensor
from transformer_lens.head_detector import detect_head

# fp32 logits of two implementations of the same sums; those of tiny models are about 10
CLOSE = 2e-4
N_PAIRS = 3


@cache
def pairs_of(name: str) -> PromptPairs:
    return load_task(subjects.model(name), "ioi", N_PAIRS)


@cache
def studied(name: str) -> xr.Dataset:
    return study(
        subjects.model(name),
        pairs_of(name),
        ["logit_diff", "logit"],
        optimal=OptimalSettings(heads=3, steps=20),
    )


def clean_run(name: str, pair: int) -> Tensor:
    return torch.tensor([pairs_of(name)[pair].clean])


def hooked(name: str, tokens: Tensor, layer: int, head: int, value: Tensor) -> Tensor:
    """Last logits of a run in which a head's z is `value`, by a hook of the bridge."""

    def put(z: Tensor, hook: object) -> Tensor:
        z[:, :, head] = value
        return z

    with torch.no_grad():
        logits = subjects.model(name).run_with_hooks(
            tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)]
        )
    return logits[0, -1]


def z_of(name: str, tokens: Tensor) -> list[Tensor]:
    """Per layer z [pos, head, d] of one prompt."""
    model = subjects.model(name)
    with torch.no_grad():
        _, kept = model.run_with_cache(tokens)
    return [kept[f"blocks.{i}.attn.hook_z"][0] for i in range(model.cfg.n_layers)]


@cache
def mean_z(name: str) -> Tensor:
    """[layer, head, d]: over every position of every clean prompt."""
    runs = [torch.stack(z_of(name, clean_run(name, i))) for i in range(N_PAIRS)]
    return torch.cat(runs, dim=1).mean(dim=1)


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_ablation_equals_a_hook_loop(name: str, ablation: str) -> None:
    ds = studied(name).sel(ablation=ablation, metric="logit_diff")
    for i, pair in enumerate(pairs_of(name)):
        source = z_of(name, torch.tensor([pair.corrupted]))
        for layer in range(ds.sizes["layer"]):
            for head in range(ds.sizes["head"]):
                value = {
                    "resample": source[layer][:, head],
                    "mean": mean_z(name)[layer, head],
                    "zero": torch.zeros(()),
                }[ablation]
                logits = hooked(name, clean_run(name, i), layer, head, value)
                expected = float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]])
                cell = ds["ablated"].transpose("pair", "layer", "head").values[i, layer, head]
                assert cell == pytest.approx(expected, abs=CLOSE), (i, layer, head)


def test_positions_are_patched_one_by_one() -> None:
    pairs = load_task(subjects.model("tiny:llama"), "ioi", 4)
    ds = study(
        subjects.model("tiny:llama"),
        pairs,
        ablations=["resample", "zero", "mean_label"],
        positions=["S2", "end"],
        optimal=None,
    )
    swept = ps.sweep(
        subjects.model("tiny:llama"),
        pairs,
        "z",
        positions=["S2", "end"],
        intervention="mean_label",
    )
    assert np.array_equal(ds["ablated"].sel(ablation="mean_label").values, swept["z"].values)
    assert ds["ablated"].dims == ("ablation", "metric", "pair", "layer", "pos", "head")
    assert ds["pos"].values.tolist() == ["S2", "end"]
    pair = pairs[0]
    first, stop = pair.labels["S2"]

    def put(z: Tensor, hook: object) -> Tensor:
        z[:, first:stop, 2] = 0
        return z

    with torch.no_grad():
        logits = subjects.model("tiny:llama").run_with_hooks(
            torch.tensor([pair.clean]), fwd_hooks=[("blocks.1.attn.hook_z", put)]
        )[0, -1]
    expected = float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]])
    cell = ds["ablated"].sel(ablation="zero", pos="S2", layer=1, head=2, pair=0).item()
    assert cell == pytest.approx(expected, abs=CLOSE)
    # every position of a head counts in the table
    assert ds["n_heads"].sel(ablation="zero", table_class=ALL).item() == 2 * ds["member"][0].size


# optimal ablation


def kl(name: str, layer: int, head: int, value: Tensor) -> Tensor:
    """Mean KL(original || ablated) over the prompts, by hooks of the bridge, differentiable."""
    model, losses = subjects.model(name), []
    for i in range(N_PAIRS):
        tokens = clean_run(name, i)
        with torch.no_grad():
            p = model(tokens)[0, -1].log_softmax(dim=-1)

        def put(z: Tensor, hook: object) -> Tensor:
            kept = list(z.unbind(dim=2))
            kept[head] = value.expand_as(kept[head])
            return torch.stack(kept, dim=2)

        logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", put)])
        losses.append((p.exp() * (p - logits[0, -1].log_softmax(dim=-1))).sum())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_optimal_is_never_worse_than_the_mean_and_is_what_the_packed_batches_measure(
    name: str,
) -> None:
    ds = studied(name)
    start, end = ds["optimal_loss"].transpose("training", "layer", "head").values
    chosen = np.isfinite(end)
    assert chosen.sum() == 3
    assert (end <= start)[chosen].all()
    assert (end < start)[chosen].any()
    measured = ds["ablated"].sel(metric="kl_base").mean("pair", skipna=False)
    measured = measured.transpose("ablation", "layer", "head")
    # KL of two forward passes with other orders of summation, relative to losses of about 1
    np.testing.assert_allclose(measured.sel(ablation="mean").values[chosen], start[chosen], 1e-3)
    np.testing.assert_allclose(measured.sel(ablation="optimal").values[chosen], end[chosen], 1e-3)
    assert np.isnan(measured.sel(ablation="optimal").values[~chosen]).all()
    for layer, head in np.argwhere(chosen).tolist():
        value = torch.from_numpy(ds["optimal_constant"].values[layer, head])
        assert kl(name, layer, head, value).item() == pytest.approx(end[layer, head], rel=1e-3)


def test_training_takes_the_gradient_of_the_loss() -> None:
    name, (layer, head) = "tiny:llama", (1, 3)
    trainer = Trainer(subjects.model(name), pairs_of(name), -1, N_PAIRS)
    trainer.run()
    values = trainer.mean[[layer], [head]]
    torch.testing.assert_close(values[0], mean_z(name)[layer, head], rtol=1e-4, atol=1e-5)
    loss, gradient = trainer.loss([(layer, head)], values, gradient=True)
    leaf = values[0].clone().requires_grad_()
    expected = kl(name, layer, head, leaf)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    # two fp32 backward passes through the same sums
    torch.testing.assert_close(gradient[0], leaf.grad, rtol=1e-3, atol=1e-5)


def test_training_finds_what_another_optimiser_finds() -> None:
    name, (layer, head) = "tiny:llama", (2, 1)
    leaf = mean_z(name)[layer, head].clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([leaf], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        lbfgs.zero_grad()
        loss = kl(name, layer, head, leaf)
        loss.backward()
        return loss

    lbfgs.step(closure)
    least = kl(name, layer, head, leaf.detach()).item()
    trainer = Trainer(subjects.model(name), pairs_of(name), -1, N_PAIRS)
    trainer.run()
    heads = [(layer, head)]
    found = trainer.train(heads, OptimalSettings(steps=150, rate=0.2))
    gained, possible = found.start - found.loss, found.start - least
    assert possible.item() > 0
    # Adam with a falling step size ends near the minimum, not on it
    assert gained.item() == pytest.approx(possible.item(), rel=0.03)


# classes


@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_scores_are_those_of_detect_head(name: str) -> None:
    model = subjects.model(name)
    scores = detect_heads(model)
    for ours, theirs in DETECTED.items():
        expected = detect_head(model, texts(model), theirs, exclude_bos=True)
        np.testing.assert_allclose(scores.sel(pattern=ours).values, expected.numpy(), rtol=1e-5)


def test_smollm2_has_induction_and_previous_token_heads() -> None:
    found = detected_classes(detect_heads(subjects.model("smollm2-135m")), Thresholds())
    assert found["induction"][18, 6]
    assert found["induction"][17, 3]
    assert found["previous_token"][1, 2]
    assert found["previous_token"][11, 1]
    assert not found["induction"][:10].any()


def test_a_context_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = subjects.model("tiny:llama")
    monkeypatch.setattr(model.cfg, "n_ctx", 8)
    with pytest.raises(ModelError, match="8 tokens; use a model with a longer one"):
        detect_heads(model)


def direct_by_hooks(name: str, pair: int, held: tuple[tuple[int, int], ...]) -> np.ndarray:
    """[layer, head] clean minus patched logit difference, the final residual put together here."""
    model, one = subjects.model(name), pairs_of(name)[pair]
    means = mean_z(name)  # runs the model, which a hook must not

    def hold(z: Tensor, hook: object, layer: int, head: int) -> Tensor:
        z[:, :, head] = means[layer, head]
        return z

    hooks = [
        (
            f"blocks.{layer}.attn.hook_z",
            lambda z, hook, layer=layer, head=head: hold(z, hook, layer, head),
        )
        for layer, head in held
    ]
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    runs = []
    for tokens in (one.clean, one.corrupted):
        kept: dict[str, Tensor] = {}
        keep = [
            (at, lambda x, hook, at=at, kept=kept: kept.update({at: x[0, -1].clone()}))
            for at in (last, *(f"blocks.{i}.attn.hook_z" for i in range(model.cfg.n_layers)))
        ]
        with torch.no_grad():
            model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=[*hooks, *keep])
        runs.append(kept)
    clean, corrupted = runs

    def diff(resid: Tensor) -> float:
        with torch.no_grad():
            logits = model.unembed(model.ln_final(resid[None, None]))[0, 0]
        return float(logits[one.answer[0]] - logits[one.wrong_answer[0]])

    found = np.zeros((model.cfg.n_layers, model.cfg.n_heads))
    for layer in range(model.cfg.n_layers):
        change = corrupted[f"blocks.{layer}.attn.hook_z"] - clean[f"blocks.{layer}.attn.hook_z"]
        for head in range(model.cfg.n_heads):
            write = change[head] @ model.blocks[layer].attn.W_O[head]
            found[layer, head] = diff(clean[last]) - diff(clean[last] + write.detach())
    return found


@pytest.mark.parametrize("held", [(), ((0, 2), (1, 1))], ids=["whole", "two-held"])
@pytest.mark.parametrize("name", ["tiny:llama", "tiny:gpt2"])
def test_direct_effect_equals_a_residual_put_together_by_hand(
    name: str, held: tuple[tuple[int, int], ...]
) -> None:
    found, metric = Behaviour(subjects.model(name), pairs_of(name), -1).direct(held)
    for pair in range(N_PAIRS):
        expected = direct_by_hooks(name, pair, held)
        np.testing.assert_allclose(found[pair], expected, atol=CLOSE)
    if not held:
        base = studied(name)["base_metric"].sel(metric="logit_diff").values
        np.testing.assert_allclose(metric[0], base, atol=CLOSE)


def test_attention_is_that_of_the_last_token_of_the_clean_prompt() -> None:
    name = "tiny:gpt2"
    found = Behaviour(subjects.model(name), pairs_of(name), -1).attention()
    pair = pairs_of(name)[1]
    with torch.no_grad():
        _, kept = subjects.model(name).run_with_cache(clean_run(name, 1))
    pattern = kept["blocks.2.attn.hook_pattern"][0, 3, pair.labels["end"][1] - 1]
    for i, place in enumerate(("IO", "S2")):
        expected = pattern[slice(*pair.labels[place])].sum().item()
        assert found[i, 1, 2, 3] == pytest.approx(expected, abs=1e-5)


class Measured:
    """Stands for `Behaviour`: one pair, gap 10, four layers of two heads."""

    def __init__(self) -> None:
        self.io, self.s2, self.now, self.held = np.zeros((4, 4, 2), np.float32)
        self.queries = {(0, 1): 1.0, (1, 0): 1.0}
        self.asked: tuple[list[tuple[int, int]], list[tuple[int, int]]] | None = None
        self.without: list[tuple[int, int]] = []
        self.io[2] = 0.5  # both heads of layer 2 look at IO
        self.now[2] = (2.0, -1.0)  # one writes for it, one against it
        self.s2[0, 1] = self.s2[1, 0] = self.s2[3, 1] = 0.5
        self.now[1, 0] = 1.5  # works directly, more than through queries
        self.now[3] = (0.1, 5.0)
        self.held[3] = (1.0, 5.5)  # the second did so all along

    def attention(self) -> np.ndarray:
        return np.stack([self.io, self.s2])[:, None]

    def direct(self, without: list[tuple[int, int]] | None = None) -> tuple[np.ndarray, np.ndarray]:
        self.without = without or self.without
        return (self.held if without else self.now)[None], np.array([[6.0], [-4.0]])

    def through_queries(self, heads: list, movers: list) -> np.ndarray:
        self.asked = (heads, movers)
        values = np.full((1, 4, 2), np.nan, np.float32)
        for at in heads:
            values[0][at] = self.queries.get(at, 0.0) if movers else 0.0
        return values


def test_task_classes_follow_from_what_was_measured() -> None:
    measured = Measured()
    masks, ds = task_classes(measured, Thresholds())  # type: ignore[arg-type]
    assert {name: np.argwhere(mask).tolist() for name, mask in masks.items()} == {
        "name_mover": [[2, 0]],
        "negative": [[2, 1]],
        "s_inhibition": [[0, 1]],
        "backup": [[3, 0]],
    }
    assert measured.asked == ([(0, 1), (1, 0), (3, 1)], [(2, 0)])
    assert measured.without == [(2, 0)]
    assert ds.attrs["gap"] == 10
    assert attributes(ds)["movers"] == ["a2.h0"]
    members = member_table(masks)
    assert members.sel(head_class="other").values.sum() == 8 - 4


def test_without_name_movers_there_is_nothing_to_hold() -> None:
    masks, ds = task_classes(Measured(), Thresholds(direct=0.9))  # type: ignore[arg-type]
    assert not any(mask.any() for mask in masks.values())
    assert ds["direct_without_movers"].isnull().all()


def test_paths_to_queries_are_summed_over_the_later_movers() -> None:
    name = "tiny:llama"
    behaviour = Behaviour(subjects.model(name), pairs_of(name), -1)
    one = behaviour.through_queries([(0, 1), (2, 0)], [(1, 2)])
    other = behaviour.through_queries([(0, 1)], [(2, 3)])
    both = behaviour.through_queries([(0, 1), (2, 0)], [(1, 2), (2, 3), (0, 0)])
    assert np.abs(one[:, 0, 1]).max() > 0
    np.testing.assert_allclose(both[:, 0, 1], one[:, 0, 1] + other[:, 0, 1], atol=1e-5)
    assert (both[:, 2, 0] == 0).all()  # no mover is later
    assert np.isnan(both[:, 1]).all()


def test_tasks_without_names_have_the_classes_of_attention_alone() -> None:
    model = subjects.model("tiny:llama")
    ds = study(model, subjects.demo_pairs("tiny:llama"), ablations=["resample"], optimal=None)
    assert ds["head_class"].values.tolist() == [*DETECTED, "other"]
    assert "labels IO, S2, end" in ds.attrs["task_classes"]
    assert "direct" not in ds


# the table


def test_disagreement_of_a_class_is_the_mean_distance_of_its_heads() -> None:
    resample = np.array([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    zero = np.array([[3.0, 2.5, 2.0], [0.0, np.nan, 1.0]])
    base = 7.0
    ds = xr.Dataset(
        {
            # one metric, two equal pairs
            "ablated": (
                ("ablation", "metric", "pair", "layer", "head"),
                base + np.stack([resample, zero])[:, None, None].repeat(2, axis=2),
            ),
            "base_metric": (("metric", "pair"), np.full((1, 2), base)),
            "member": (
                ("head_class", "layer", "head"),
                np.array([[[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 1]]], bool),
            ),
        },
        coords={"ablation": ["resample", "zero"], "head_class": ["induction", "other"]},
    )
    assert effects(ds).sel(ablation="zero").values[0, 0, 0, 0] == 3
    found = disagreement(ds).isel(metric=0).sel(ablation="zero")
    assert found["table_class"].values.tolist() == ["induction", "other", "all"]
    assert found["disagreement"].values == pytest.approx([3.5 / 3, 0.5, 4.5 / 5])
    assert found["rank_correlation"].values[0] == pytest.approx(-1)
    assert np.isnan(found["rank_correlation"].values[1])  # resample's are all equal
    assert found["mean_effect"].values == pytest.approx([2.5, 0.5, 8.5 / 5])
    assert found["n_heads"].values.tolist() == [3, 2, 5]
    same = disagreement(ds).isel(metric=0).sel(ablation="resample", table_class="induction")
    assert same["disagreement"].item() == 0
    assert same["rank_correlation"].item() == pytest.approx(1)


def test_the_study_says_what_it_was_asked() -> None:
    ds = studied("tiny:llama")
    assert ds.attrs["kind"] == "heads"
    assert list(attributes(ds)["ablations"]) == ["resample", "mean", "zero", "optimal"]
    assert attributes(ds)["thresholds"]["induction"] == Thresholds().induction
    assert attributes(ds)["optimal"]["steps"] == 20
    assert ds["metric"].values.tolist() == ["logit_diff", "logit", "kl_base"]
    assert (ds["member"].any("head_class")).all()
    # the last row compares all ablations on the same heads
    assert ds["table_class"].values.tolist()[-2:] == [ALL, TRAINED]
    assert ds["n_heads"].sel(table_class=TRAINED).values.tolist() == [3] * 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"ablations": ["zero", "mean"]}, "must be a list with resample"),
        ({"ablations": "resample"}, "must be a list with resample"),
        ({"ablations": ["resample", "shuffle"]}, "'shuffle' is not known"),
        ({"ablations": ["resample", "zero", "zero"]}, "names one twice"),
        ({"positions": ["end"]}, "leave optimal out"),
        ({"metrics": "no_such"}, "no_such"),
        ({"positions": ["nowhere"], "optimal": None}, "nowhere"),
        ({"read": 99}, "read=99 lies outside"),
    ],
)
def test_mistakes_are_refused_before_anything_runs(
    arguments: dict, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = subjects.model("tiny:llama")
    pairs = pairs_of("tiny:llama")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("something ran"))
    with pytest.raises(PatchsweepError, match=text):
        study(model, pairs, **arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimalSettings(heads=0),
        lambda: OptimalSettings(steps=-1),
        lambda: OptimalSettings(rate=0),
        lambda: Thresholds(direct=0),
    ],
)
def test_settings_out_of_range_are_refused(make) -> None:
    with pytest.raises(ConfigError):
        make()
