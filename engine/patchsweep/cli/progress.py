"""Progress of a run: a bar of token-layers on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from patchsweep.cli.stop import STOPPER
from patchsweep.store.layout import Unit
from patchsweep.store.lease import EXPIRY_S

_LINE_S = 20.0  # seconds between lines within a unit


class Bar:
    """The `executor.Progress` of one run: a bar on a terminal, at most one line per unit elsewhere.

    Between work items it checks for a stop signal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("token-layers"),
            TimeElapsedColumn(),
            TextColumn("to go"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self.seconds: dict[str, float] = {}  # per variable, of the units of this process
        self.n_units = 0  # done by this process
        self.n_live = 0
        self.token_layers = 0
        self._to_do = 0
        self._stage = "patches"
        self._done = 0  # token-layers of finished units
        self._total = 0
        self._told = 0.0  # when a line was printed last
        self._told_waiting: dict[str, int] | None = None

    def begin(self, n_units: int, total: int, done: int) -> None:
        self._to_do = self.n_units + n_units  # an analysis runs several stages in a row
        self._task = self._bar.add_task(self._stage, total=total, completed=done)
        self._done, self._total, self._told = done, total, time.monotonic()
        if n_units and not self._console.is_terminal:
            self._console.print(f"{self._stage}: {n_units} units, {total - done:,} token-layers")
        if done and n_units:
            self._console.print(f"going on: {n_units} units are left")
        self._check()

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        self.seconds[unit.variable] = self.seconds.get(unit.variable, 0.0) + seconds
        self.n_units += 1
        self.n_live += n_live
        self.token_layers += token_layers
        self._done += token_layers
        if self._console.is_terminal:
            assert self._task is not None
            self._bar.update(self._task, completed=self._done)
        elif token_layers or not self._total:  # a unit without is part of another's work
            self._told = time.monotonic()
            self._console.print(
                f"{self.n_units}/{self._to_do} {unit.name}: {token_layers} token-layers, "
                f"{seconds:.2f} s"
            )

    def stage(self, name: str) -> None:
        self._stage = name

    def within(self, token_layers: int) -> None:
        """See `executor.Watching`; a line every `_LINE_S` where there is no terminal."""
        so_far = self._done + token_layers
        if self._console.is_terminal:
            assert self._task is not None
            self._bar.update(self._task, completed=so_far)
        elif time.monotonic() - self._told > _LINE_S and self._total:
            self._told = time.monotonic()
            self._console.print(f"{self._stage}: {so_far / self._total:.0%} of the token-layers")

    def end(self) -> None: ...

    def item_done(self) -> None:
        self._check()

    def waiting(self, n_units: int, holders: Mapping[str, int]) -> None:
        if holders != self._told_waiting:
            self._told_waiting = dict(holders)
            whom = ", ".join(f"{name} ({n})" for name, n in sorted(holders.items())) or "nobody"
            self._console.print(
                f"waiting for {n_units} units; they are held by {whom}. Who gives no sign for "
                f"{EXPIRY_S:.0f} s loses them"
            )
        self._check()

    def _check(self) -> None:
        STOPPER.check(f"{self.n_units} of {self._to_do} units done here")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
