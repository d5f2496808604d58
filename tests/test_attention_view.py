"""Attention views: patterns, attributions and predictions are the model's own."""

from __future__ import annotations

import base64
import json
import re
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import patchsweep as ps
import pytest
import torch
import xarray as xr
from patchsweep.analyses.attention import attention, ranked_heads
from patchsweep.cli.main import main
from patchsweep.errors import PatchsweepError, PlanError
from patchsweep.report.attention import build
from patchsweep.store.save import load_dataset, save_dataset
from subjects import demo_pairs, model
from test_report import in_browser

FAMILIES = ["tiny:llama", "tiny:gpt2", "tiny:gemma2"]


def mixed_pairs(name: str) -> ps.PromptPairs:
    """Two lengths."""
    return ps.PromptPairs.from_strings(
        model(name),
        clean=[
            "When John and Mary went to the shops, John gave milk to",
            "Then Tom and James had a long argument, and Tom said to",
            "John and Mary met. John smiled at",
        ],
        corrupted=[
            "When John and Mary went to the shops, Mary gave milk to",
            "Then Tom and James had a long argument, and James said to",
            "John and Mary met. Mary smiled at",
        ],
        answers=[(" Mary", " John"), (" James", " Tom"), (" Mary", " John")],
    )


def plain_gradients(name: str, pair: ps.PromptPair) -> tuple[list[torch.Tensor], ...]:
    """Patterns of both runs and the gradient of logit_diff, by a bridge's hooks and autograd."""
    bridge = model(name)
    layers = range(bridge.cfg.n_layers)
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    base, source = torch.tensor([pair.corrupted]), torch.tensor([pair.clean])
    kept: dict[str, torch.Tensor] = {}

    def keep(x: torch.Tensor, hook: object, at: str) -> torch.Tensor:
        x.retain_grad()
        kept[at] = x
        return x

    logits = bridge.run_with_hooks(
        base, fwd_hooks=[(at, lambda x, hook, at=at: keep(x, hook, at)) for at in hooks]
    )
    (logits[0, -1, pair.answer[0]] - logits[0, -1, pair.wrong_answer[0]]).backward()
    with torch.no_grad():
        _, cache = bridge.run_with_cache(source, names_filter=lambda at: at in hooks)
    return (
        [kept[at].detach()[0] for at in hooks],
        [cache[at][0] for at in hooks],
        [kept[at].grad[0] for at in hooks],
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_patterns_and_cells_equal_hooks_and_autograd(name: str) -> None:
    pair = demo_pairs(name)[0]
    base, source, gradient = plain_gradients(name, pair)
    heads = [(2, 1), (0, 0), (1, 3)]
    ds = attention(model(name), demo_pairs(name), heads=heads)
    for rank, (layer, head) in enumerate(heads):
        found = ds.isel(pair=0, rank=rank)
        # probabilities, softmaxes of scores of order one
        np.testing.assert_allclose(found.pattern.sel(run="base"), base[layer][head], atol=1e-5)
        np.testing.assert_allclose(found.pattern.sel(run="source"), source[layer][head], atol=1e-5)
        cells = (source[layer] - base[layer])[head] * gradient[layer][head]
        np.testing.assert_allclose(found.attribution[0], cells, atol=1e-5)
    for layer in range(len(base)):
        cells = (source[layer] - base[layer]) * gradient[layer]
        np.testing.assert_allclose(ds.head_attribution[0, 0, layer], cells.sum((1, 2)), atol=1e-4)
        np.testing.assert_allclose(ds.head_size[0, 0, layer], cells.abs().sum((1, 2)), atol=1e-4)
    assert float(ds.head_size.max()) > 1e-3  # else equality would prove nothing


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_rows_sum_to_the_attribution_of_the_pattern_site(direction: str) -> None:
    name = "tiny:llama"
    pairs, metrics = mixed_pairs(name), ["logit_diff", "log_prob"]
    ds = attention(model(name), pairs, metrics, direction=direction, top=5)
    positions = range(max(len(pair) for pair in pairs))  # from the start, as the rows are
    asked = {"direction": direction, "method": "atp", "positions": positions}
    swept = ps.sweep(model(name), pairs, "pattern", metrics, **asked)
    for rank in range(5):
        layer, head = int(ds.rank_layer[rank]), int(ds.rank_head[rank])
        rows = ds.attribution.isel(rank=rank).sum("src")
        expected = swept.pattern_atp.sel(layer=layer, head=head)
        np.testing.assert_allclose(rows, expected.fillna(0), rtol=1e-4, atol=1e-5)
    total = swept.pattern_atp.fillna(0).sum("pos").transpose("metric", "pair", "layer", "head")
    np.testing.assert_allclose(ds.head_attribution, total, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ds.base_metric, swept.base_metric, rtol=1e-4, atol=1e-5)


def test_exact_is_the_patch_of_the_whole_pattern() -> None:
    name = "tiny:llama"
    bridge, pair = model(name), demo_pairs(name)[0]
    ds = attention(bridge, demo_pairs(name), heads=[(2, 1), (0, 3), (2, 0)])
    base, source = torch.tensor([pair.corrupted]), torch.tensor([pair.clean])

    def read(logits: torch.Tensor) -> float:
        return float(logits[0, -1, pair.answer[0]] - logits[0, -1, pair.wrong_answer[0]])

    for rank, (layer, head) in enumerate([(2, 1), (0, 3), (2, 0)]):
        at = f"blocks.{layer}.attn.hook_pattern"

        with torch.no_grad():
            _, clean = bridge.run_with_cache(source, names_filter=at)

            def put(x: torch.Tensor, hook: object, head: int, new: torch.Tensor) -> torch.Tensor:
                x[:, head] = new[:, head]
                return x

            hook = partial(put, head=head, new=clean[at])
            patched = read(bridge.run_with_hooks(base, fwd_hooks=[(at, hook)]))
            assert float(ds.exact[0, 0, rank]) == pytest.approx(
                patched - read(bridge(base)), abs=1e-4
            )
    assert float(np.abs(ds.exact).max()) > 1e-3


def test_heads_are_ranked_by_their_mean_size() -> None:
    name = "tiny:gpt2"
    ds = attention(model(name), mixed_pairs(name), top=6)
    size = ds.head_size[0].mean("pair")
    order = np.argsort(-size.values, axis=None, kind="stable")[:6]
    found = list(zip(ds.rank_layer.values.tolist(), ds.rank_head.values.tolist(), strict=True))
    assert found == [divmod(int(i), size.shape[1]) for i in order]
    for head in ranked_heads(ds, pair=2):
        cells = ds.attribution[0, 2].values[found.index((head.layer, head.head))]
        assert abs(head.cell) == np.nanmax(np.abs(cells))
        assert head.size == pytest.approx(float(size[head.layer, head.head]))
        assert head.src <= head.dest < len(mixed_pairs(name)[2].clean)


def test_pairs_of_other_lengths_are_as_if_alone() -> None:
    name = "tiny:llama"
    pairs = mixed_pairs(name)
    heads = [(2, 0), (1, 1)]
    whole = attention(model(name), pairs, heads=heads)
    for number, pair in enumerate(pairs):
        n = len(pair.clean)
        alone = attention(model(name), ps.PromptPairs((pair,)), heads=heads).isel(pair=0)
        mine = whole.isel(pair=number)
        inside = {"dest": slice(n), "src": slice(n)}
        for variable in ("pattern", "attribution", "value_norm", "top_prob", "head_size"):
            cut = {dim: span for dim, span in inside.items() if dim in mine[variable].dims}
            np.testing.assert_allclose(mine[variable].isel(cut), alone[variable], atol=1e-5)
        assert mine.pattern.isel(dest=slice(n, None)).isnull().all()
        assert mine.attribution.isel(src=slice(n, None)).isnull().all()
        assert (mine.token.isel(pos=slice(n, None)) == "").all()


@pytest.mark.parametrize("read", [-1, 5])
def test_predictions_are_those_of_the_bridge(read: int) -> None:
    name = "tiny:llama"
    bridge, pairs = model(name), demo_pairs(name)
    ds = attention(bridge, pairs, read=read, predictions=4, top=1).isel(pair=0)
    for run, ids in (("base", pairs[0].corrupted), ("source", pairs[0].clean)):
        with torch.no_grad():
            logits = bridge(torch.tensor([ids]))[0, read].float()
        best = logits.topk(4)
        mine = ds.sel(run=run)
        assert mine.top_token.values.tolist() == [
            bridge.tokenizer.decode([i]) for i in best.indices
        ]
        np.testing.assert_allclose(mine.top_logit, best.values, atol=1e-4)
        np.testing.assert_allclose(mine.top_prob, logits.softmax(-1)[best.indices], atol=1e-6)
        answer = logits.softmax(-1)[pairs[0].answer[0]]
        np.testing.assert_allclose(mine.answer_prob, answer, atol=1e-6)


def test_value_norms_are_the_lengths_of_the_values_attended_to() -> None:
    name = "tiny:llama"  # two query heads share a value head
    bridge, pairs = model(name), demo_pairs(name)
    ds = attention(bridge, pairs, heads=[(1, 3), (1, 0)]).isel(pair=0)
    _, cache = bridge.run_with_cache(torch.tensor([pairs[0].corrupted]))
    v = cache["blocks.1.attn.hook_v"][0]
    v = v.reshape(v.shape[0], int(bridge.cfg.n_key_value_heads), -1)
    norm = v.norm(dim=-1)
    np.testing.assert_allclose(ds.value_norm.sel(run="base")[0], norm[:, 1], atol=1e-5)
    np.testing.assert_allclose(ds.value_norm.sel(run="base")[1], norm[:, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"top": 0}, "top=0"),
        ({"heads": []}, "heads is empty"),
        ({"heads": [(0, 99)]}, r"\(0, 99\) is no head"),
        ({"heads": [(0, 1), (0, 1)]}, "twice"),
        ({"predictions": 0}, "predictions=0"),
    ],
)
def test_mistakes_end_before_anything_runs(arguments: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        attention(model("tiny:llama"), demo_pairs("tiny:llama"), **arguments)


def test_metric_without_gradient_is_refused() -> None:
    with pytest.raises(PatchsweepError, match="rank"):
        attention(model("tiny:llama"), demo_pairs("tiny:llama"), "rank")


def test_store_gives_back_what_was_found(tmp_path: Path) -> None:
    name = "tiny:llama"
    ds = attention(model(name), mixed_pairs(name), top=3)
    save_dataset(ds, tmp_path / "a.zarr")
    found = load_dataset(tmp_path / "a.zarr", ds.attrs)
    assert found is not None
    xr.testing.assert_equal(found, ds)


# --- the page and the verb ---


@pytest.fixture(scope="module")
def two_metrics() -> xr.Dataset:
    name = "tiny:llama"
    return attention(model(name), mixed_pairs(name), ["logit_diff", "log_prob"], top=3)


def test_page_holds_every_number_drawn(two_metrics: xr.Dataset) -> None:
    ds = two_metrics
    page = build(ds)
    found = re.search(r'id="report-data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found.group(1))
    for number, one in enumerate(data["pairs"]):
        n = len(mixed_pairs("tiny:llama")[number].clean)
        assert one["n"] == n
        rows, columns = np.tril_indices(n)
        pattern = np.frombuffer(base64.b64decode(one["pattern"]), "<u2").reshape(2, 3, -1) / 65535
        expected = ds.pattern.isel(pair=number).values[..., rows, columns]
        np.testing.assert_allclose(pattern, expected, atol=1e-5)  # 16 bits of 0..1
        cells = np.frombuffer(base64.b64decode(one["attribution"]), "<i2").reshape(2, 3, -1)
        limit = np.array(one["limit"])[..., None]
        expected = ds.attribution.isel(pair=number).values[..., rows, columns]
        np.testing.assert_allclose(cells / 32767 * limit, expected, atol=4e-5 * limit.max())


def test_page_fetches_nothing_and_escapes_tokens(two_metrics: xr.Dataset) -> None:
    ds = two_metrics.copy(deep=True)
    ds["token"].values[0, 0, 2] = "<script>alert(1)</script>"
    ds["top_token"].values[:] = "<img src=x>"
    page = build(ds)
    assert "<script>alert" not in page
    assert "<img" not in page
    assert not re.search(r'(src|href)="', page)
    assert "default-src 'none'" in page


def test_page_stays_light_with_long_prompts() -> None:
    """16 heads of 64-token prompts: the page is small, and pairs are left out beyond that."""
    n, n_pairs = 64, 40
    rng = np.random.default_rng(0)
    small = attention(model("tiny:llama"), mixed_pairs("tiny:llama"), heads=[(0, 0)])
    cells = rng.random((n_pairs, 16, n, n), np.float32)
    cells[:, :, *np.triu_indices(n, 1)] = 0
    grown = small.drop_dims(["pair", "rank", "dest", "src", "pos"]).assign(
        pattern=(("run", "pair", "rank", "dest", "src"), np.stack([cells, cells])),
        attribution=(("metric", "pair", "rank", "dest", "src"), cells[None]),
        value_norm=(("run", "pair", "rank", "src"), cells[None, :, :, 0].repeat(2, axis=0)),
    )
    every = np.zeros((1, n_pairs, 3, 4), np.float32)
    grown["exact"] = (("metric", "pair", "rank"), np.ones((1, n_pairs, 16), np.float32))
    texts = np.full((n_pairs,), " word", dtype=object)
    grown = grown.assign(
        head_attribution=(("metric", "pair", "layer", "head"), every),
        head_size=(("metric", "pair", "layer", "head"), every),
        top_token=(("run", "pair", "top"), np.full((2, n_pairs, 1), " a", dtype=object)),
        top_prob=(("run", "pair", "top"), np.ones((2, n_pairs, 1), np.float32)),
        top_logit=(("run", "pair", "top"), np.ones((2, n_pairs, 1), np.float32)),
        answer_prob=(("run", "pair"), np.ones((2, n_pairs), np.float32)),
        wrong_prob=(("run", "pair"), np.ones((2, n_pairs), np.float32)),
        base_metric=(("metric", "pair"), np.ones((1, n_pairs), np.float32)),
        source_metric=(("metric", "pair"), np.ones((1, n_pairs), np.float32)),
    ).assign_coords(
        answer=("pair", texts),
        wrong_answer=("pair", texts),
        token=(("run", "pair", "pos"), np.full((2, n_pairs, n), " word", dtype=object)),
        rank_layer=("rank", np.zeros(16, int)),
        rank_head=("rank", np.zeros(16, int)),
    )
    page = build(grown)
    assert len(page) < 8 * 2**20
    assert "40 pairs in the store; here the first 8." in page


def test_page_in_a_browser(two_metrics: xr.Dataset, tmp_path: Path) -> None:
    ds = two_metrics
    steps = """
      const cards = [...document.querySelectorAll(".head")];
      const blocks = () =>
        [...document.querySelectorAll("[data-pair]")].filter((b) => !b.hidden).length;
      out.push(cards.map((c) => c.querySelector("h3 small").textContent));
      set("#pair", "2");
      set("#metric", "1");
      out.push(cards.map((c) => c.querySelector("h3 small").textContent), blocks());
      const canvas = cards[1].querySelectorAll("canvas")[1];
      const box = canvas.getBoundingClientRect(), cell = (canvas.clientWidth - 86) / LENGTH;
      canvas.dispatchEvent(new PointerEvent("pointermove", {
        clientX: box.left + 84 + (SRC + 0.5) * cell,
        clientY: box.top + 74 + (DEST + 0.5) * cell }));
      out.push(document.querySelector(".tip").textContent);
      cards[1].querySelector("button").click();
      out.push(cards[1].classList.contains("large"));
    """
    pattern = ds.pattern.sel(run="source").isel(pair=2, rank=1).values
    off_diagonal = np.nan_to_num(np.tril(pattern, -1))
    dest, src = np.unravel_index(off_diagonal.argmax(), pattern.shape)
    length = len(mixed_pairs("tiny:llama")[2].clean)
    for word, value in (("LENGTH", length), ("DEST", dest), ("SRC", src)):
        steps = steps.replace(word, str(value))
    first, second, shown, tip, large = in_browser(build(ds), steps, tmp_path)

    def totals(metric: int, pair: int) -> list[float]:
        return ds.attribution[metric, pair].sum(["dest", "src"]).values.tolist()

    def numbers(texts: list[str]) -> list[float]:
        return [
            float(found[0])
            for text in texts
            if (found := re.search(r"[+-]?[\d.]+(?= )", text.replace("\u2212", "-")))
        ]

    np.testing.assert_allclose(numbers(first), totals(0, 0), atol=1e-3)
    np.testing.assert_allclose(numbers(second), totals(1, 2), atol=1e-3)
    assert (shown, large) == (2, True)
    assert f"at {dest}\n" in tip
    assert f"at {src}\n" in tip
    assert f"source {pattern[dest, src]:.3f}\n" in tip


def test_verb_writes_once_and_says_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "a.zarr"
    words = ["attention", "model=tiny", "task=ioi_demo", "top=2", "predictions=3", f"store={store}"]
    assert main(words) == 0
    said = capsys.readouterr().out
    ds = xr.open_zarr(store, consolidated=False)
    assert f"a{int(ds.rank_layer[0])}.h{int(ds.rank_head[0])}" in said
    assert (ds.sizes["rank"], ds.sizes["top"]) == (2, 3)
    assert f"patchsweep report {store}" in said
    with patch("patchsweep.sweeps.executor.run_work", side_effect=AssertionError):
        assert main(words) == 0
    assert "already there, nothing was run" in capsys.readouterr().out
    assert main([*words[:3], "top=3", words[-1]]) == 2
    assert "top" in capsys.readouterr().err
    assert main(["report", str(store), "-o", str(tmp_path / "r.html")]) == 0


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sites=z", "have no sites"),
        ("top=0", "top=0 must be at least 1"),
        ("heads=[3]", "pairs of layer and head"),
        ("heads=[[9,0]]", "is no head of 3 layers"),
    ],
)
def test_verb_refuses_in_one_line(
    word: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attention", "model=tiny", f"store={tmp_path / 'a.zarr'}", word]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "a.zarr").exists()


def test_answers_that_share_a_token_are_read_where_they_differ() -> None:
    bridge = model("tiny:llama")
    pairs = ps.PromptPairs.from_strings(
        bridge,
        clean=["When John and Mary went to the", "When John and Mary went to the"],
        corrupted=["When John and Paul went to the", "When John and Paul went to the"],
        answers=[(" Anna Paul", " Anna Tom"), (" Anna Paul", " Tom Paul")],
        multi_token=True,
    )
    ds = attention(bridge, pairs, top=1, predictions=3, direction="noising")
    for number, pair in enumerate(pairs):
        for run, prompt in (("base", pair.clean), ("source", pair.corrupted)):
            with torch.no_grad():
                logits = bridge(torch.tensor([[*prompt, *pair.answer[: pair.differ]]]))[0, -1]
            prob = logits.float().softmax(dim=-1)
            found = ds.sel(run=run, pair=number)
            for name, ids in (("answer_prob", pair.answer), ("wrong_prob", pair.wrong_answer)):
                assert float(found[name]) == pytest.approx(float(prob[ids[pair.differ]]), abs=1e-5)
            assert float(found["top_prob"][0]) == pytest.approx(float(prob.max()), abs=1e-5)
