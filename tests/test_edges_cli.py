"""`patchsweep edges`, its store and its page; the drawing of graphs; how long scoring takes."""

from __future__ import annotations

import html
import itertools
import re
import statistics
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import xarray as xr
from patchsweep.analyses.circuits import edges, exact_edges, screen_edges
from patchsweep.cli import analysis, main
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE
from patchsweep.forward.blockwise import Blocks
from patchsweep.forward.grad import frozen
from patchsweep.report.edges import Row, build, correlation, rows_of
from patchsweep.report.graph import Drawn, draw_graph
from patchsweep.store.attributes import attributes
from store_checks import checksums
from subjects import demo_pairs, model
from transformer_lens.model_bridge import TransformerBridge

TINY = ["edges", "model=tiny", "task=ioi_demo", "top=8"]
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that tells of the mistake in this command."""
    assert main([*words]) == EXIT_MISTAKE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_edges_are_scored_verified_stored_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "store=e.zarr"]) == EXIT_DONE
    said = capsys.readouterr().out
    assert "190 edges scored, the foremost 8 of them run exactly" in " ".join(said.split())
    assert "patchsweep report e.zarr" in said
    ds = xr.open_zarr("e.zarr", consolidated=False)
    expected = screen_edges(model("tiny:llama"), demo_pairs("tiny:llama"), top=8)
    for name in ("edge", "edge_estimate", "edge_eap", "base_metric"):
        np.testing.assert_array_equal(ds[name], expected[name])
    config = attributes(ds)["provenance"]["config"]
    assert (ds.attrs["kind"], config["top"], config["positions"]) == ("edges", 8, False)
    assert not {"sites", "method", "runner", "slice"} & set(config)
    assert main(["report", "e.zarr"]) == EXIT_DONE
    assert "listen to which?" in Path("report.html").read_text()


def test_the_same_command_again_computes_nothing_and_another_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*TINY, "store=e.zarr", "positions=true", "steps=2"]
    assert main(command) == EXIT_DONE
    first = capsys.readouterr().out
    assert "3,230 edges at single positions scored" in first
    before = checksums("e.zarr")
    monkeypatch.setattr(Blocks, "__init__", lambda *_: pytest.fail("the model was run"))
    assert main(command) == EXIT_DONE
    again = capsys.readouterr().out
    assert "already there, nothing was run" in again
    assert [line for line in again.splitlines() if "│" in line] == [
        line for line in first.splitlines() if "│" in line
    ]
    assert "top" in refused(capsys, *command, "top=9")
    assert checksums("e.zarr") == before


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["top=0"], "top=0 must be a whole number of at least 1"),
        (["top=191"], "from 1 to 190"),
        (["steps=0"], "steps=0 must be a whole number of at least 1"),
        (["steps=2", "intervention=zero"], "leave steps out"),
        (["sites=heads"], "edges have no sites; leave it out"),
        (["runner.max_tokens=5"], "edges have no runner"),
        (["slice=2", "n_slices=2"], "slice=2 of n_slices=2 does not exist"),
        (["metric=rank"], "jumps"),
        (["intervention=shuffle"], "resample"),
        (["positions=maybe"], "positions"),
        (["bottom=3"], "bottom"),
    ],
)
def test_mistakes_are_told_in_one_line_before_any_forward(
    words: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Blocks, "__init__", lambda *_: pytest.fail("the model was run"))
    assert told in refused(capsys, *TINY, *words)


def test_help_names_the_keys_and_what_they_are_now(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["edges", "--help"])
    said = capsys.readouterr().out
    assert "patchsweep edges [model=" in said
    assert "top: 200" in said


def test_rows_of_a_store_are_meaned_over_pairs_and_the_largest_first() -> None:
    dims = ("metric", "pair", "chosen")
    ds = xr.Dataset(
        {
            "edge": (dims, [[[1.0, 4.0, np.nan], [3.0, 2.0, -9.0]]]),
            "edge_estimate": (dims, [[[0.5, 3.0, 1.0], [0.5, 3.0, 3.0]]]),
            "base_metric": (("metric", "pair"), [[1.0, 1.0]]),
        },
        coords={
            "metric": ["m"],
            "edge_sender": ("chosen", ["embed", "m0", "m1"]),
            "edge_reader": ("chosen", ["m0", "a1.h0.q", "logits"]),
            "edge_pos": ("chosen", [0, 1, 1]),
            "base_token": (("pair", "pos"), [["a", "b"], ["a", "c"]]),
        },
    )
    assert rows_of(ds, "m") == [
        Row("m1", "logits", 1, "", 2.0, -10.0),  # one pair has it; the tokens differ
        Row("m0", "a1.h0.q", 1, "", 3.0, 2.0),
        Row("embed", "m0", 0, "a", 0.5, 1.0),
    ]
    assert [row.kind for row in rows_of(ds, "m")] == ["logits", "q", "mlp"]
    assert correlation(rows_of(ds, "m")[:2]) != correlation(rows_of(ds, "m")[:2])  # NaN of two


@pytest.fixture(scope="module")
def screened() -> xr.Dataset:
    pairs = demo_pairs("tiny:llama")
    metrics = ["logit_diff", "log_prob"]
    return screen_edges(model("tiny:llama"), pairs, metrics, top=60, positions=True)


def test_the_page_stands_alone_and_escapes_tokens(screened: xr.Dataset) -> None:
    nasty = screened.assign_coords(
        base_token=(("pair", "pos"), np.full(screened["base_token"].shape, "<script>", object))
    )
    page = build(nasty)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "script-src 'none'" in page
    assert page.count('class="graph"') == 2  # one for each metric
    assert page.count('class="points"') == 2


def test_the_page_tells_the_numbers_of_the_store(screened: xr.Dataset) -> None:
    page = build(screened)
    rows = rows_of(screened, "logit_diff")
    assert len(rows) == 60
    effect = (screened["edge"] - screened["base_metric"]).values[0, 0]
    assert rows[0].exact == pytest.approx(effect[np.abs(effect).argmax()])
    table = page.split('id="table-0"')[1].split("</section>")[0]
    assert table.count('<th scope="row">') == 60
    assert "20 more edges" in table
    titles = re.findall(r"<title>([^<]*→[^<]*)</title>", page.split('id="agreement-0"')[0])
    assert len(titles) == 40
    assert f"{rows[0].sender} → {rows[0].reader} at {rows[0].pos}" in html.unescape(titles[0])


@pytest.mark.parametrize("kind", ["estimates", "exact", "exact at positions"])
def test_stores_of_estimates_or_exact_edges_alone_have_a_page_too(kind: str) -> None:
    bridge, pairs = model("tiny:gpt2"), demo_pairs("tiny:gpt2")
    labels = ["m0->logits", "a0.h1->a1.h0.q"]
    if kind == "estimates":
        ds = edges(bridge, pairs, intervention="zero")
    else:
        ds = exact_edges(bridge, pairs, labels, positions=kind == "exact at positions")
    page = build(ds)
    assert 'class="graph"' in page
    assert 'id="agreement-0"' not in page  # there is nothing to compare
    assert len(rows_of(ds, "logit_diff")) == {"estimates": 200, "exact": 2}.get(kind, 34)
    assert "largest estimates" in page if kind == "estimates" else "exact effects" in page


def boxes(svg: str) -> dict[str, tuple[float, float]]:
    """The middle of every box, by its label."""
    found = {}
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        text = group.find(f"{SVG}text")
        assert text is not None
        found[str(text.text)] = (float(text.attrib["x"]), float(text.attrib["y"]))
    return found


def lines(svg: str) -> dict[str, tuple[str, float]]:
    """Colour and width of every line, by its title."""
    return {
        str(path[0].text): (path.attrib["stroke"], float(path.attrib["stroke-width"]))
        for path in ElementTree.fromstring(svg).iter(f"{SVG}path")
        if len(path)
    }


GRAPH = [
    Drawn("embed", "a0.h1.v", 2.0),
    Drawn("embed", "m5", -8.0, "<b>"),
    Drawn("a0.h1", "m0", 1.0),
    Drawn("m0", "a5.h3.k", 0.5),
    Drawn("a5.h3", "logits", 4.0),
    Drawn("m5", "logits", -1.0),
]


def test_a_graph_runs_upwards_by_layer() -> None:
    svg = draw_graph(["m9"], GRAPH)
    at = boxes(svg)
    assert set(at) == {"embed", "a0.h1", "m0", "a5.h3", "m5", "m9", "logits"}
    order = sorted(at, key=lambda name: -at[name][1])
    assert order == ["embed", "a0.h1", "m0", "a5.h3", "m5", "m9", "logits"]
    assert re.findall(r">layer (\d+)<", svg) == ["0", "5", "9"]


def test_a_line_is_as_wide_as_its_effect_and_has_its_sign() -> None:
    drawn = lines(draw_graph([], GRAPH, unit="logits"))
    blue, red = drawn["a5.h3 → logits: +4.000 logits"], drawn["<b>"]
    assert blue[0] != red[0]
    widths = [width for _, width in drawn.values()]
    assert max(widths) == red[1]
    assert drawn["m5 → logits: \u22121.000 logits"][0] == red[0]
    assert blue[1] / drawn["embed → a0.h1.v: +2.000 logits"][1] > 1.5


def test_key_value_heads_that_are_shared_have_boxes_of_their_own() -> None:
    drawn = [Drawn("embed", "a2.h1.k", 1.0), Drawn("embed", "a2.h5.q", 1.0)]
    svg = draw_graph(["a2.h4", "a2.h0"], drawn, group=3)
    assert set(boxes(svg)) == {"embed", "a2.kv1", "a2.h4", "a2.h5", "a2.h0"}
    assert svg.count("stroke-dasharray") == 2  # to heads 4 and 5, not to 0
    assert boxes(svg)["a2.kv1"][1] > boxes(svg)["a2.h4"][1]


def test_boxes_of_a_row_keep_apart_and_the_same_graph_is_the_same_text() -> None:
    rng = np.random.default_rng(0)
    names = [f"a{layer}.h{head}" for layer in range(6) for head in range(6)]
    drawn = [
        Drawn(a, f"{b}.q", float(rng.normal()))
        for a, b in itertools.combinations(names, 2)
        if a[1] < b[1] and rng.random() < 0.2
    ]
    svg = draw_graph([], drawn)
    by_row: dict[float, list[float]] = {}
    for x, y in boxes(svg).values():
        by_row.setdefault(y, []).append(x)
    assert len(by_row) == 6
    for row in by_row.values():
        assert min(np.diff(sorted(row)), default=99) >= 60  # a box is 54 wide
    assert draw_graph([], drawn) == svg


def test_no_line_passes_through_a_box_of_another_row() -> None:
    chain = [Drawn("embed", "m0", 1.0), *(Drawn(f"m{i}", f"m{i + 1}", 1.0) for i in range(6))]
    svg = draw_graph([], [*chain, Drawn("embed", "m6", 1.0), Drawn("m0", "m5", 1.0)])
    at = boxes(svg)
    for title, points in ((str(p[0].text), p.attrib["d"]) for p in _paths(svg)):
        ends = set(re.findall(r"embed|m\d", title))
        found = [[float(x) for x in pair] for pair in re.findall(r"(-?[\d.]+) (-?[\d.]+)", points)]
        on_path = [found[0], *found[3::3]]  # without the points that only bend it
        for name, (x, y) in at.items():
            near = [p for p in on_path if abs(p[1] - y) < 20]
            assert name in ends or all(abs(p[0] - x) > 27 for p in near), (title, name)


def _paths(svg: str) -> list[ElementTree.Element]:
    return [path for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if len(path)]


@pytest.mark.parametrize(
    ("nodes", "drawn", "words"),
    [
        (["head"], [], "names no component"),
        ([], [Drawn("m3", "m3", 1.0)], "before m3 writes"),
        ([], [Drawn("a2.h0", "a1.h0.q", 1.0)], "before a2.h0 writes"),
        ([], [Drawn("logits", "m1", 1.0)], "before logits writes"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(nodes: list[str], drawn: list[Drawn], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_graph(nodes, drawn)


def test_nothing_is_drawn_of_nothing() -> None:
    assert ElementTree.fromstring(draw_graph([], [])).attrib["width"] == "0"


@pytest.mark.slow
def test_all_edges_cost_less_than_ten_forward_backward_passes_and_200_are_verified(
    smollm2: TransformerBridge, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = demo_pairs("smollm2-135m")[0]
    tokens = torch.tensor([pair.corrupted])
    plain: list[float] = []
    scoring: list[float] = []

    def forward_backward() -> float:
        began = time.perf_counter()
        embedded = smollm2.original_model.get_input_embeddings()(tokens).detach()
        logits = smollm2.original_model(inputs_embeds=embedded.requires_grad_()).logits[0, -1]
        (logits[pair.answer[0]] - logits[pair.wrong_answer[0]]).backward()
        return time.perf_counter() - began

    class Kept(analysis.Bar):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            scoring.append(self.seconds["estimates"])

    monkeypatch.setattr(analysis, "Bar", Kept)
    with frozen(smollm2):
        forward_backward()  # the first one allocates
    for i in range(3):  # in turn, since others may use the machine
        with frozen(smollm2):
            plain += [forward_backward() for _ in range(3)]
        assert main(["edges", f"store={i}.zarr"]) == EXIT_DONE
        said = capsys.readouterr().out
        assert "70,651 edges scored" in said
        assert "the foremost 200 of them run exactly" in said
    assert statistics.median(scoring) < 10 * statistics.median(plain)
    ds = xr.open_zarr("0.zarr", consolidated=False)
    assert np.isfinite(ds["edge"].values).sum() == 200
    assert checksums("0.zarr") == checksums("1.zarr")
