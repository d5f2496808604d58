"""Every claim about the kernels holds for the Triton code too, run in Triton's interpreter.

The variable that switches the interpreter on must be set before Triton is imported, so the test
files run once more in a process of their own; here their results are looked up.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = [
    "test_scatter",
    "test_attention",
    "test_replaced",
    "test_readout",
    "test_attribution",
    "test_elementwise",
    "test_large_offsets",
]

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreter's"
    ),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[ET.Element], str]:
    """The test cases as the interpreted process reported them, and its output."""
    report = tmp_path_factory.mktemp("interpreter") / "report.xml"
    command = [sys.executable, "-m", "pytest", "--confcutdir", str(HERE), "-p", "no:cacheprovider"]
    command += [f"--junitxml={report}", *(str(HERE / f"{file}.py") for file in FILES)]
    # Many tiny operations: a second thread would mostly wait.
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert report.exists(), done.stdout + done.stderr
    return list(ET.parse(report).iter("testcase")), done.stdout


@pytest.mark.parametrize("file", FILES)
def test_kernels_hold_in_the_interpreter(file: str, results: tuple[list[ET.Element], str]) -> None:
    cases, output = results
    mine = [case for case in cases if case.get("classname", "").endswith(file)]
    assert mine, output
    assert "Triton kernels in the interpreter" in output
    bad = [case.get("name") for case in mine if list(case)]  # failed, in error, or skipped
    assert not bad, output[-8000:]
