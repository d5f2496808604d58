"""Shape and type checks of the kernels' public functions while they are tested."""

import os
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

# The GPU benchmark is a folder of scripts.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "gpu"))

if "patchsweep_kernels" not in sys.modules:
    install_import_hook("patchsweep_kernels", "beartype.beartype")


def pytest_report_header() -> str:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "patchsweep_kernels: " + (
        "Triton kernels in the interpreter" if interpreted else "torch references"
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    import torch

    torch.manual_seed(0)
