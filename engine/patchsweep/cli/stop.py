"""Stops a run on SIGTERM or SIGINT after its current work item, so that no work is lost."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
GOES_ON = "the same command goes on"


class Stopped(Exception):
    """A signal stopped the run between two work items."""


class Stopper:
    """Records the first signal for `check`; the second signal ends the process at once."""

    def __init__(self) -> None:
        self._heard: str | None = None

    def listen(self) -> None:
        """Handle the signals; outside the main thread this does nothing, as Python requires."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        print(
            f"patchsweep: {self._heard}: stopping after the units in hand (again: at once)",
            file=sys.stderr,
            flush=True,
        )

    def check(self, what: str) -> None:
        """Raise if a signal has come.

        Raises:
            Stopped: its message holds `what`, the work done so far, and how to continue.
        """
        if self._heard is not None:
            raise Stopped(f"{self._heard}: stopped, {what}; {GOES_ON}")


# one per process, so that after a signal all later runs of the process stop too
STOPPER = Stopper()
