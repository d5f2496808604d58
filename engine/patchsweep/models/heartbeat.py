"""The heartbeat of a run: it beats where work goes on, so that a process that hangs gives none.

Whatever computes for long calls `beat()` as it goes, such as after each block of a forward pass.
The loop that does a run's work says what that does (`beating`): it keeps the run's leases alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_beat: ContextVar[Callable[[], None] | None] = ContextVar("beat", default=None)


def beat() -> None:
    """Say that this thread's work goes on; outside a run with a store nothing happens."""
    call = _beat.get()
    if call is not None:
        call()


@contextmanager
def beating(call: Callable[[], None]) -> Iterator[None]:
    """Let each `beat()` of this thread call `call`, which must be quick."""
    token = _beat.set(call)
    try:
        yield
    finally:
        _beat.reset(token)
