"""The page of a lens and its command: what they show, that text cannot get out, and the browser."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import xarray as xr
from patchsweep.analyses.logit_lens import Patch, lens, sublayers
from patchsweep.analyses.logit_lens.findings import comes_up, places, removals
from patchsweep.cli.main import main
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.show import number
from patchsweep.errors import StoreError
from patchsweep.report import figure, write_report
from patchsweep.report.lens import build
from patchsweep.report.shell import page, section
from patchsweep.store.attributes import attributes
from patchsweep.store.save import save_dataset
from subjects import CLEAN, CORRUPTED, demo_pairs, model
from test_report import HOSTILE, Reader, in_browser


@cache
def patched() -> xr.Dataset:
    """Two pairs of two lengths, one head patched, and the sublayers."""
    bridge = model("tiny:llama")
    pairs = PromptPairs.from_strings(
        bridge,
        clean=[CLEAN, f"Then {CLEAN}"],
        corrupted=[CORRUPTED, f"Then {CORRUPTED}"],
        answers=[(" Mary", " John")] * 2,
    )
    ds = lens(bridge, pairs, patch=Patch("z", 1, 16, 3), top=3)
    return ds.merge(sublayers(bridge, pairs), compat="no_conflicts", combine_attrs="override")


def read(ds: xr.Dataset) -> Reader:
    """The page, plotly's five megabytes left out."""
    with patch.object(figure, "get_plotlyjs", return_value="/* plotly */"):
        return Reader(build(ds))


def test_page_has_every_part_and_closes_every_element() -> None:
    found = read(patched())
    for part in ("grid-section", "curves", "sublayers", "provenance", "words"):
        assert found.count("section", id=part) == 1
    assert found.count("option", value="change") == 1
    assert "z of layer 1, head 3, at position 16 (resample)" in found.text
    assert len(found.scripts) == 3 + 1 + 3  # figures and data; the page's own run


def test_a_lens_without_patch_and_sublayers_has_a_page() -> None:
    ds = lens(model("tiny:gpt_neox"), demo_pairs("tiny:gpt_neox"))
    found = read(ds)
    assert found.count("section", id="sublayers") == 0
    assert found.count("option", value="change") == 0
    assert [place.words for place in places(ds)][:2] == ["the embedding", "layer 0's MLP"]


def test_sublayers_alone_have_a_page() -> None:
    found = read(sublayers(model("tiny:llama"), demo_pairs("tiny:llama")))
    assert found.count("section", id="sublayers") == 1
    assert found.count("section", id="grid-section") == 0


def test_only_the_known_scripts_may_run() -> None:
    text = build(patched())
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    assert policy[1].count("'sha256-") == 4  # three scripts, and plotly when it is unpacked
    assert "default-src 'none'" in policy[1]
    found = Reader(text)
    assert not [a for _, a in found.seen if {"src", "href", "style", "onload"} & set(a)]


def hostile() -> xr.Dataset:
    ds = patched().copy(deep=True)
    ds["top_token"][:] = HOSTILE
    ds.attrs |= {"patches": [dict.fromkeys(("site", "pos", "intervention"), HOSTILE)]}
    ds.attrs |= {"prompt": HOSTILE, "provenance": {"model": HOSTILE}}
    words = np.array([HOSTILE] * 2, dtype=object)
    token = np.full(ds["token"].shape, HOSTILE, dtype=object)
    return ds.assign_coords(
        answer=("pair", words), wrong_answer=("pair", words), token=(("pair", "pos"), token)
    )


def test_hostile_text_runs_nothing_in_a_browser(tmp_path: Path) -> None:
    images, scripts, cell = in_browser(
        build(hostile()),
        """
        out.push(document.querySelectorAll("img").length);
        out.push(document.querySelectorAll("script:not([type])").length);
        out.push(document.querySelector("#grid td").textContent);
        """,
        tmp_path,
    )
    # the page's three, plotly as it is unpacked, and the one that looks
    assert (images, scripts) == (0, 5)
    assert cell.startswith("</script>")


def test_the_grid_shows_what_is_chosen_in_a_browser(tmp_path: Path) -> None:
    ds = patched()
    rows, every, word, other, wide, told, curve = in_browser(
        build(ds),
        """
        const cell = (at) => document.querySelector(`#grid td[data-at="${at}"]`);
        out.push(document.querySelectorAll("#grid tbody tr").length);
        set("#rows", "all");
        out.push(document.querySelectorAll("#grid tbody tr").length);
        out.push(cell("6 16").textContent);
        set("#run", "1");
        out.push(cell("6 16").textContent);
        set("#pair", "1");
        out.push(document.querySelectorAll("#grid thead th").length);
        cell("5 3").click();
        out.push(document.getElementById("told").textContent);
        out.push(document.getElementById("curve-prob").data[2].y[6]);
        """,
        tmp_path,
    )
    assert (rows, every) == (4, 7)
    last = ds["top_token"].isel(pair=0, layer=-1, point=-1, pos=16, top=0)
    shown = [str(last.sel(run=run).item()).replace(" ", "␣") for run in ("unpatched", "patched")]
    assert [word, other] == [read_back(text) for text in shown]
    assert wide == 1 + 18
    assert "after layer 2's attention, position 3" in told
    at = ds.sel(run="patched", pair=1, layer=2, point="resid_mid", pos=3)
    for prob in at["top_prob"].values:
        assert number(prob) in told
    end = ds["answer_prob"].sel(run="patched", pair=1, layer=2, point="resid_post", pos=17)
    assert curve == pytest.approx(end.item(), rel=5e-3)  # three digits in the page


