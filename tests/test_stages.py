"""Analyses write as they go: killed, resumed and sliced runs end with the same bytes as others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from patchsweep.analyses.attention import attention
from patchsweep.analyses.circuits import circuit, screen_edges
from patchsweep.analyses.circuits import edge_batch as batches
from patchsweep.analyses.heads import OptimalSettings, ablations, study
from patchsweep.analyses.logit_lens import compute, lens
from patchsweep.analyses.logit_lens.patches import Patch
from patchsweep.analyses.stages import Stages, Unfinished
from patchsweep.cli import main
from patchsweep.cli.main import EXIT_DONE
from patchsweep.cli.stop import Stopped
from patchsweep.errors import ConfigError, StoreError
from patchsweep.store.layout import PARTS
from patchsweep.store.status import EXIT_COMPLETE, EXIT_INCOMPLETE, stages_of, store_status
from patchsweep.sweeps.executor import Quiet
from patchsweep.tasks import load_task
from store_checks import checksums
from subjects import model, quick

NAME = "tiny:llama"
Function = Callable[..., Any]
# case -> analysis, arguments, stages
CASES: dict[str, tuple[Function, dict[str, Any], list[str]]] = {
    "edges": (screen_edges, {"top": 4}, ["1-estimates", "2-exact"]),
    "lens": (lens, {"patch": Patch("z", 1, "all", 0)}, ["1-lens"]),
    "attention": (attention, {"top": 2}, ["1-ranks", "2-views", "3-exact"]),
    "circuit": (circuit, {}, ["1-estimates", "2-circuits"]),
    "circuit-of-nodes": (
        circuit,
        {"level": "nodes", "method": "exact"},
        ["1-scores", "2-circuits"],
    ),
    "heads": (
        study,
        {"optimal": OptimalSettings(heads=2, steps=1)},
        ["1-resample", "2-mean", "3-zero", "4-training", "5-constants"],
    ),
}


@pytest.fixture(autouse=True)
def one_pair_a_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Blocks of one pair, so that three pairs are three units."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(batches, "WRITE_BYTES", 1)
    monkeypatch.setattr(compute, "MAX_TOKENS", 1)
    monkeypatch.setattr("patchsweep.analyses.attention.MAX_TOKENS", 1)
    monkeypatch.setattr(ablations, "PAIRS_AT_ONCE", 1)


class Recorder(Quiet):
    """Counts units, and stops like a killed process after `n_items` work items."""

    def __init__(self, n_items: int | None = None) -> None:
        self.left, self.units = n_items, [0]

    def begin(self, n_units: int, total: int, done: int) -> None:
        if self.left == 0:
            raise KeyboardInterrupt

    def advance(self, *_: Any) -> None:
        self.units[0] += 1

    def item_done(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def run(case: str, place: Path | str, **settings: Any) -> tuple[xr.Dataset, bool]:
    """Results and whether they were stored before; `settings` of `Stages`."""
    analysis, arguments, _ = CASES[case]
    stages = Stages(place, **settings)
    bridge = model(NAME)
    return analysis(bridge, load_task(bridge, "ioi", 3), **arguments, stages=stages), stages.known


@pytest.mark.parametrize("case", quick(CASES, "edges", "lens", "attention", "circuit"))
def test_analysis_that_is_killed_after_every_item_resumes_to_the_same_bytes(
    case: str, tmp_path: Path
) -> None:
    undisturbed, killed = tmp_path / "a.zarr", tmp_path / "b.zarr"
    whole = Recorder()
    ds, known = run(case, undisturbed, progress=whole)
    assert not known
    seen, kills, n_units = set(), 0, 0
    while True:
        recorder = Recorder(n_items=1)
        try:
            resumed, known = run(case, killed, progress=recorder)
            break
        except KeyboardInterrupt:
            kills += 1
            seen |= {url.rpartition("/")[2] for url in stages_of(killed)}
            assert not killed.exists()
        finally:
            n_units += recorder.units[0]
    assert seen == set(CASES[case][2])
    assert n_units == whole.units[0] >= 3  # nothing was computed twice
    assert kills >= 2
    assert checksums(killed) == checksums(undisturbed)
    xr.testing.assert_identical(resumed, ds)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zarr", "b.zarr"]
    again = Recorder(n_items=0)  # would stop at the first stage
    found, known = run(case, killed, progress=again)
    assert known
    xr.testing.assert_equal(found, ds)


@pytest.mark.parametrize("case", CASES)
def test_slices_of_an_analysis_write_what_one_process_writes(case: str, tmp_path: Path) -> None:
    run(case, tmp_path / "a.zarr")
    sliced = tmp_path / "b.zarr"
    first, second = Recorder(), Recorder()
    try:
        run(case, sliced, slice_index=0, n_slices=2, progress=first)
    except Unfinished as told:
        assert "slice 0 of 2 has done its units" in str(told)  # noqa: PT017
        assert not sliced.exists()
        run(case, sliced, slice_index=1, n_slices=2, progress=second)
        assert second.units[0] > 0
    assert first.units[0] > 0
    assert checksums(sliced) == checksums(tmp_path / "a.zarr")
    assert run(case, sliced, slice_index=1, n_slices=2)[1]  # a slice that comes late


def test_results_of_another_process_are_taken(tmp_path: Path) -> None:
    """A process finishes first: it has stored the results and deleted the stages."""
    place = tmp_path / "a.zarr"

    class Overtaken(Quiet):
        def item_done(self) -> None:
            run("edges", place)

    ds, known = run("edges", place, progress=Overtaken())
    assert known
    assert ds.sizes["chosen"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]


def test_stages_of_other_settings_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "a.zarr"
    with pytest.raises(KeyboardInterrupt):
        run("edges", place, progress=Recorder(n_items=1))
    CASES["more-edges"] = (screen_edges, {"top": 5}, [])
    try:
        with pytest.raises(StoreError, match="belongs to another run: top is 5 in this run"):
            run("more-edges", place)
    finally:
        del CASES["more-edges"]


def test_stages_behind_a_url_resume_and_go(tmp_path: Path) -> None:
    place = "memory://stages/a.zarr"
    with pytest.raises(KeyboardInterrupt):
        run("edges", place, progress=Recorder(n_items=1))
    assert stages_of(place) == [f"{place}.parts/1-estimates"]
    assert store_status(stages_of(place)[0]).total.done == 1
    resumed = Recorder()
    _, known = run("edges", place, progress=resumed)
    assert (resumed.units[0], known) == (5, False)
    assert stages_of(place) == []
    run("edges", tmp_path / "a.zarr")
    assert checksums(place) == checksums(tmp_path / "a.zarr")


def test_what_is_no_place_for_stages_is_refused() -> None:
    bridge = model(NAME)
    pairs = load_task(bridge, "ioi", 3)
    given: Any = "a.zarr"
    with pytest.raises(ConfigError, match=r"stages='a\.zarr' must"):
        screen_edges(bridge, pairs, top=3, stages=given)
    with pytest.raises(ConfigError, match="n_slices=2 needs a store"):
        Stages(n_slices=2)


COMMAND = ["edges", f"model={NAME}", "task=ioi", "task.n_pairs=3", "top=4", "store=e.zarr"]


def test_status_and_stop_tell_how_far_an_analysis_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "patchsweep.cli.progress.Bar.item_done",
            lambda bar: (_ for _ in ()).throw(Stopped("SIGTERM: stopped")),
        )
        main(COMMAND)
    capsys.readouterr()
    assert main(["status", "e.zarr"]) == EXIT_INCOMPLETE
    said = " ".join(capsys.readouterr().out.split())
    assert "1 of 3 units are done" in said
    assert "e.zarr: no results yet; 1 stages of the analysis have begun" in said
    assert main([*COMMAND, "slice=0", "n_slices=2"]) == EXIT_DONE
    assert "slice 0 of 2 has done its units; 1 units of other slices are missing" in " ".join(
        capsys.readouterr().out.split()
    )
    assert main([*COMMAND, "slice=1", "n_slices=2"]) == EXIT_DONE
    assert "e.zarr: written" in capsys.readouterr().out
    assert main(["status", "e.zarr"]) == EXIT_COMPLETE
    assert "results of `patchsweep edges`" in capsys.readouterr().out


DRIVER = """
import os, signal, sys
import patchsweep.analyses.circuits.edge_batch as batches
from patchsweep.cli import main
from patchsweep.store.store import Store

batches.WRITE_BYTES = 1
if sys.argv[1] == "die":  # with the lease of the second unit
    written = []
    write = Store.write
    Store.write = lambda *args: (
        os.kill(os.getpid(), signal.SIGKILL) if written else written.append(write(*args))
    )
sys.exit(main(sys.argv[2:]))
"""


def test_killed_process_and_two_slices_at_once_end_with_the_bytes_of_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(how: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", DRIVER, how, *COMMAND, *words]
        return subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})

    assert start("die").wait() == -signal.SIGKILL
    (stage,) = stages_of(tmp_path / "e.zarr")
    assert store_status(stage).total.done == 1
    assert main([*COMMAND, "slice=0", "n_slices=2"]) == EXIT_DONE  # the dead hold nobody up
    assert "no process computes them" in " ".join(capsys.readouterr().out.split())
    slices = [start("live", f"slice={i}", "n_slices=2") for i in range(2)]
    assert [process.wait() for process in slices] == [EXIT_DONE] * 2
    assert not (tmp_path / f"e.zarr{PARTS}").exists()
    assert main([*COMMAND, "store=f.zarr"]) == EXIT_DONE
    assert checksums(tmp_path / "e.zarr") == checksums(tmp_path / "f.zarr")
