"""The bar of a run in Python: token-layers done, in a notebook or a terminal, nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from patchsweep.store.layout import Unit

_DELAY_S = 0.5  # a shorter run shows no bar


def shows_bars() -> bool:
    """Whether a person watches: standard error is a terminal, or this is a notebook's kernel."""
    if "ipykernel" in sys.modules:
        return True
    return sys.stderr is not None and sys.stderr.isatty()


class Bar:
    """A `Progress` that draws a tqdm bar, which moves within a work item too."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = "patches"
        self._done = 0  # token-layers of finished shards

    def stage(self, name: str) -> None:
        """See `executor.Watching`."""
        self._stage = name

    def begin(self, n_units: int, total: int, done: int) -> None:
        """See `executor.Progress`."""
        self.end()
        self._done = done
        if not n_units or not shows_bars():
            return
        from tqdm.auto import tqdm  # takes a while, and a script may never need it

        self._bar = tqdm(
            total=total,
            initial=done,
            desc=self._stage,
            unit=" token-layers",
            unit_scale=True,
            delay=_DELAY_S,
            leave=False,
        )

    def within(self, token_layers: int) -> None:
        """See `executor.Watching`."""
        self._move(self._done + token_layers)

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        """See `executor.Progress`."""
        self._done += token_layers
        self._move(self._done)

    def item_done(self) -> None:
        """See `executor.Progress`."""

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None:
        """See `executor.Progress`."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"waiting for {n_units} units of other processes")

    def end(self) -> None:
        """See `executor.Watching`."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _move(self, to: int) -> None:
        # the parts of a work item advance one by one after it is done: never go back
        if self._bar is not None and to > self._bar.n:
            self._bar.update(to - self._bar.n)
