"""SIGTERM and SIGINT end a run after the units in hand, so that no work is lost."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


GOES_ON = "the same command goes on"
STARTS_ANEW = "nothing was kept, so the same command starts anew"


class Stopped(Exception):
    """The run was asked to stop, and has stopped between two work items of units."""


class Stopper:
    """Hears the first signal; the second one ends the process at once."""

    def __init__(self) -> None:
        self._heard: str | None = None
        self._then = GOES_ON

    def listen(self, then: str = GOES_ON) -> None:
        """Take over the signals. Threads other than the main one cannot, and do without.

        `then` says what the same command will do after a stop.
        """
        self._then = then
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
        """Raise `Stopped` if a signal has come.

        Raises:
            Stopped: says `what` has been done so far, and how to go on.
        """
        if self._heard is not None:
            raise Stopped(f"{self._heard}: stopped, {what}; {self._then}")


# one for the process: of several runs in a row, those after the signal stop at once
STOPPER = Stopper()
