"""Causal tracing equals an implementation with hooks and the same noise."""

from __future__ import annotations

from functools import partial

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.stages import Stages
from patchsweep.analyses.tracing import KINDS
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE
from patchsweep.errors import PatchsweepError
from patchsweep.report import page_of
from scipy import stats
from subjects import model

PROMPT = "After the Space Needle said that John gave it to"
TOLERANCE = 1e-4  # of logits of order 10, as in test_joint


def pairs_of(name: str) -> ps.PromptPairs:
    return ps.PromptPairs.from_strings(
        model(name),
        clean=[PROMPT, "When John and Mary went to the shops, John gave a bottle to"],
        corrupted=[PROMPT.replace("John", "Mary"),
                   "When John and Mary went to the shops, Mary gave a bottle to"],
        answers=[(" Mary", " John")] * 2,
        labels=[{"subject": "John"}, {"subject": (2, 5)}],
    )  # fmt: skip


def by_hooks(name, pairs, number: int, noise: ps.Noise, window: int, kinds=KINDS, step=1):
    """logit_diff of noised runs `[sample]`, and restored `[sample, kind, layer, pos]` at some."""
    bridge = model(name)
    n_layers = bridge.cfg.n_layers
    sites = {"resid_post": "hook_resid_post", "mlp": "hook_mlp_out", "attn": "hook_attn_out"}
    hook = {s: [f"blocks.{i}.{h}" for i in range(n_layers)] for s, h in sites.items()}

    def run(tokens, writes):
        kept = {}

        def see(x, hook, key):
            for at, value in writes.get(key, ()):
                x[:, at] = value
            kept[key] = x.clone()
            return x

        names = ["hook_embed", *(n for names in hook.values() for n in names)]
        with torch.no_grad():
            logits = bridge.run_with_hooks(
                tokens, fwd_hooks=[(n, partial(see, key=n)) for n in names]
            )[0, -1]
        pair = pairs[number]
        return float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]]), kept

    embeds = []
    for pair in pairs:
        _, kept = run(torch.tensor([pair.clean]), {})
        embeds.append(kept["hook_embed"][0, slice(*pair.labels[noise.label])])
    sigma = float(torch.cat(embeds).double().std())
    pair = pairs[number]
    tokens, span = torch.tensor([pair.clean]), slice(*pair.labels[noise.label])
    _, clean = run(tokens, {})
    noised = np.empty(noise.samples)
    where = sorted({1, span.start, span.stop, len(pair) - 1})
    restored = np.full((noise.samples, len(kinds), n_layers, len(pair)), np.nan)
    for i in range(noise.samples):
        generator = torch.Generator().manual_seed(1_000_003 * noise.seed + i)
        own = embeds[number]
        drawn = own + noise.scale * sigma * torch.randn(own.shape, generator=generator)
        start = {"hook_embed": [(span, drawn)]}
        noised[i], dirty = run(tokens, start)
        for j, kind in enumerate(kinds):
            for layer in range(0, n_layers, step):
                for pos in where:
                    writes = dict(start)
                    if kind in ("mlp", "attn"):
                        low, high = layer - window // 2, layer + -(-window // 2)
                        for at in range(max(0, low), min(n_layers, high)):
                            key = hook[kind][at]
                            writes[key] = [(pos, clean[key][0, pos])]
                    else:
                        key = hook["resid_post"][layer]
                        writes[key] = [(pos, clean[key][0, pos])]
                        if " " in kind:  # every layer's, as the paper's code does
                            for key in hook[kind.rpartition(" ")[2]]:
                                writes[key] = [(pos, dirty[key][0, pos])]
                    restored[i, j, layer, pos], _ = run(tokens, writes)
    return noised, restored


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_trace_equals_hooks_with_the_same_noise(family: str) -> None:
    name = f"tiny:{family}"
    pairs = pairs_of(name)
    noise = ps.Noise("subject", scale=2.0, samples=2, seed=4)
    expected = [by_hooks(name, pairs, number, noise, 2) for number in range(2)]
    for runner in ("packed", "hooked"):
        ds = ps.trace(model(name), pairs, noise, "logit_diff", kinds=KINDS, window=2, runner=runner)
        for number, (noised, restored) in enumerate(expected):
            one = ds.isel(metric=0, pair=number)
            n_pos = len(pairs[number])
            change = restored - noised[:, None, None, None]
            assert abs(float(one["noised_metric"]) - noised.mean()) < TOLERANCE
            cells = {x: one[x].values[..., :n_pos] for x in ("restored", "effect", "effect_high")}
            assert np.nanmax(np.abs(cells["restored"] - restored.mean(0))) < TOLERANCE, runner
            assert np.nanmax(np.abs(cells["effect"] - change.mean(0))) < 2 * TOLERANCE
            half = stats.t.ppf(0.975, 1) * change.std(axis=0, ddof=1) / np.sqrt(2)
            width = cells["effect_high"] - cells["effect"]
            assert np.nanmax(np.abs(width - half)) < 20 * TOLERANCE  # 9 deviations of 2 samples
            assert np.isnan(one["effect"].values[..., n_pos:]).all()
            assert np.nanmax(np.abs(change)) > 0.5


