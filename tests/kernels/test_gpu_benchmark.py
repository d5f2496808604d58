"""The GPU benchmark is ready for a GPU: its cases run (small, here), and its tables are honest."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kernel_table
import patchsweep as ps
import pytest
import record
import sweep_cases
import torch
from kernel_cases import CASES, Case
from kernel_table import render, render_sweeps
from run_kernels import measure_all, measure_case
from run_sweeps import measure_all as measure_sweeps
from run_sweeps import measure_sweep
from sweep_cases import SweepCase
from timing import Ceilings

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"

ONE = Ceilings(1e9, {"float32": 1e9, "bfloat16": 1e9})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timing.time_calls.__defaults__", (0.0,))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel}-{case.name}-{case.dtype}")
def test_case_is_right_before_it_is_timed(case: Case) -> None:
    result = measure_case(case, torch.device("cpu"), ONE, shrink=256)
    assert result["rate"] > 0
    assert json.loads(json.dumps(result)) == result


def test_wrong_kernel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.kernel == "attribution_dot")
    monkeypatch.setattr(
        "patchsweep_kernels.attribution.attribution_dot", lambda s, b, g: s.double().sum(-1)
    )
    with pytest.raises(AssertionError, match="attribution_dot kernel: error"):
        measure_case(case, torch.device("cpu"), ONE, shrink=256)


def test_table_says_what_was_not_measured(tmp_path: Path) -> None:
    table = render(tmp_path)
    assert table.count("not measured") == len(CASES)


def test_table_shows_the_newest_run_of_a_device(tmp_path: Path) -> None:
    case = CASES[3]
    result = measure_case(case, torch.device("cpu"), ONE, shrink=256)
    for commit, when, median in (("aaa", "2030-01-01", 1.0), ("bbb", "2031-01-01", 2.0)):
        result["seconds"]["median"] = median
        _write(tmp_path, commit, when, results=[result])
    table = render(tmp_path)
    assert "| Some GPU | 2000000 µs |" in table
    assert "commit bbb" in table
    assert "aaa" not in table
    assert table.count("not measured") == len(CASES) - 1


def _write(folder: Path, commit: str, when: str, **parts: Any) -> None:
    run = {
        "device": "Some GPU",
        "commit": commit,
        "time": when,
        "torch": "2",
        "triton": "3",
        "ceilings": {"copy_bytes_per_s": 1e9, "matmul_flop_per_s": {"float32": 1e12}},
        **parts,
    }
    (folder / f"gpu-some-{commit}.json").write_text(json.dumps(run))


@pytest.mark.parametrize("site", kernel_table.SITES)
@pytest.mark.parametrize("case", sweep_cases.CASES[::3], ids=lambda case: case.name)
def test_sweep_is_right_before_it_counts(case: SweepCase, site: str, tmp_path: Path) -> None:
    result = measure_sweep(case, site, torch.device("cpu"), trial=True, rounds=1)
    assert json.loads(json.dumps(result)) == result
    assert result["loop_patches_timed"] > 0
    result |= {"seconds": {"median": 2.0}, "loop_seconds": 600.0}
    result["launches"] = {"n_launches": 12345, "busy_seconds": 0.5}
    _write(tmp_path, "aaa", "2030-01-01", sweeps=[result])
    table = render_sweeps(tmp_path)
    assert "| 300x as fast | 25% | 12,345 |" in table
    assert result["ways"].keys() == {"tolerance", "attribution", "nnsight"}
    assert all("seconds" in result["ways"][way] for way in ("tolerance", "attribution"))
    assert table.count("not measured") == 2 * len(sweep_cases.CASES) - 1


def test_wrong_sweep_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ps.sweep

    def wrong(*arguments: Any, **settings: Any) -> Any:
        ds = right(*arguments, **settings)
        return ds.assign(z=ds["z"].roll(head=1))

    monkeypatch.setattr(ps, "sweep", wrong)
    with pytest.raises(AssertionError, match="gpt2-small shape, z: error"):
        measure_sweep(sweep_cases.CASES[0], "z", torch.device("cpu"), trial=True, rounds=1)


def test_failures_are_entries_and_are_tried_again(tmp_path: Path) -> None:
    def fails(device: torch.device, shrink: int) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    good = CASES[3]
    bad = replace(good, name="too large", prepare=fails)
    kept = record.Record(tmp_path, "Some GPU")
    kept.put("ceilings", {"copy_bytes_per_s": 1e9, "matmul_flop_per_s": {"float32": 1e12}})
    measure_all([bad, good], torch.device("cpu"), ONE, kept, math.inf, shrink=256)
    again = record.Record(tmp_path, "Some GPU")
    key = {"kernel": good.kernel, "dtype": "bfloat16"}
    assert not again.has("results", name="too large", **key)
    assert again.has("results", name=good.name, **key)
    assert "out of memory" in again.content["results"][0]["failed"]
    measure_all(
        [replace(good, name="too large"), replace(good, prepare=fails)],
        torch.device("cpu"),
        ONE,
        again,
        math.inf,
        shrink=256,
    )
    assert again.has("results", name="too large", **key)
    assert len(again.content["results"]) == 2


def test_no_case_is_begun_when_time_is_up(tmp_path: Path) -> None:
    kept = record.Record(tmp_path, "Some GPU")
    measure_all(CASES, torch.device("cpu"), ONE, kept, 0.0, shrink=256)
    measure_sweeps(sweep_cases.CASES, torch.device("cpu"), kept, 0.0, trial=True)
    assert not kept.path.exists()


def test_failed_measurements_are_shown(tmp_path: Path) -> None:
    case, swept = CASES[3], sweep_cases.CASES[0]
    failed = {"failed": "OutOfMemoryError: a | b\nc"}
    key = {"name": case.name, "kernel": case.kernel, "dtype": "bfloat16"}
    sweep_key = {"name": swept.name, "site": "z", "dtype": "float32"}
    _write(tmp_path, "aaa", "2030-01-01", results=[key | failed], sweeps=[sweep_key | failed])
    for table in (render(tmp_path), render_sweeps(tmp_path)):
        (line,) = [line for line in table.splitlines() if "failed" in line]
        assert "failed: OutOfMemoryError: a / b c |" in line
        assert line.count("|") == table.splitlines()[0].count("|")


def test_page_is_what_the_files_give() -> None:
    assert kernel_table.PAGE.read_text() == kernel_table.page(), (
        "run python benchmarks/gpu/kernel_table.py"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("script", ["run_kernels.py", "run_sweeps.py"])
def test_benchmark_says_that_there_is_no_gpu(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(GPU / script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "torch sees none here: nothing was measured" in done.stderr
