"""The HTML report: what is in it, that nothing gets out of it, and that it works in a browser."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import patch

import numpy as np
import patchsweep
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from patchsweep.data.show import number, percent, rank, token_html, visible
from patchsweep.errors import StoreError
from patchsweep.report import comparison, write_report
from patchsweep.report.heatmap import colour_limit
from patchsweep.report.html import embed_json
from patchsweep.report.page import build_page
from patchsweep.report.shell import get_plotlyjs
from patchsweep.report.tables import seconds_of
from patchsweep.results import accessor as summary
from report_data import synthetic, write

HOSTILE = '</script></template><img src=x onerror="alert(1)"><b>&amp;'
VOID = {"meta", "wbr", "br", "img", "input", "link"}


class Reader(HTMLParser):
    """Collects a page's elements and texts, and checks that every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def data(self) -> dict:
        """What the page's script reads."""
        return json.loads(self.scripts[0])

    def count(self, tag: str, **attrs: str) -> int:
        return sum(t == tag and attrs.items() <= a.items() for t, a in self.seen)


def read(ds: xr.Dataset, seconds: Mapping[str, float] | None = None) -> Reader:
    """The page on `ds`, plotly left out so that parsing takes milliseconds."""
    with patch("patchsweep.report.page.get_plotlyjs", return_value="/* plotly */"):
        return Reader(build_page(ds, seconds or {}))