def test_a_trace_is_stored_and_other_noise_is_another_trace(tmp_path) -> None:
    name = "tiny:llama"
    pairs, place = pairs_of(name)[:1], tmp_path / "t.zarr"
    options = {"kinds": ["state"], "window": 1}
    noise = ps.Noise("subject", samples=2)
    first = ps.trace(model(name), pairs, noise, stages=Stages(place), **options)
    again = ps.trace(model(name), pairs, noise, stages=Stages(place), **options)
    assert first["effect"].identical(again["effect"])
    other = ps.Noise("subject", samples=2, seed=1)
    with pytest.raises(PatchsweepError, match="other results"):
        ps.trace(model(name), pairs, other, stages=Stages(place), **options)
    fresh = ps.trace(model(name), pairs, other, **options)
    assert np.abs((fresh["noised_metric"] - first["noised_metric"]).values).max() > 1e-4
    # the state of the last token behind the last block is the answer
    end = first["restored"].isel(layer=-1, pos=len(pairs[0]) - 1)
    assert np.allclose(end.values, first["clean_metric"].values[..., None], atol=1e-5)


@pytest.mark.parametrize(
    ("corruption", "options", "says"),
    [
        (lambda: ps.Noise("object"), {}, "label 'object', which pair 0 does not carry; use one of"),
        (lambda: ps.Noise("subject", scale=0), {}, "scale=0 must be a number above 0"),
        (lambda: ps.Noise("subject", samples=1), {}, "samples=1 must be a whole number"),
        (lambda: ps.Noise(""), {}, "label='' must name a span"),
        (lambda: "noise", {}, "corruption='noise' must be Noise"),
        (lambda: ps.Noise("subject"), {"kinds": ["heads"]}, "must be a list of 'state'"),
        (lambda: ps.Noise("subject"), {"window": 0}, "window=0 must be a whole number"),
    ],
)
def test_bad_traces_are_refused_before_anything_runs(corruption, options, says) -> None:
    with pytest.raises(PatchsweepError, match=says):
        ps.trace(model("tiny:llama"), pairs_of("tiny:llama"), corruption(), **options)


@pytest.mark.slow
def test_a_trace_of_smollm2_equals_hooks_with_the_same_noise() -> None:
    name = "smollm2-135m"
    pairs = ps.load_task(model(name), "facts", n_pairs=1)
    noise = ps.Noise("subject", samples=2)
    _, restored = by_hooks(name, pairs, 0, noise, 10, KINDS[:4], step=7)
    ds = ps.trace(model(name), pairs, noise, "logit_diff", kinds=KINDS[:4])
    one = ds.isel(metric=0, pair=0)
    assert np.nanmax(np.abs(one["restored"].values - restored.mean(axis=0))) < TOLERANCE
    assert np.abs(one["effect"].values).max() > 0.5


def test_the_verb_traces_stores_and_shows(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)
    words = ["trace", "model=tiny", "task=ioi_demo", "noise.label=S2", "noise.samples=2"]
    kinds = "kinds=[state,'state without mlp']"
    assert main([*words, kinds, "window=2", "store=t.zarr"]) == EXIT_DONE
    said = " ".join(capsys.readouterr().out.split())
    assert "prob: " in said
    assert "state without mlp" in said
    assert "patchsweep report t.zarr" in said
    pairs = ps.load_task(model("tiny:llama"), "ioi_demo")
    noise = ps.Noise("S2", samples=2)
    expected = ps.trace(model("tiny:llama"), pairs, noise, kinds=["state", "state without mlp"])
    ds = ps.open_store("t.zarr")
    np.testing.assert_array_equal(ds["effect"], expected["effect"])
    assert main(["report", "t.zarr"]) == EXIT_DONE
    page = (tmp_path / "report.html").read_text()
    assert "One state restored, later MLP writes held" in page
    assert "<mark>" in page
    capsys.readouterr()
    assert main([*words, "store=t.zarr", "noise.label=nobody"]) == EXIT_MISTAKE
    assert "which pair 0 does not carry" in capsys.readouterr().err
    assert main([*words, "sites=heads"]) == EXIT_MISTAKE
    assert "a trace has no sites" in capsys.readouterr().err


def test_dose_curves_have_a_page() -> None:
    name = "tiny:llama"
    pairs = pairs_of(name)
    towards = ps.difference_of_means(model(name), pairs, "resid_pre")
    ds = ps.dose(model(name), pairs, "resid_pre", towards, [-1, 0, 1], layers=[1, 2], controls=1)
    page = page_of(ds, "d.zarr")
    assert page.count("data-figure") >= 2
    assert "1 random vector" in page
