"""Shared fixtures: models are loaded once. Shapes in signatures are checked while tests run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from jaxtyping import install_import_hook

CHECKED = ("waves", "metrics", "batch", "hooked", "planner", "exact")
install_import_hook([f"patchsweep.{module}" for module in CHECKED], "beartype.beartype")

from patchsweep.store import process  # noqa: E402
from subjects import model  # noqa: E402  # the hook must come first
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402


@pytest.fixture(scope="session")
def smollm2() -> TransformerBridge:
    return model("smollm2-135m")


@pytest.fixture(scope="session")
def llama() -> TransformerBridge:
    return model("tiny:llama")


@pytest.fixture
def dead_process() -> str:
    """The name of a process that has ended."""
    # the module by its file: the package around it takes seconds to import
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['process_name']())"
    command = [sys.executable, "-c", code, str(process.__file__)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
