"""The GPU benchmark is ready for a GPU: its cases run (small, here), and its tables are honest."""

from __future__ import annotations

import json
import subprocess
import sys
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
from run_kernels import measure_case
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
@pytest.mark.parametrize("case", sweep_cases.CASES, ids=lambda case: case.name)
def test_sweep_is_right_before_it_counts(case: SweepCase, site: str, tmp_path: Path) -> None:
    result = measure_sweep(case, site, torch.device("cpu"), trial=True, rounds=1)
    assert json.loads(json.dumps(result)) == result
    assert result["loop_patches_timed"] > 0
    result |= {"seconds": {"median": 2.0}, "loop_seconds": 600.0}
    result["launches"] = {"n_launches": 12345, "busy_seconds": 0.5}
    _write(tmp_path, "aaa", "2030-01-01", sweeps=[result])
    table = render_sweeps(tmp_path)
    assert "| 300x as fast | 25% | 12,345 |" in table
    assert table.count("not measured") == 3


def test_wrong_sweep_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ps.sweep

    def wrong(*arguments: Any, **settings: Any) -> Any:
        ds = right(*arguments, **settings)
        return ds.assign(z=ds["z"].roll(head=1))

    monkeypatch.setattr(ps, "sweep", wrong)
    with pytest.raises(AssertionError, match="gpt2-small shape, z: error"):
        measure_sweep(sweep_cases.CASES[0], "z", torch.device("cpu"), trial=True, rounds=1)


def test_scripts_add_to_one_file_of_a_device_and_commit(tmp_path: Path) -> None:
    first = record.add(tmp_path, "Some GPU", {"results": []})
    assert record.add(tmp_path, "Some GPU", {"sweeps": []}) == first
    assert json.loads(first.read_text()).keys() >= {"results", "sweeps", "commit", "device"}


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