def unpack(cells: dict, name: str, dtype: str = "<f4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(cells[name]), dtype=dtype)


def hostile() -> xr.Dataset:
    ds = synthetic(n_layers=4)
    ds.attrs["provenance"] |= {"model": HOSTILE, "config": {HOSTILE: [HOSTILE]}, "task": HOSTILE}
    ds.attrs |= {"intervention": HOSTILE, "patchsweep_version": HOSTILE}
    ds.attrs["plan"] = {HOSTILE: ds.attrs["plan"]["z"]}
    tokens = ds["base_token"].values.copy()
    tokens[0, 16] = HOSTILE
    ds = ds.rename(mlp_out=HOSTILE).assign_coords(
        head=np.array([HOSTILE, *"12345678"], dtype=object),
        metric_unit=("metric", np.array([HOSTILE], dtype=object)),
        metric=np.array([HOSTILE], dtype=object),
        base_token=(("pair", "pos"), tokens),
        answer=("pair", np.array([HOSTILE], dtype=object)),
    )
    ds[f"{HOSTILE}_{HOSTILE}"] = ds[HOSTILE] - ds["base_metric"]
    return ds


# The page as a whole


def test_page_has_every_part_and_closes_every_element(tmp_path: Path) -> None:
    store = write(synthetic(), tmp_path / "run.zarr", journal=True)
    out = write_report(store, tmp_path / "deep" / "report.html")
    page = Reader(out.read_text(encoding="utf-8"))
    assert out.name == "report.html"
    assert page.count("html", lang="en") == page.count("h1") == 1
    for part in ("maps", "largest", "cost", "provenance", "words"):
        assert page.count("section", id=part) == 1
    assert page.count("figure") == page.count("figcaption") == 4
    assert "Which parts of smollm2-135m bring the answer back?" in page.text
    assert "The base run reads the corrupted prompt" in page.text
    assert "0.8 s" in page.text  # the journal's two units
    assert not list(tmp_path.glob("**/*.partial"))


def test_nothing_is_fetched_and_only_the_known_scripts_may_run() -> None:
    text = build_page(synthetic(n_layers=4, methods=["atp"]))
    page = Reader(text)
    _, packed, maps, own, unpack = page.scripts
    assert gzip.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    assert not re.findall(r"https?:", text)
    assert not [a for _, a in page.seen if {"src", "href", "style", "onload"} & set(a)]

    policy = next(a["content"] for t, a in page.seen if "http-equiv" in a and t == "meta")
    assert policy is not None
    assert "default-src 'none'" in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    digests = {
        base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()
        for s in (get_plotlyjs(), maps, own, unpack)
    }
    assert digests == allowed


def test_page_stays_small() -> None:
    assert len(build_page(synthetic()).encode()) < 800_000  # 630,000 of them plotly


def test_same_store_gives_the_same_bytes(tmp_path: Path) -> None:
    store = write(synthetic(n_pairs=3, n_layers=4, methods=["atp"]), tmp_path / "run.zarr")
    first, second = (write_report(store, tmp_path / f"{i}.html").read_bytes() for i in (1, 2))
    assert first == second


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no store at"):
        write_report(tmp_path / "nothing.zarr", tmp_path / "report.html")
    write(xr.Dataset({"a": ("x", [1.0])}), tmp_path / "other.zarr")
    with pytest.raises(StoreError, match="holds no site"):
        write_report(tmp_path / "other.zarr", tmp_path / "report.html")
    assert not list(tmp_path.glob("*.html*"))


# Text from the store


def test_hostile_text_stays_text() -> None:
    page = read(hostile())
    tags = {t for t, _ in page.seen}
    assert "img" not in tags
    assert page.count("script") == 4
    assert not [k for _, a in page.seen for k in a if k.startswith("on")]
    assert page.data["views"][0]["base"][16] == visible(HOSTILE)
    assert page.data["metrics"] == [HOSTILE]
    assert f"Which parts of {HOSTILE.rsplit('/', 1)[-1]}" in page.text
    assert visible(HOSTILE) in page.text
    blocks = {a["data-key"] for t, a in page.seen if t == "template"}
    assert blocks == {f"{HOSTILE}|0"}


@given(st.text())
def test_embedded_json_reads_back_and_cannot_end_its_element(text: str) -> None:
    embedded = embed_json({text: [text, 1.5, None]})
    assert json.loads(embedded) == {text: [text, 1.5, None]}
    assert not set("<>&\u2028\u2029") & set(embedded)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Mary", "␣Mary"),
        ("  ", "␣␣"),
        ("\n\t", "⏎⇥"),
        ("\u202eevil", "\\u{202e}evil"),
        ("日本", "日本"),
        ("<b>", "<b>"),
    ],
)
def test_tokens_are_made_visible(token: str, shown: str) -> None:
    assert visible(token) == shown
    inner = Reader(token_html(token))
    assert inner.text == shown
    assert {t for t, _ in inner.seen} <= {"bdi", "i"}


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (0.0, "0.000"),
        (-1.5, "−1.500"),  # noqa: RUF001
        (1234567.8, "1\u202f234\u202f568"),
        (23600.0, "23\u202f600"),
        (123.44, "123.4"),
        (-0.0, "0.000"),
        (0.00012, "1.2e−4"),  # noqa: RUF001
        (-1e-12, "−1.0e−12"),  # noqa: RUF001
        (float("inf"), "–"),  # noqa: RUF001
        (float("nan"), "–"),  # noqa: RUF001
    ],
)
def test_numbers_keep_their_digits(x: float, text: str) -> None:
    assert number(x) == text


def test_a_rank_has_decimals_only_as_a_mean() -> None:
    assert [rank(x) for x in (20.0, 23600, 3.25)] == ["20", "23\u202f600", "3.250"]


