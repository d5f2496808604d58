"""Names of processes, such that another process can tell whether one still lives.

A name is `<host>.<machine>-<pid>-<start>`. `machine` stands for one boot and one namespace of
process ids, so that two containers which share a host name are told apart, and a reboot makes
every older name a stranger's. `start` is when the process began, so that a reused id is noticed.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from functools import cache
from pathlib import Path

_NAME = re.compile(r"(?P<place>.+)-(?P<pid>\d{1,9})-(?P<start>\d{1,18})")


def process_name() -> str:
    """The name of this process."""
    pid = os.getpid()
    return f"{_place()}-{pid}-{_started(pid) or 0}"


def is_gone(name: str) -> bool:
    """True if the process called `name` has certainly ended.

    False where that cannot be known: it ran on another machine, or before the last reboot.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["place"] != _place() or os.name != "posix":
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's, so it lives
    started = _started(int(match["pid"]))
    return started is not None and started != int(match["start"])


def _started(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; -1 for a dead one that nobody has reaped.

    None if this system does not tell.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return -1 if state in "ZX" else int(fields[18])


@cache
def _place() -> str:
    host = re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname()) or "host"
    parts = [host]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text(),
        lambda: str(Path("/proc/self/ns/pid").stat().st_ino),
    ):
        try:
            parts.append(read())
        except OSError:  # not on Linux: the host name alone
            parts.append("")
    return f"{host}.{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:8]}"
