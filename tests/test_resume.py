"""A sweep that is killed and started again ends with the very same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).parent / "kill_driver.py"


def _drive(folder: Path, n_kills: int, n_slices: int, *more: str) -> dict:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", DRIVER, folder, str(n_kills), str(n_slices), *more],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    result = json.loads(found.stdout.splitlines()[-1])
    print(result)
    return result


def test_killed_run_resumes_to_same_bytes(tmp_path: Path) -> None:
    result = _drive(tmp_path, n_kills=5, n_slices=1)
    assert result["killed"] == 5
    assert all(result["equal"])


def test_killed_slices_resume_to_same_bytes(tmp_path: Path) -> None:
    result = _drive(tmp_path, n_kills=12, n_slices=4)
    assert result["killed"] == 12
    assert all(result["equal"])


@pytest.mark.slow
def test_killed_slices_with_a_tolerance_resume_to_same_bytes(tmp_path: Path) -> None:
    result = _drive(tmp_path, 40, 4, "0.01")
    assert result["killed"] == 40
    assert all(result["equal"])


@pytest.mark.slow
def test_two_hundred_kills_over_four_slices(tmp_path: Path) -> None:
    result = _drive(tmp_path, n_kills=200, n_slices=4)
    assert result["killed"] == 200
    assert all(result["equal"])