def read_back(text: str) -> str:
    """As `html.visible` shows it, for tokens of the tiny models."""
    from patchsweep.data.show import visible

    return visible(text.replace("␣", " "))


# What it finds


def test_the_answer_comes_up_where_it_stays_first() -> None:
    ds = patched().copy(deep=True)
    ds["answer_rank"][:] = 5
    assert comes_up(ds, "unpatched", 0) is None
    at = {"run": "unpatched", "pair": 0, "pos": 16}
    for layer, point in ((0, "resid_mid"), (2, "resid_mid"), (2, "resid_post")):
        ds["answer_rank"].loc[{**at, "layer": layer, "point": point}] = 0
    found = comes_up(ds, "unpatched", 0)
    assert found is not None
    assert found.words == "layer 2's attention"  # after layer 0 it was first, and lost it
    ds["answer_rank"].loc[at] = 0
    found = comes_up(ds, "unpatched", 0)
    assert found is not None
    assert found.words == "the embedding"


def test_removals_are_means_and_the_costliest_is_first() -> None:
    ds = patched()
    found = removals(ds)
    assert len(found) == 2 * 3
    assert [r.changes["log_prob"] for r in found] == sorted(r.changes["log_prob"] for r in found)
    one = found[0]
    change = (ds["without"] - ds["whole"]).sel(metric="prob", sublayer=one.sublayer)
    assert one.changes["prob"] == pytest.approx(float(change.sel(layer=one.layer).mean()))


# The frame and the figures of every page


def test_a_page_without_scripts_lets_none_run() -> None:
    found = Reader(page("<t>", [section("a", "A", "<p>x</p>"), section("b", "B", "")]))
    assert "script-src 'none'" in str(found.seen)
    assert found.count("section") == 1
    assert "<t>" in found.texts


def test_figures_take_arrays_gaps_and_hostile_text() -> None:
    drawn = figure.figure(
        "a",
        [{"x": np.arange(3), "y": xr.DataArray([1.0, np.nan, np.float32(0.1)]), "name": HOSTILE}],
        {"yaxis": {"title": {"text": "y"}}},
        title=HOSTILE,
    )
    found = Reader(drawn)
    spec = found.data
    assert spec["data"][0]["y"] == [1.0, None, 0.1]
    assert spec["layout"]["yaxis"]["gridcolor"]
    assert spec["layout"]["yaxis"]["title"] == {"text": "y"}
    assert found.count("img") == 0


# The command and the store


def run(*words: str) -> int:
    return main(["lens", "model=tiny:llama", *words])


def test_the_same_command_again_computes_nothing(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    store = tmp_path / "lens.zarr"
    words = (f"store={store}", "patch.site=z", "patch.layer=1", "patch.head=[0,3]", "remove=mlp:2")
    assert run(*words) == 0
    assert f"{store}: written" in capsys.readouterr().out
    monkeypatch.setattr("patchsweep.cli.lens.lens", lambda *_, **__: pytest.fail("it ran"))
    assert run(*words) == 0
    assert "already there, nothing was run" in capsys.readouterr().out
    assert run(*words, "top=3") == 2
    assert "holds other results: top is 3 in this run and 5 in the store" in capsys.readouterr().err
    ds = xr.open_zarr(store, consolidated=False)
    assert attributes(ds)["patches"][0]["head"] == [0, 3]
    assert ds.attrs["removed"] == "mlp 2"
    assert set(ds.sizes) >= {"run", "pair", "layer", "point", "pos", "top", "sublayer", "metric"}
    path = write_report(store, tmp_path / "page.html")
    assert "What would" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["remove=mlp"], "write mlp:19 or attn:23"),
        (["remove=mlp:40"], "there is no such layer"),
        (["patch.layer=3"], "patch needs a site"),
        (["patch.site=z", "patch.layer=9"], "past the last layer"),
        (["which=left"], "'clean' or 'corrupted'"),
        (["sites=heads"], "a lens has no sites"),
        (["top=0"], "at least 1"),
    ],
)
def test_mistakes_end_before_anything_runs(
    words: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    bridge = model("tiny:llama")  # loading runs it, to see that it is what it wraps
    monkeypatch.setattr("patchsweep.cli.schema.run.load_model", lambda *_, **__: bridge)
    monkeypatch.setattr(type(bridge), "forward", lambda *_, **__: pytest.fail("the model ran"))
    assert run(f"store={tmp_path / 'x.zarr'}", *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_kind_without_a_page_is_named(tmp_path: Path) -> None:
    save_dataset(xr.Dataset({"a": ("x", [1.0])}, attrs={"kind": "dream"}), tmp_path / "a.zarr")
    with pytest.raises(StoreError, match="kind 'dream', for which there is no page"):
        write_report(tmp_path / "a.zarr", tmp_path / "page.html")
