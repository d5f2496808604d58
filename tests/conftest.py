"""Shared fixtures: models are loaded once. Shapes in signatures are checked while tests run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from jaxtyping import install_import_hook

CHECKED = (
    "forward",
    "runners.hooked",
    "runners.packed",
    "spec.batch",
    "spec.metrics",
    "spec.plan",
    "spec.planner",
    "sweeps.exact",
)
os.environ.pop("COLUMNS", None)  # tables as wide as where there is no terminal
install_import_hook([f"patchsweep.{module}" for module in CHECKED], "shape_checks.checked")

from patchsweep.models import device_map, load  # noqa: E402  # the hook must come first
from patchsweep.models.device_map import Placement  # noqa: E402
from patchsweep.store.backends import process  # noqa: E402
from subjects import model  # noqa: E402
from transformer_lens.model_bridge import TransformerBridge  # noqa: E402
from visible_gpu import visible_gpu  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--beside-gpu",
        action="store_true",
        help="run beside a GPU that no test may touch; models without a device go to the CPU",
    )


@pytest.fixture(scope="session", autouse=True)
def _beside_gpu(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """With --beside-gpu a GPU is visible; the list names what touched it."""
    if not request.config.getoption("--beside-gpu"):
        yield []
        return

    def on_cpu(given: str | None, placed: Placement | None) -> str | None:
        return device_map.choose_device(given if given or placed else "cpu", placed)

    with pytest.MonkeyPatch.context() as patch, visible_gpu() as touched:
        patch.setattr(load, "choose_device", on_cpu)
        yield touched


@pytest.fixture(autouse=True)
def _gpu_untouched(_beside_gpu: list[str]) -> Iterator[None]:
    """A test that touches the visible GPU fails, also where the error was caught."""
    _beside_gpu.clear()
    yield
    assert not _beside_gpu, "something touched the GPU, and an error that says so was lost"


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
