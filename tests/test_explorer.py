"""The explorer: what it answers, whom it refuses, and its page in a real browser."""

from __future__ import annotations

import json
import shlex
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
from patchsweep.cli import main
from patchsweep.errors import PatchsweepError
from patchsweep.results import accessor as summary
from subjects import CLEAN, CORRUPTED, demo_pairs, model

from tools import browser

pytest.importorskip("starlette", reason="starlette is not installed: it is the extra explore")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed: it is the extra explore")

from patchsweep.explorer.cells import Place, _edge_test  # noqa: E402
from patchsweep.explorer.question import TOLERANCES, Question  # noqa: E402
from patchsweep.explorer.runs import Explorer  # noqa: E402
from patchsweep.explorer.serve import HOST, app_of  # noqa: E402

NAME = "tiny:llama"
KEY = "a-key"
SIGNS = "It's ${x}, a=b~c;"
ASKED = Question(CLEAN, CORRUPTED, " Mary", " John", sites=("resid_pre", "z"))


@dataclass
class Served:
    """An explorer that listens."""

    explorer: Explorer
    port: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}/{KEY}/"

    def get(self, path: str, headers: dict[str, str] | None = None) -> tuple[int, str]:
        return _send(urllib.request.Request(self.url + path, headers=headers or {}))

    def post(
        self, path: str, body: Any, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, Any]]:
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        wanted = {"Content-Type": "application/json", **(headers or {})}
        status, text = _send(urllib.request.Request(self.url + path, sent, wanted))
        return status, json.loads(text) if text.startswith("{") else {"text": text}

    def events(self, number: int) -> list[dict[str, Any]]:
        """All events of a run, to its end."""
        _, text = self.get(f"runs/{number}/events")
        lines = (line for line in text.splitlines() if line.startswith("data: "))
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def _send(request: urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    explorer = Explorer(model(NAME), NAME)
    config = uvicorn.Config(lambda scope, receive, send: None, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    listening = uvicorn.Config("", host=HOST, port=0).bind_socket()
    port = listening.getsockname()[1]
    config.app = app_of(explorer, KEY, port)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Served(explorer, port)
    server.should_exit = True
    thread.join(20)
    explorer.close()


def body(question: Question, **changes: Any) -> dict[str, Any]:
    names = ("clean", "corrupted", "answer", "wrong_answer")
    fields = {name: getattr(question, name) for name in names}
    return {**fields, "sites": list(question.sites), "metric": question.metric, **changes}


def unpacked(event: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """The labels of the columns of a map of one pair, and its values [row, column, hidden]."""
    import base64

    figure = event["figure"]
    sizes = [len(figure["labels"][figure[d]]) for d in ("rows", "columns", "hidden") if figure[d]]
    (cells,) = figure["frames"].values()
    values = np.frombuffer(base64.b64decode(cells["value"]), "<f4")
    return figure["labels"][figure["columns"]], values.reshape(sizes)


def test_maps_of_a_run_hold_the_values_of_the_sweep(served: Served) -> None:
    status, reply = served.post("runs", body(ASKED))
    assert status == 200
    events = served.events(reply["run"])
    assert events[0]["kind"] == "start"
    assert events[-1]["kind"] == "done"
    maps = {event["figure"]["site"]: event for event in events if event["kind"] == "map"}
    assert set(maps) == {"resid_pre", "z"}
    ds = ps.sweep(model(NAME), demo_pairs(NAME), ["resid_pre", "z"])
    for site, dims in (("resid_pre", ("layer", "pos")), ("z", ("layer", "head", "pos"))):
        assert maps[site]["done"]
        _, values = unpacked(maps[site])
        expected = ds[site].squeeze(["metric", "pair"], drop=True).transpose(*dims)
        # each site has run by itself, in packed batches of its own
        np.testing.assert_allclose(values, expected, atol=1e-5)
    status, page = served.get(f"runs/{reply['run']}/report")
    assert status == 200
    assert "map-1" in page
    # the same question again runs nothing: its stores are complete
    done = [event["done"] for event in events if event["kind"] == "bar"]
    _, again = served.post("runs", body(ASKED))
    second = [event for event in served.events(again["run"]) if event["kind"] == "map"]
    assert [unpacked(e)[1].tobytes() for e in second] == [
        unpacked(maps[e["figure"]["site"]])[1].tobytes() for e in second
    ]
    assert done == sorted(done)
    assert done[-1] == events[0]["token_layers"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clean": ""}, "clean is empty"),
        ({"corrupted": CLEAN}, "must differ"),
        ({"answer": " Mary John"}, "must be one token"),
        ({"answer": "zxqv"}, "must be one token"),
        ({"wrong_answer": " Mary"}, "must differ"),
        ({"sites": []}, "no site is chosen"),
        ({"sites": ["x"]}, "sites='x' is not known"),
        ({"sites": "z"}, "must be a list"),
        ({"metric": "accuracy"}, "metric='accuracy' is not known"),
        ({"tolerance": "2%"}, "tolerance='2%' is not known"),
        ({"tolerance": "1%", "metric": "rank"}, "tolerance='1%'"),
        ({"seed": 1}, "'seed' is no part"),
        ({"clean": "a" * 200_000}, "shorten it"),
        ({"clean": "word " * 9000}, "shorten it"),
        ({"clean": 3}, "clean is empty"),
        ({"chat": "yes"}, "must be true or false"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(
    served: Served, changes: dict[str, Any], said: str
) -> None:
    before = len(served.explorer.runs)
    for path in ("check", "runs"):
        status, reply = served.post(path, body(ASKED, **changes))
        assert status == 400
        assert said in reply["error"]
        assert "pair 0" not in reply["error"]
    assert len(served.explorer.runs) == before


def test_other_pages_are_refused(served: Served) -> None:
    host = f"{HOST}:{served.port}"
    question = body(ASKED)
    assert served.get("")[0] == 200
    assert served.get("", {"Host": f"localhost:{served.port}"})[0] == 200
    for name in ("evil.example", f"evil.example:{served.port}", f"{HOST}:1", ""):
        assert served.get("", {"Host": name})[0] in (400, 403)
    assert served.post("check", question, {"Origin": f"http://{host}"})[0] == 200
    for origin in ("http://evil.example", "null", f"https://{host}"):
        assert served.post("check", question, {"Origin": origin})[0] == 403
    # what a page of another site may send without asking: forms and plain text
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert served.post("check", question, {"Content-Type": kind})[0] == 415
    assert served.post("check", b"{")[0] == 400
    assert served.post("check", b"[1]")[0] == 400
    assert served.post("check", b" " * (2 << 20))[0] == 400
    wrong = served.url.replace(KEY, "another")
    assert _send(urllib.request.Request(wrong))[0] == 404
    assert served.get("runs/999/events")[0] == 404
    assert served.get("runs/999/report")[0] == 400


def test_a_new_question_ends_the_run_of_the_last(served: Served) -> None:
    pattern = body(ASKED, sites=["pattern", "q"], metric="prob")
    first, second = (served.post("runs", x)[1]["run"] for x in (pattern, body(ASKED)))
    assert served.events(first)[-1]["kind"] == "cancelled"
    maps = [e for e in served.events(second) if e["kind"] == "map"]
    expected = ps.sweep(model(NAME), demo_pairs(NAME), "resid_pre")["resid_pre"].values.ravel()
    np.testing.assert_allclose(unpacked(maps[0])[1].ravel(), expected, atol=1e-5)


def test_prompts_of_unequal_lengths_have_maps_and_a_lens(served: Served) -> None:
    question = body(ASKED, corrupted=CORRUPTED.replace("the shops", "the old shops"))
    status, reply = served.post("check", question)
    assert status == 200
    assert "aligned at their ends" in reply["tokens"]
    number = served.post("runs", question)[1]["run"]
    (found, *_) = [e for e in served.events(number) if e["kind"] == "map"]
    pairs = ps.PromptPairs.from_strings(
        model(NAME), [CLEAN], [question["corrupted"]], [(" Mary", " John")], align="end"
    )
    expected = ps.sweep(model(NAME), pairs, "resid_pre")["resid_pre"].values[0, 0]
    values = unpacked(found)[1].squeeze()
    assert (np.isnan(values) == np.isnan(expected)).all()
    assert np.isnan(expected).any()
    np.testing.assert_allclose(values, expected, atol=1e-5)
    place = "site=z&layer=1&pos=-1&unit=2"
    assert served.get(f"runs/{number}/cell/lens?{place}")[0] == 200
    status, page = served.get(f"runs/{number}/cell/attention?{place}")
    assert status == 400
    assert "use pairs of prompts of equal length" in page


@pytest.mark.slow
def test_a_cell_has_a_lens_attention_and_edges(served: Served) -> None:
    number = served.post("runs", body(ASKED))[1]["run"]
    served.events(number)
    at = f"runs/{number}/cell"
    status, page = served.get(f"{at}/lens?site=z&layer=1&pos=16&unit=2")
    assert status == 200
    assert "of layer 1, head 2, at position 16" in page
    status, page = served.get(f"{at}/attention?site=resid_pre&layer=1&pos=16")
    assert status == 200
    assert "a1.h3" in page
    assert "a0.h0" not in page
    status, page = served.get(f"{at}/edges?site=z&layer=1&pos=16&unit=2")
    assert status == 200
    assert "a1.h2.q" in page
    for wrong in (
        "lens?site=z",
        "lens?site=x&layer=1",
        "lens?site=z&layer=99",
        "map?site=z&layer=1",
    ):
        status, page = served.get(f"{at}/{wrong}")
        assert status == 400
        assert 'role="alert"' in page


def test_edges_of_a_cell_are_those_of_its_component() -> None:
    edge = ps.edges(model(NAME), demo_pairs(NAME))
    ends = [[str(x) for x in edge[name].values] for name in ("sender", "reader")]
    exists = np.isfinite(edge["edge_eap"].values[0, 0])
    pairs = [(s, r) for i, s in enumerate(ends[0]) for j, r in enumerate(ends[1]) if exists[i, j]]

    def of(site: str, layer: int, unit: int | None = None) -> set[tuple[str, str]]:
        test = _edge_test(model(NAME), Place(site, layer, unit=unit))
        return {pair for pair in pairs if test(*pair)}

    assert of("resid_pre", 0) == {p for p in pairs if p[0] == "embed"}
    # the stream between two blocks is one place
    assert of("resid_post", 0) == of("resid_pre", 1)
    assert of("resid_post", 2) == {p for p in pairs if p[1] == "logits"}
    mid = of("resid_mid", 1)
    assert ("a1.h0", "m1") in mid
    assert ("a0.h0", "a1.h0.q") not in mid
    assert of("mlp_out", 1) == {p for p in pairs if "m1" in p}
    assert of("q", 1, 2) == {p for p in pairs if p[1] == "a1.h2.q"}
    group = model(NAME).cfg.n_heads // model(NAME).cfg.n_key_value_heads
    head = of("z", 1, 2)
    assert {r for s, r in head if s != "a1.h2"} == {
        "a1.h2.q",
        f"a1.h{2 // group}.k",
        f"a1.h{2 // group}.v",
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "question",
    [
        replace(ASKED, tolerance="1%", direction="noising"),
        replace(
            ASKED,
            clean=f'"{CLEAN}',
            corrupted=f'"{CORRUPTED}',
            sites=("q", "mlp_out"),
            metric="prob",
            intervention="zero",
        ),
        replace(
            ASKED,
            clean=f"{SIGNS} {CLEAN}",
            corrupted=f"{SIGNS} {CORRUPTED}",
        ),
    ],
    ids=["tolerance", "quotes", "signs"],
)
def test_what_is_exported_runs_the_same_sweep(
    question: Question, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert question.tolerance in TOLERANCES
    expected = ps.sweep(
        model(NAME), question.pairs(model(NAME)), question.sites, **question.settings()
    )
    names: dict[str, Any] = {}
    exec(question.python(NAME), names)
    names["ds"].load()
    (tmp_path / "runs").rename(tmp_path / "by-python")
    program, *words = shlex.split(question.command(NAME))
    assert program == "patchsweep"
    assert main(words) == 0
    ran = ps.open_store("runs/explored.zarr")
    for site in question.sites:
        assert abs(summary.effect(expected, site)).max() > 1e-4
        np.testing.assert_array_equal(names["ds"][site], expected[site])
        np.testing.assert_array_equal(ran[site], expected[site])


def test_the_verb_says_which_extra_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("patchsweep.cli.explore.find_spec", lambda name: None)
    assert main(["explore"]) == 2
    assert 'pip install "patchsweep[explore]"' in capsys.readouterr().err


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.PROGRAM is None:
        pytest.skip("Chromium is not installed")
    with browser.Browser(tmp_path_factory.mktemp("chromium")) as one:
        yield one


def finished(page: browser.Browser) -> None:
    page.wait("document.body.dataset.done && document.querySelector('#bar').hidden")


def test_in_a_browser_typed_prompts_become_maps_and_a_click_opens_a_cell(
    served: Served, chromium: browser.Browser
) -> None:
    page = chromium
    page.open(served.url)
    page.wait("document.querySelector('#said table')")
    page.type("#clean", f"<b>x</b> {CLEAN}")
    page.type("#corrupted", f"<b>x</b> {CORRUPTED}")
    page.type("#answer", " Mary")
    page.type("#wrong_answer", " John")
    page.wait("document.querySelector('#said').textContent.includes('<b>x</b>')")
    page.wait("!document.querySelector('#run').disabled")
    assert page.evaluate("document.querySelectorAll('#said td b').length") == 0  # text, not HTML
    assert page.evaluate("document.querySelectorAll('#said mark').length") == 2
    page.click("#run")
    finished(page)
    assert page.evaluate("document.body.dataset.finished") == "4"
    n_layers, n_pos = page.evaluate(
        "(({data: [t]}) => [t.z.length, t.z[0].length])(document.getElementById('map-0'))"
    )
    assert n_layers == model(NAME).cfg.n_layers
    page.click("#map-0 .nsewdrag", x=(n_pos - 0.5) / n_pos, y=0.5 / n_layers)
    page.wait("document.querySelector('#shown').dataset.loaded")
    named = page.evaluate("document.querySelector('#named').textContent")
    assert named.startswith(f"resid_pre layer {n_layers - 1}, position {n_pos - 1}")
    inside = "document.querySelector('#shown').contentDocument"
    assert f"position {n_pos - 1}" in page.evaluate(f"{inside}.body.textContent")
    n_heads = model(NAME).cfg.n_heads
    page.click("#map-3 .nsewdrag", x=1.5 / n_heads, y=1.5 / n_layers)
    page.wait("document.querySelector('#shown').dataset.loaded?.includes('unit=1')")
    for kind in ("attention", "edges"):
        page.click(f"[data-kind={kind}]")
        page.wait(f"document.querySelector('#shown').dataset.loaded?.includes('{kind}')")
        text = page.evaluate(f"{inside}.body.textContent")
        assert f"a{n_layers - 2}.h1" in text
    # a setting draws the maps again
    page.evaluate(
        "(() => { const t = document.querySelector('#tolerance'); t.value = 5;"
        "for (const kind of ['input', 'change']) t.dispatchEvent(new Event(kind)); })()"
    )
    page.wait("document.querySelector('#python').textContent.includes(\"tolerance='10%'\")")
    finished(page)
    # and a mistake is told where it was made
    page.type("#answer", "The cat")
    page.wait("document.querySelector('#said .warn')")
    assert "must be one token" in page.evaluate("document.querySelector('#said').textContent")
    assert page.evaluate("document.querySelector('#run').disabled")
    refused = [x for x in page.complaints if "status of 400" in x]  # while texts were being typed
    assert refused == page.complaints != []


def test_the_page_fits_a_phone(served: Served, chromium: browser.Browser) -> None:
    page = chromium
    page.resize(600, 900)
    page.open(served.url)
    page.wait("document.querySelector('#said table')")
    page.click("#run")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 600
    # a map keeps its height where the window changes
    heights = "[...document.querySelectorAll('.plot')].map((plot) => plot.clientHeight)"
    before = page.evaluate(heights)
    page.resize(1000, 900)
    page.wait("document.querySelector('.plot').clientWidth > 0 && innerWidth === 1000")
    time.sleep(0.5)
    assert page.evaluate(heights) == before
    assert min(before) > 100
    page.resize(1280, 900)


def test_a_question_without_a_tokenizers_template_is_no_chat() -> None:
    with pytest.raises(PatchsweepError, match="no chat template"):
        replace(ASKED, chat=True).pairs(model("tiny:gpt2"))
