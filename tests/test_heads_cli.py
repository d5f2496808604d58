"""Heads on the command line and as a page: one command, one store, one report."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import subjects
import xarray as xr
import yaml
from patchsweep.analyses.heads import OptimalSettings, Thresholds, study
from patchsweep.analyses.heads.ablations import ABLATIONS
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_DONE, EXIT_MISTAKE
from patchsweep.report import write_report
from patchsweep.report.heads import build, heads_of
from patchsweep.store.attributes import attributes
from patchsweep.store.save import save_dataset
from patchsweep.tasks import load_task

CONF = Path(__file__).parents[1] / "conf" / "heads.yaml"
SMALL = [
    "model=tiny:llama",
    "task=ioi",
    "task.n_pairs=2",
    "optimal.heads=2",
    "optimal.steps=2",
    "store=a.zarr",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)
    return tmp_path


@cache
def dataset() -> xr.Dataset:
    model = subjects.model("tiny:llama")
    return study(model, load_task(model, "ioi", 2), optimal=OptimalSettings(heads=2, steps=2))


def test_one_command_gives_classes_and_tables_and_the_same_again_runs_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["heads", *SMALL]) == EXIT_DONE
    told = capsys.readouterr().out
    assert "classes of heads" in told
    assert "disagrees with resample on logit_diff" in told
    assert "a.zarr: written" in told
    ds = xr.open_zarr("a.zarr", consolidated=False)
    assert ds.attrs["kind"] == "heads"
    assert ds["ablated"].dims[0] == "ablation"
    assert ds["ablation"].values.tolist() == list(ABLATIONS)
    assert attributes(ds)["provenance"]["config"]["optimal"]["heads"] == 2

    monkeypatch.setattr(
        "patchsweep.analyses.stages.sweep", lambda *_, **__: pytest.fail("it ran again")
    )
    assert main(["heads", *SMALL]) == EXIT_DONE
    again = capsys.readouterr().out
    assert "already there, nothing was run" in again
    assert again.splitlines()[:5] == told[told.index("classes of heads") :].splitlines()[:5]
    assert main(["heads", *SMALL, "thresholds.direct=0.5"]) == EXIT_MISTAKE
    assert "thresholds.direct is 0.5 in this run and 0.02 in the store" in capsys.readouterr().err

    assert main(["report", "a.zarr"]) == EXIT_DONE
    assert "What the heads are" in Path("report.html").read_text()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method=atp"], "heads have no method"),
        (["direction=denoising"], "heads have no direction"),
        (["sites.heads=all"], "a study is of all heads"),
        (["sites.positions=[end]"], "leave optimal out"),
        (["ablations=[zero]"], "must be a list with resample"),
        (["optimal.steps=-1"], "optimal.steps=-1"),
        (["thresholds.rise=0"], "thresholds.rise=0"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["heads", *SMALL, *words]) == EXIT_MISTAKE
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert text in lines[0]
    assert not Path("a.zarr").exists()


def test_the_config_has_the_defaults_of_the_library() -> None:
    told = yaml.safe_load(CONF.read_text())
    assert told["ablations"] == list(ABLATIONS)
    assert OptimalSettings(**told["optimal"]) == OptimalSettings()
    assert Thresholds(**told["thresholds"]) == Thresholds()


# the page


def test_the_page_shows_every_head_under_every_ablation() -> None:
    ds = dataset()
    page = build(ds)
    cells = re.findall(r"<rect [^>]*><title>a(\d+)\.h(\d+), (\w+)\n", page)
    n_heads = ds.sizes["layer"] * ds.sizes["head"]
    assert len(cells) == len(set(cells)) * ds.sizes["metric"]
    assert len(set(cells)) == n_heads * len(ABLATIONS)
    assert page.count("not run") >= n_heads - 2  # optimal, for heads without a constant
    for name in ("name mover", "S-inhibition", "backup", "induction"):
        assert f'<th scope="row">{name}</th>' in page
    assert "Optimal constants" in page
    assert "attention ≥ 0.100, direct ≤ \u22120.020" in page  # negative name movers
    assert "script-src &#x27;none&#x27;" in page or "script-src 'none'" in page


def test_colours_of_all_maps_end_at_the_largest_effect() -> None:
    ds = dataset()
    found = heads_of(ds, "logit_diff")
    effect = (ds["ablated"] - ds["base_metric"]).sel(metric="logit_diff").mean("pair", skipna=False)
    assert found.limit == pytest.approx(np.nanmax(np.abs(effect.values)))


def test_text_of_a_store_is_escaped(tmp_path: Path) -> None:
    ds = dataset().copy()
    evil = "<script>alert(1)</script>"
    ds["base_token"] = ds["base_token"].astype(object).copy()
    ds["base_token"][0, 3] = evil
    ds = ds.assign_coords(answer=("pair", np.array([evil, evil], dtype=object)))
    ds.attrs = {**ds.attrs, "task_classes": evil}
    page = build(ds)
    assert evil not in page
    assert "&lt;script&gt;alert(1)" in page


def test_a_study_of_positions_and_one_without_task_classes_have_pages(tmp_path: Path) -> None:
    model = subjects.model("tiny:llama")
    pairs = load_task(model, "ioi", 2)
    at = study(model, pairs, ablations=["resample", "zero"], positions=["S2", "end"], optimal=None)
    page = build(at)
    assert "at end" in page
    assert "Each cell shows the position" in page
    plain = study(model, subjects.demo_pairs("tiny:llama"), ablations=["resample"], optimal=None)
    save_dataset(plain, tmp_path / "plain.zarr")
    text = write_report(tmp_path / "plain.zarr", tmp_path / "plain.html").read_text()
    assert "were not measured" in text
    assert "name mover" not in text
