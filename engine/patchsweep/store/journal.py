"""The journal of a store: events of each process with their times, one JSON object per line.

Each process appends to its own file, `<store>.journal/<host>-<pid>-<start>.jsonl`, so no file is
shared or locked. A killed process may leave a partial last line, which readers skip. Object stores
cannot append: there the whole small file is written again, at most every `PUT_EVERY_S`.

| event | fields |
|---|---|
| started | command (any JSON), n_units (pending), and fields of the run, such as slice |
| unit | variable, pair_block, layer_block, seconds, token_layers, n_live |
| warning | text |
| finished | |
| interrupted | reason |

Each line also has `event` and `time` (unix seconds); `read_journal` adds `process`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import UnionType
from typing import Any

from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.backends.process import process_name
from patchsweep.store.layout import Unit

PUT_EVERY_S = 5.0

STARTED, UNIT, WARNING = "started", "unit", "warning"
FINISHED, INTERRUPTED = "finished", "interrupted"
_SUFFIX = ".jsonl"
_MOST = 1e15  # bound for times and counts; a comparison with it rejects NaN too


class Journal(AbstractContextManager["Journal"]):
    """This process's journal; leaving `with journal:` records how the run ended."""

    def __init__(
        self, store: str | Path, *, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Write the journal of this process beside the store at address `store`."""
        self._folder = open_folder(store, storage_options).beside(".journal")
        self._key = ""
        self._put, self._waiting = b"", b""
        self._last_put = -PUT_EVERY_S
        self._ended = False

    def started(self, command: Any, *, n_units: int, **fields: Any) -> None:
        """Record that a run starts, with `n_units` shards pending."""
        self._ended = False
        self.record(STARTED, command=command, n_units=n_units, **fields)

    def unit_done(self, unit: Unit, *, seconds: float, token_layers: int, n_live: int) -> None:
        """Record a written shard."""
        self.record(
            UNIT,
            variable=unit.variable,
            pair_block=unit.pair_block,
            layer_block=unit.layer_block,
            seconds=round(seconds, 4),
            token_layers=token_layers,
            n_live=n_live,
        )

    def warning(self, text: str) -> None:
        """Record a warning, such as a halved packed batch or the first NaN."""
        self.record(WARNING, text=text)

    def finished(self) -> None:
        """Record that this process has done all its work."""
        self._ended = True
        self.record(FINISHED)

    def interrupted(self, reason: str) -> None:
        """Record that this process stops early."""
        self._ended = True
        self.record(INTERRUPTED, reason=reason)

    def record(self, event: str, **fields: Any) -> None:
        """Append a line.

        Raises:
            StoreError: it cannot be written.
        """
        line = {"event": event, "time": round(time.time(), 6), **fields}
        self._waiting += (scrub(json.dumps(line, default=str)) + "\n").encode()
        due = time.monotonic() - self._last_put >= PUT_EVERY_S
        if self._folder.appends or due or event != UNIT:
            self._flush()

    def _flush(self) -> None:
        if not self._key:
            self._folder.make()
            base, number = process_name(), 0
            self._key = base + _SUFFIX
            while self._folder.exists(self._key):  # an earlier run of this process
                number += 1
                self._key = f"{base}-run{number}{_SUFFIX}"
        self._folder.append(self._key, self._put, self._waiting)
        self._put, self._waiting = self._put + self._waiting, b""
        self._last_put = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._ended:
            return
        if error is None:
            self.finished()
        else:
            self.interrupted(f"{type(error).__name__}: {error}"[:500])


def read_journal(
    store: str | Path, *, storage_options: Mapping[str, Any] | None = None
) -> list[dict[str, Any]]:
    """Return the events of all processes in order of time, each with `event`, `time`, `process`.

    Skips partial lines and lines that no `Journal` wrote.
    """
    folder = open_folder(store, storage_options).beside(".journal")
    events = []
    for key in folder.list():
        if not key.endswith(_SUFFIX):
            continue
        for line in (folder.read(key) or b"").splitlines():
            event = _event(line)
            if event is not None:
                events.append({**event, "process": key.removesuffix(_SUFFIX)})
    return sorted(events, key=lambda event: event["time"])


def _event(line: bytes) -> dict[str, Any] | None:
    """Return the event of a line; None if no `Journal` wrote the line."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    types: dict[str, type | UnionType] = {"time": int | float}
    if event["event"] == UNIT:
        types |= {"variable": str, "pair_block": int, "layer_block": int}
        types |= {"seconds": int | float, "token_layers": int}
    if not all(isinstance(event.get(field), kind) for field, kind in types.items()):
        return None
    numbers = (event[field] for field in ("time", "seconds", "token_layers") if field in event)
    return event if all(abs(n) < _MOST for n in numbers if isinstance(n, int | float)) else None
