"""The examples find on this model what they say, and their pages are in step with the scripts."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "examples"
IMAGES = ROOT / "docs" / "images" / "examples"
SECONDS = 180
MOST_BYTES = 150_000
LINKED = [*sorted(PAGES.glob("*.md")), ROOT / "docs" / "gpt2.md"]


def load(name: str) -> ModuleType:
    """The module examples/<name>.py, which no package holds."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


make_pages = load("make_pages")
make_notebooks = load("make_notebooks")
SCRIPTS: tuple[str, ...] = make_pages.SCRIPTS


def script(name: str) -> str:
    return (ROOT / "examples" / f"{name}.py").read_text()


def page(name: str) -> str:
    return (PAGES / f"{name}.md").read_text()


@pytest.mark.parametrize("name", SCRIPTS)
def test_notebook_is_in_step_with_its_script(name: str) -> None:
    made = make_notebooks.notebook_of(name)
    there = (make_notebooks.FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert made == there, "run: python examples/make_notebooks.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_notebook_runs_from_top_to_bottom_and_shows_its_pictures(name: str, tmp_path: Path) -> None:
    pytest.importorskip("nbconvert")
    pytest.importorskip("ipykernel")
    words = "-m nbconvert --to notebook --execute --ExecutePreprocessor.timeout=1500".split()
    done = subprocess.run(
        [sys.executable, *words, "--output-dir", tmp_path, make_notebooks.FOLDER / f"{name}.ipynb"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    notebook = json.loads((tmp_path / f"{name}.ipynb").read_text(encoding="utf-8"))
    outputs = [out for cell in notebook["cells"] for out in cell.get("outputs", ())]
    pictures = [out for out in outputs if "image/svg+xml" in out.get("data", {})]
    assert len(pictures) == len(list(IMAGES.glob(f"{name}-*.svg")))


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_example_finds_what_it_says_within_three_minutes(name: str) -> None:
    if name != SCRIPTS[0] and importlib.util.find_spec("nbconvert"):
        pytest.skip("its notebook runs the same cells")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = [ROOT / line.split()[-1] for line in done.stdout.splitlines() if "picture:" in line]
    assert len(drawn) == len(list(IMAGES.glob(f"{name}-*.svg")))
    assert all(path.read_text().startswith("<svg") for path in drawn)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # of one thread, so that what else the machine does counts little
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < SECONDS


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_is_sound_and_has_assertions_and_prose(name: str) -> None:
    # as bytes: a title with "coding: x" in its second line would be read as the file's encoding
    compile((ROOT / "examples" / f"{name}.py").read_bytes(), name, "exec")
    cells = make_pages.cells_of(script(name))
    assert cells[0].is_prose
    assert cells[0].text.startswith("# ")
    assert sum(cell.is_prose for cell in cells) >= 4
    # a changed finding must fail the run
    assert script(name).count("\nassert ") >= 5


@pytest.mark.parametrize("name", SCRIPTS)
def test_page_holds_every_cell_of_the_script_in_order(name: str) -> None:
    rest = page(name)
    for cell in make_pages.cells_of(script(name)):
        # the title is followed by where the page comes from
        for text in cell.text.split("\n\n", 1) if cell.text.startswith("# ") else [cell.text]:
            wanted = text if cell.is_prose else f"```python\n{text}\n```"
            at = rest.find(wanted.strip("\n"))
            assert at >= 0, f"run python examples/make_pages.py {name}; missing: {wanted[:80]!r}"
            rest = rest[at + len(wanted) :]


@pytest.mark.parametrize("name", SCRIPTS)
def test_pictures_of_a_page_are_there_small_and_described(name: str) -> None:
    shown = re.findall(r"!\[([^\]]*)\]\(\.\./images/examples/([^)]+)\)", page(name))
    assert shown
    assert sorted(image for _, image in shown) == sorted(
        path.name for path in IMAGES.glob(f"{name}-*.svg")
    )
    for words, image in shown:
        assert len(words) > 40
        path = IMAGES / image
        assert path.stat().st_size < MOST_BYTES
        ElementTree.parse(path)


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.stem)
def test_links_of_a_page_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?m)^\[[^\]]+\]: (\S+)$", text)
    assert targets
    for target in targets:
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"(?m)^#+ (.+)$", linked.read_text())
            anchors = [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]
            assert heading in anchors, target


def test_page_keeps_prose_code_output_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "small.py").write_text(
        "# %% [markdown]\n# # Small\n#\n# What it does.\n\n# %%\nx = 3\nprint(x)\n\n# %%\n"
        "class P:\n    alt = 'a dot'\n\n    def _repr_svg_(self):\n        return '<svg/>'\n\n\n"
        "P()\n\n# %% [markdown]\n# The end.\n"
    )
    monkeypatch.setattr(make_pages, "ROOT", tmp_path)
    monkeypatch.setattr(make_pages, "IMAGES", tmp_path)
    text = make_pages.page_of("small")
    order = [
        "# Small\n\n*Made by",
        "What it does.",
        "```python\nx = 3\nprint(x)\n```\n\n```text\n3\n```",
        "![a dot](../images/examples/small-1.svg)",
        "The end.\n",
    ]
    assert sorted(order, key=text.index) == order
    assert (tmp_path / "small-1.svg").read_text() == "<svg/>"


def test_failing_cell_names_the_line_of_the_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "examples").mkdir()
    path = tmp_path / "examples" / "wrong.py"
    path.write_text("# %% [markdown]\n# # Wrong\n# no\n\n# %%\nx = 1\nassert x == 2\n")
    monkeypatch.setattr(make_pages, "ROOT", tmp_path)
    with pytest.raises(AssertionError) as error:
        make_pages.page_of("wrong")
    assert error.traceback[-1].lineno == 6  # counted from 0
    assert Path(error.traceback[-1].path) == path


def test_heat_map_draws_red_above_zero_blue_below_and_nothing_at_zero() -> None:
    plots = load("plots")
    panel = plots.heat_map([[1.0, -1.0, 0.0, float("nan")]], "abcd", "t")
    colours = re.findall(r'fill="(#[0-9a-f]{6})"/>', panel.body)
    assert colours == ["#a8152a", "#1d5c9e"]
