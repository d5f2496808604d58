"""Every kernel compiles to machine code for GPUs that are not here, and fits them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")

KERNELS = [
    "scatter",
    "attribution",
    "attention-",
    "attention_split",
    "merge",
    "replaced",
    "base_attention",
    "attention_change",
    "vocab",
    "answer_logits",
    "rms_norm",
    "gate",
    "rotary",
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Launch name -> target -> registers, shared memory and spills, or an error."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # An empty cache: what compiled yesterday proves nothing.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compile_gate.py"))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    print(done.stdout)
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_compiles_and_fits(
    kernel: str, target: str, report: dict[str, dict[str, Any]]
) -> None:
    launches = {name: used[target] for name, used in report.items() if name.startswith(kernel)}
    assert launches
    errors = {name: used["error"] for name, used in launches.items() if "error" in used}
    assert not errors
    assert all(used["registers"] > 0 for used in launches.values())


def test_page_says_what_was_compiled(report: dict[str, dict[str, Any]]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "design" / "kernels.md").read_text()
    triton = import_module("triton")
    if f"Triton {triton.__version__} " not in text:
        pytest.skip("the page is of another Triton")
    rows = [line.split(" | ") for line in text.splitlines() if re.match(r"\| [a-z_]+-", line)]
    assert len(rows) > 20
    for row in rows:
        for target, said in zip(("sm_80", "sm_90", "gfx942"), row[1:4], strict=True):
            if said.strip():
                used = report[row[0].strip("| ")][target]
                shared = f"{used['shared_bytes'] / 1024:.0f} KB"
                found = f"{used['registers']}, {shared}, {used['spilled_bytes']} B"
                assert said.strip() == found, (row[0], target)
