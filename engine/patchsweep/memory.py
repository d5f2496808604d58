"""How much memory this process can still take."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take on `device`.

    On a CPU: what the system has, or what its control group leaves, whichever is less.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(_system_memory(), _group_memory())


def _system_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 4 * 2**30  # no Linux: a modest guess


def _group_memory() -> int:
    """What the control group of this process leaves; very much where there is none."""
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
        except (OSError, ValueError):  # no limit, or the folder is not shown to us
            continue
        # pages of files are given up when memory is asked for
        files = sum(int(stats.get(stat.format(f"{x}_file"), 0)) for x in ("active", "inactive"))
        most = min(most, max(0, total - taken + files))
    return most
