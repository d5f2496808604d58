"""What the process keeps of the memory that it freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from patchsweep.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(2**30)
def work():
    kept = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MB each
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", FAULTS, mode]))
        for mode in ("keep", "default")
    }
    assert 10 * faults["keep"] < faults["default"]
