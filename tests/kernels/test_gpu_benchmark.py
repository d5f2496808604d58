"""The GPU benchmark is ready for a GPU: its cases run (small, here), and its table is honest."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, Case
from kernel_table import render
from run_kernels import measure_case
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
        run = {
            "device": "Some GPU",
            "commit": commit,
            "time": when,
            "torch": "2",
            "triton": "3",
            "ceilings": {"copy_bytes_per_s": 1e9, "matmul_flop_per_s": {"float32": 1e12}},
            "results": [result],
        }
        (tmp_path / f"gpu-some-{commit}.json").write_text(json.dumps(run))
    table = render(tmp_path)
    assert "| Some GPU | 2000000 µs |" in table
    assert "commit bbb" in table
    assert "aaa" not in table
    assert table.count("not measured") == len(CASES) - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_benchmark_says_that_there_is_no_gpu() -> None:
    done = subprocess.run(
        [sys.executable, str(GPU / "run_kernels.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "torch sees none here: nothing was measured" in done.stderr