def test_numbers_of_people_come_from_one_formatter() -> None:
    by_hand = re.compile(r"\{[^{}]+:[+,]*\.\d[eg]\}|\{[^{}]+:\+\.\df\}")
    found = [
        f"{path.name}: {line.strip()}"
        for package in ("report", "notebook", "cli")
        for path in (Path(patchsweep.__file__).parent / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if by_hand.search(line) and 'float(f"' not in line  # digits that a page's data keep
    ]
    assert found == []


def test_a_rest_is_never_rounded_away() -> None:
    shares = [percent(x) for x in (0, 1e-6, 0.123, 1 - 1e-6, 1)]
    assert shares == ["0 %", "under 0.1 %", "12.3 %", "over 99.9 %", "100 %"]


# Maps


@pytest.mark.parametrize("site", ["resid_pre", "z"])
def test_map_holds_the_stores_numbers(site: str) -> None:
    ds = synthetic(n_pairs=3, sites=[site])
    (figure,) = read(ds).data["sites"]
    dims = [figure[axis] for axis in ("rows", "columns", "hidden") if figure[axis]]
    shape = [len(figure["labels"][dim]) for dim in dims]
    mean = unpack(figure["frames"]["logit_diff|mean"], "recovered").reshape(shape)
    expected = summary.recovered_mean(ds, site).sel(metric="logit_diff").transpose(*dims)
    np.testing.assert_allclose(mean, expected.values, rtol=1e-6)  # one rounding to fp32
    one = figure["frames"]["logit_diff|1"]
    stored = ds[site].sel(metric="logit_diff", pair=1).transpose(*dims)
    np.testing.assert_array_equal(unpack(one, "value").reshape(shape), stored.values)
    assert one["base"] == pytest.approx(ds["base_metric"].sel(pair=1).item())
    assert "effect" not in one  # follows from value and base


def test_head_map_points_at_the_position_with_the_largest_effect() -> None:
    ds = synthetic(sites=["z"])
    (figure,) = read(ds).data["sites"]
    at = unpack(figure["frames"]["logit_diff|0"], "at", "<u2").reshape(30, 9)
    expected = abs(summary.effect(ds, "z")).squeeze(["metric", "pair"]).argmax("pos")
    np.testing.assert_array_equal(at, expected.values)
    assert figure["full"]
    assert (figure["rows"], figure["columns"], figure["hidden"]) == ("layer", "head", "pos")


def test_repeated_tokens_keep_a_column_each() -> None:
    ds = synthetic(sites=["resid_pre"])
    data = read(ds).data
    base = data["views"][0]["base"]
    assert base[4] == base[11] == "␣Mary"
    assert data["sites"][0]["labels"]["pos"] == list(range(17))
    assert [i for i, d in enumerate(data["views"][0]["differs"]) if d] == [11]


@pytest.mark.parametrize("positions", [True, False])
def test_sites_without_heads_or_positions_have_a_map(positions: bool) -> None:
    page = read(synthetic(sites=["resid_pre", "k"], positions=positions))
    resid, k = page.data["sites"]
    assert (resid["columns"], k["columns"]) == ("pos" if positions else None, "kv_head")
    assert (resid["hidden"], k["hidden"]) == (None, "pos" if positions else None)
    assert page.count("select") == (1 if positions else 0)
    assert ("Each patch covers all positions at once." in page.text) != positions
    assert ("position 11" in page.text) == positions


def test_named_spans_and_joined_heads_label_their_axes() -> None:
    ds = synthetic(sites=["resid_pre", "z"]).isel(pos=[11, 16], head=[6, 8])
    ds = ds.assign_coords(
        pos=np.array(["subject", "end"], dtype=object), head=np.array(["0+1", "2+3"], dtype=object)
    )
    page = read(ds)
    assert page.data["sites"][1]["labels"]["head"] == ["0+1", "2+3"]
    assert page.data["sites"][1]["labels"]["pos"] == ["subject", "end"]
    assert "a28.h2+3 at position end ␣to" in page.text
    assert "z28end␣to2+3" in page.text  # the table
    assert "basecorrupted…␣Mary…␣to → ␣John" in page.text


def test_the_embedding_has_bars_per_position() -> None:
    ds = synthetic(sites=["resid_pre"])
    ds["embed"] = ds["resid_pre"].isel(layer=0, drop=True)
    embed = read(ds).data["sites"][0]
    assert (embed["site"], embed["rows"], embed["columns"]) == ("embed", None, "pos")


def test_many_neurons_are_shown_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsweep.report.axes.MAX_UNITS", 40)
    page = read(synthetic(sites=["mlp_post"], n_layers=5))
    (figure,) = page.data["sites"]
    assert (figure["columns"], figure["hidden"], figure["full"]) == ("pos", "neuron", False)
    assert unpack(figure["frames"]["logit_diff|0"], "value").size == 5 * 17
    assert "Each cell shows the one neuron, of 48, whose effect is largest." in page.text


def test_a_site_too_large_for_the_page_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchsweep.report.axes.MAX_CELLS", 1000)
    page = read(synthetic(sites=["z"]))
    cells = page.data["sites"][0]["frames"]["logit_diff|0"]
    assert unpack(cells, "value").size == 30 * 9
    assert page.count("select") == 0


@pytest.mark.parametrize(
    ("values", "limit", "beyond"),
    [
        ([0.1, -0.5, 0.3], 0.5, 0),
        ([0.0, np.nan], 1.0, 0),
        ([1.021, 0.2], 1.1, 0),
        ([*[0.01] * 99, 0.9], 0.9, 0),  # within the natural scale nothing is cut
        ([*[0.8] * 199, -50.0], 1.6, 1),
        ([*[0.01] * 199, 50.0], 1.5, 1),
    ],
)
def test_one_huge_cell_does_not_bleach_the_map(
    values: list[float], limit: float, beyond: int
) -> None:
    found = colour_limit(np.array(values))
    assert found == (pytest.approx(limit), beyond)


def test_captions_say_what_is_seen() -> None:
    ds = synthetic(sites=["resid_pre"])
    ds["resid_pre"][0, 0, 3, 12] = 400.0
    text = read(ds).text
    assert re.search(
        r"Strongest: layer 3 at position 12 ␣gave, .* to 400.0, 74.\d+ of the gap", text
    )
    assert "no other cell is half as strong" in text
    assert "1 cell beyond that in the end colour" in text


def test_pairs_without_a_gap_are_flagged_and_show_effects() -> None:
    ds = synthetic(n_pairs=4, n_layers=4, sites=["resid_pre"])
    ds["source_metric"][0, 2] = ds["base_metric"][0, 2] + 0.01
    page = read(ds)
    frames = page.data["sites"][0]["frames"]
    shown = {key: cells["quantity"] for key, cells in frames.items()}
    assert shown.pop("logit_diff|2") == "effect"
    assert set(shown.values()) == {"recovered"}
    assert "Small gap in 1 pair (2): under 10 %" in page.text


def test_an_ablation_without_a_source_run_shows_effects() -> None:
    ds = synthetic(n_layers=4, sites=["resid_pre"])
    ds["source_metric"][:] = np.nan
    ds.attrs["intervention"] = "zero"
    page = read(ds)
    assert page.data["sites"][0]["frames"]["logit_diff|0"]["quantity"] == "effect"
    assert page.data["sites"][0]["frames"]["logit_diff|0"]["source"] is None
    assert "does the answer depend on?" in page.text
    assert "set to zero, and logit_diff is read again. The intervention is zero" in page.text
    assert page.count("mark") == 0
    assert "Base and source differ too little" not in page.text


def test_an_ablation_with_a_source_run_is_set_beside_it() -> None:
    ds = synthetic(n_layers=4, sites=["resid_pre"], direction="noising")
    ds.attrs["intervention"] = "mean"
    page = read(ds.assign_coords(metric_unit=("metric", np.array(["nats"], dtype=object))))
    assert page.data["sites"][0]["frames"]["logit_diff|0"]["quantity"] == "recovered"
    assert (
        "its mean over clean prompts of the same length, and logit_diff (in nats) is read again."
        in page.text
    )
    assert "a share of the gap to the source run, on the corrupted prompt." in page.text
    assert "sourcecorrupted" in page.text


# Pairs and metrics


def test_selectors_offer_every_metric_and_pair() -> None:
    page = read(synthetic(n_pairs=3, n_layers=4, metrics=["logit_diff", "prob"]))
    values = [a["value"] for t, a in page.seen if t == "option"]
    assert values == ["logit_diff", "prob", "mean", "0", "1", "2"]
    keys = {a["data-key"] for t, a in page.seen if t == "template"}
    assert keys == {f"{m}|{v}" for m in ("logit_diff", "prob") for v in ("mean", "0", "1", "2")}
    assert all(set(s["frames"]) == keys for s in page.data["sites"])


def test_one_pair_and_one_metric_need_no_selector() -> None:
    page = read(synthetic(n_layers=4))
    assert page.count("nav") == 0
    assert page.count("select") == 1  # the position of the head map


def test_beyond_64_pairs_only_the_first_can_be_chosen() -> None:
    page = read(synthetic(n_pairs=65, n_layers=2, sites=["resid_pre"]))
    assert [v["key"] for v in page.data["views"]] == ["mean", *map(str, range(8))]
    assert "65 pairs in the store; here the mean and the first 8." in page.text


def test_pairs_that_do_not_fit_are_left_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    # one pair's 4 x 17 cells as base64 of float32 take 363 bytes
    monkeypatch.setattr("patchsweep.report.views.MAX_BYTES", 800)
    page = read(synthetic(n_pairs=5, n_layers=4, sites=["resid_pre"]))
    assert [v["key"] for v in page.data["views"]] == ["mean", "0", "1"]


def test_tokens_label_the_mean_only_where_the_pairs_agree() -> None:
    mean, one, *_ = read(synthetic(n_pairs=3, n_layers=2)).data["views"]
    assert mean["base"][3:5] == ["␣and", ""]
    assert one["base"][3:5] == ["␣and", "␣Mary"]
    assert [i for i, d in enumerate(mean["differs"]) if d] == [11]


def test_shorter_prompts_end_where_they_end() -> None:
    page = read(synthetic(lengths=[17, 14], n_layers=4))
    assert [v["n_pos"] for v in page.data["views"]] == [17, 17, 14]
    assert "Prompts are 14 to 17 tokens long." in page.text
    assert "unfinished" not in page.text


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_prompts_are_shown_in_their_roles_with_differences_marked(direction: str) -> None:
    page = read(synthetic(n_layers=4, direction=direction))
    clean, corrupted = "␣John␣gave␣the␣bag␣to → ␣Mary", "␣Mary␣gave␣the␣bag␣to → ␣John"
    first, second = (
        (f"sourceclean(.*){clean}", f"basecorrupted(.*){corrupted}")
        if direction == "denoising"
        else (f"sourcecorrupted(.*){corrupted}", f"baseclean(.*){clean}")
    )
    assert re.search(first + ".*" + second, page.text)
    assert page.count("mark") == 4  # one token in each prompt, in the page and in its template


# Tables


def test_largest_effects_carry_their_interval_over_pairs() -> None:
    ds = synthetic(n_pairs=4, n_layers=30, sites=["z"])
    (top,) = summary.largest(ds, "z", n=1)
    at = {"layer": top.layer, "pos": top.pos, "head": top.head}
    low, high = summary.interval(ds, "z").sel(metric="logit_diff", **at).values
    text = read(ds).text
    row = f"z{top.layer}{top.pos}␣to{top.head}{number(top.value)}{number(top.effect, sign=True)}"
    assert row in text
    assert f"{number(low, sign=True)} … {number(high, sign=True)}" in text
    assert "p: sign-flip test" in text
    assert f"{number(top.q)}" in text
    assert "q: the same, adjusted" in text


def test_one_pair_has_no_interval() -> None:
    assert "95 % interval" not in read(synthetic(n_layers=4)).text


def test_cost_is_set_beside_the_loop(tmp_path: Path) -> None:
    store = write(synthetic(), tmp_path / "run.zarr", journal=True)
    seconds = seconds_of(str(store))
    assert seconds == {"resid_pre": 0.25, "z": 0.5}  # half a line counts for nothing
    text = read(synthetic(), seconds).text
    assert "resid_pre51018033012\u202f385260\u202f10021.0 ×0.25" in text  # noqa: RUF001
    assert seconds_of(str(tmp_path / "other.zarr")) == {}


def test_a_store_without_plan_and_provenance_still_has_a_report() -> None:
    ds = synthetic(n_layers=4)
    ds.attrs = {}
    text = read(ds.drop_vars(["base_token", "source_token", "answer", "wrong_answer"])).text
    assert "The store does not say what the run planned." in text
    assert "Which parts of the model bring the answer back?" in text


# Unfinished runs


def test_an_unfinished_run_says_what_is_missing() -> None:
    ds = synthetic(n_layers=10, sites=["resid_pre", "z"])
    ds["z"][:, :, 5:] = np.nan
    page = read(ds)
    assert "This run is unfinished: 45 % of its cells have not run (z 50 %)." in page.text
    assert "Grey: not run (50 %)." in page.text


def test_unpatched_metrics_that_are_missing_make_a_run_unfinished() -> None:
    ds = synthetic(n_pairs=4, n_layers=4)
    ds["base_metric"][:, 2] = np.nan
    text = read(ds).text
    assert "This run is unfinished: The unpatched metrics of 1 pair are missing;" in text
    assert "cells have not run" not in text


def test_a_run_that_has_hardly_begun_has_a_report() -> None:
    ds = synthetic(n_pairs=2, n_layers=4, sites=["resid_pre", "z"])
    for name in ("resid_pre", "z", "base_metric", "source_metric"):
        ds[name][:] = np.nan
    page = read(ds)
    assert page.text.count("Nothing of this site has run yet.") == 2 * (3 + 1)  # views, and shown
    assert "No patch that has run changes this metric." in page.text
    assert "100 % of its cells have not run" in page.text


def test_screened_cells_are_not_called_unfinished() -> None:
    ds = synthetic(n_layers=10, sites=["z"], methods=["atp"])
    ds.attrs["method"] = "screen"
    ds["z"][:, :, 1:] = np.nan
    text = read(ds).text
    assert "Screened: 10 % of the cells were run exactly" in text
    assert "unfinished" not in text


# Estimates beside exact effects


def test_panels_stand_beside_exact_sites_only() -> None:
    ds = synthetic(n_pairs=2, n_layers=4, metrics=["logit_diff", "prob"], methods=["atp"])
    page = read(ds.drop_vars("z"))
    panels = page.data["panels"]
    assert [(p["site"], p["metric"]) for p in panels] == [
        (s, m) for s in ("resid_pre", "attn_out", "mlp_out") for m in ("logit_diff", "prob")
    ]
    assert [s["site"] for s in page.data["sites"]] == ["resid_pre", "attn_out", "mlp_out", "z_atp"]
    assert "Estimated by atp, not run." in page.text


def test_no_estimates_no_comparison() -> None:
    assert read(synthetic(n_layers=4)).count("section", id="comparison") == 0


def test_comparison_leaves_out_dead_cells_and_names_the_largest_miss() -> None:
    ds = synthetic(n_layers=30, sites=["resid_pre"])
    ds["resid_pre_atp"] = summary.effect(ds, "resid_pre") * 1.0
    ds["resid_pre_atp"][0, 0, 7, 13] = 9.0
    (panel,) = comparison.compare_panels(ds)
    assert f"{30 * 6} cells where either effect is not zero" in panel.html
    assert panel.payload["labels"][panel.payload["misses"][0]] == "L7 @13 ␣the"


def test_points_drawn_are_bounded_and_always_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MAX_POINTS", 50)
    ds = synthetic(sites=["z"], methods=["atp"])
    first, second = (comparison.compare_panels(ds)[0].payload for _ in range(2))
    assert first == second
    assert 50 <= len(first["exact"]) <= 55
    largest = summary.largest(ds, "z", n=1)[0].effect
    assert max(first["exact"], key=abs) == pytest.approx(largest, rel=1e-4)  # five digits


# In a browser


def in_browser(page: str, steps: str, folder: Path) -> list:
    """What `steps` (JavaScript that pushes to `out`) finds on the page, in headless Chromium."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("Chromium is not installed")
    driver = """<script>
      const out = [];
      const map = (i) => document.getElementById("map-" + i);
      const set = (query, value) => {
        const select = document.querySelector(query);
        select.value = value;
        select.dispatchEvent(new Event("change"));
      };
      const look = () => {
        const packed = document.querySelector("script[data-script]");
        if (packed && !document.body.dataset.ready) { setTimeout(look, 20); return; }
        try { STEPS } catch (error) { out.push(String(error)); }
        document.head.innerHTML = "";
        document.body.innerHTML = "<pre></pre>";
        document.querySelector("pre").textContent = JSON.stringify(out);
      };
      setTimeout(look, 100);
    </script></body>"""
    # the policy would stop this script too
    open_page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    path = folder / "page.html"
    path.write_text(open_page.replace("</body>", driver.replace("STEPS", steps)), encoding="utf-8")
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --virtual-time-budget=8000"
    )
    done = subprocess.run(
        [
            browser,
            *flags.split(),
            f"--user-data-dir={folder / 'user'}",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1)))


def test_selectors_change_maps_captions_and_tables(tmp_path: Path) -> None:
    ds = synthetic(n_pairs=3, metrics=["logit_diff", "prob"], sites=["resid_pre", "z"])
    page = build_page(ds)
    mean, one, hover, caption, shown, picked, kept = in_browser(
        page,
        """
        out.push(map(0).data[0].z[5][11]);
        set("#view", "1");
        out.push(map(0).data[0].z[5][11], map(0).data[0].hovertext[5][11]);
        out.push(document.querySelector("[data-slot=caption-1]").textContent);
        set("#metric", "prob");
        out.push(document.body.dataset.shown);
        set("select[data-pick='1']", "11");
        out.push(map(1).data[0].z[28][8]);
        set("#view", "mean");
        out.push(document.querySelector("select[data-pick='1']").value);
        """,
        tmp_path,
    )
    cell = {"metric": "logit_diff", "layer": 5, "pos": 11}
    assert mean == pytest.approx(summary.recovered_mean(ds, "resid_pre").sel(cell).item(), abs=1e-6)
    expected = summary.recovered(ds, "resid_pre").sel({**cell, "pair": 1}).item()
    assert one == pytest.approx(expected, abs=1e-6)  # float32 against double
    assert hover.startswith("layer 5<br>position 11<br>token ␣Anna<br>in source ␣Tom<br><b>recov")
    assert "a28.h8 at position 16 ␣to" in caption
    assert shown == "prob|1"
    z = summary.recovered(ds, "z").sel(metric="prob", pair=1, layer=28, pos=11, head=8)
    assert picked == pytest.approx(z.item(), abs=1e-6)
    assert kept == "11"


def test_hostile_text_runs_nothing_in_a_browser(tmp_path: Path) -> None:
    images, scripts, tick, drawn = in_browser(
        build_page(hostile()),
        """
        out.push(...["img", "script"].map((tag) => document.querySelectorAll(tag).length));
        out.push(map(0).layout.xaxis.ticktext[16]);
        out.push(map(0).querySelectorAll(".xtick text")[16].textContent);
        """,
        tmp_path,
    )
    # data; three scripts and what runs them, each twice; the one that looks
    assert (images, scripts) == (0, 9)
    assert tick.startswith("<b>&lt;/script&gt;")
    assert drawn.startswith("</script></te")


def test_cells_not_run_are_grey_in_a_browser(tmp_path: Path) -> None:
    ds = synthetic(n_layers=10, sites=["resid_pre", "z"])
    ds["resid_pre"][:, :, 5:] = np.nan
    ds["z"][:] = np.nan
    grey, told, hidden = in_browser(
        build_page(ds),
        """
        out.push(map(0).data[1].z.map((row) => row.filter((x) => x !== null).length));
        out.push(map(0).data[1].hovertext[5][0], map(1).hidden);
        """,
        tmp_path,
    )
    assert grey == [0] * 5 + [17] * 5
    assert told.endswith("<b>not run</b>")
    assert hidden
