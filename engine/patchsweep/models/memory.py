"""Free memory for this process, and how much freed memory glibc keeps."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on `device`.

    GPU: the driver's free memory plus the unused memory of torch's allocator. CPU: the smaller of
    the system's available memory and the remainder of the control group's limit.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    return min(int(psutil.virtual_memory().available), _group_memory())


# upper limit of glibc's M_MMAP_THRESHOLD: larger blocks come from the system (mmap) each time
LARGEST_KEPT = 32 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_INT_MAX = 2**31 - 1


def keep_freed_memory(n_bytes: int) -> None:
    """Let this process keep up to `n_bytes` of freed CPU memory for reuse.

    glibc returns large blocks to the system when they are freed. A packed batch allocates and
    frees some hundred megabytes in each block of a model, and the system would map and zero each
    page each time. Blocks above `LARGEST_KEPT` are returned all the same. Does nothing without
    glibc.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, min(n_bytes, _INT_MAX))


def give_memory_back() -> None:
    """Return freed memory to the system; between blocks glibc would keep hundreds of MB."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    """Return glibc; None if the C library is another one."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def _group_memory() -> int:
    """Return the bytes left under this process's control group limit; 2**62 without a limit."""
    most = 2**62
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return most
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":  # version 1
            folder = Path("/sys/fs/cgroup/memory" + path)
            limit, used, stat = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_{}"
        elif not controllers:  # version 2
            folder = Path("/sys/fs/cgroup" + path)
            limit, used, stat = "memory.max", "memory.current", "{}"
        else:
            continue
        try:
            total = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            stats = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no limit, or the folder is not visible
            continue
        # the kernel frees page cache on demand, so it counts as free
        cached = sum(int(stats.get(stat.format(f"{x}_file"), 0)) for x in ("active", "inactive"))
        most = min(most, max(0, total - taken + cached))
    return most


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a failed allocation, on a GPU or on the CPU (a RuntimeError there)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "allocate memory" in str(error) or "out of memory" in str(error).lower()
