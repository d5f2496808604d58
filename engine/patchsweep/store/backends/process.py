"""Names of processes by which another process can check whether they live.

A name is `<host>.<machine>-<pid>-<start>`. `machine` identifies one boot and one namespace of
process ids: it differs between containers with the same host name, and after a reboot. `start` is
the start time of the process, which shows that an id was reused.
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
    """Return the name of this process."""
    pid = os.getpid()
    return f"{_place()}-{pid}-{_started(pid) or 0}"


def is_gone(name: str) -> bool:
    """Whether the process called `name` has certainly ended.

    False if that is unknown: the process ran on another machine, or before the last reboot.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["place"] != _place() or os.name != "posix":
        return False
    try:
        os.kill(int(match["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # another user's process, which lives
    started = _started(int(match["pid"]))
    return started is not None and started != int(match["start"])


def _started(pid: int) -> int | None:
    """Return the clock ticks from boot to the start of a process; -1 for a zombie.

    None if the process does not exist or the system has no /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name in parentheses may hold any text
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
