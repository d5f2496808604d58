"""The heartbeat of a run: code that makes progress calls `beat`, so a hung process does not.

Long computations call `beat()` as they proceed, such as after each block of a forward pass. The
loop of a run sets by `beating` what a beat does: it renews the run's leases and moves its bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_beat: ContextVar[Callable[[int], None] | None] = ContextVar("beat", default=None)


def beat(token_layers: int = 0) -> None:
    """Signal progress of this thread's work by `token_layers`; does nothing outside a run."""
    call = _beat.get()
    if call is not None:
        call(token_layers)


@contextmanager
def beating(call: Callable[[int], None]) -> Iterator[None]:
    """Make each `beat(token_layers)` of this thread call `call`, which must be quick."""
    token = _beat.set(call)
    try:
        yield
    finally:
        _beat.reset(token)
