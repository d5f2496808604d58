"""What the process keeps of the memory that it freed."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from patchsweep.models.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory(2**30)
def work():
    kept = [torch.ones(5 * 2**20) for _ in range(4)]  # 20 MB each
for _ in range(10):  # until the heap has found its shape
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    # with a fixed threshold, so that glibc does not find a better one by chance
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", FAULTS, mode], env=env))
        for mode in ("keep", "default")
    }
    assert 10 * faults["keep"] < faults["default"], faults
