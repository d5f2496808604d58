"""Leases: who works on which unit, so that two processes do not compute the same one.

They lie beside the store, in `<store>.leases`:

- `units/<unit>@<generation>` names the owner of a unit. It is made exclusively: on a local disk
  by linking, on object stores by a conditional put where they have one.
- `owners/<owner>` is an owner's heartbeat, put anew every quarter of `EXPIRY_S`.

An owner whose heartbeat is older than `EXPIRY_S`, or whose process has certainly ended, is dead.
Its unit is taken over by making the next generation, which just one of several rivals can do; so
no file is ever replaced that a rival may have replaced already. Ages are measured by the
storage's own clock (the time it gives a fresh file), so that hosts' clocks need not agree; where
storage tells no times, the hosts' clocks must agree within `EXPIRY_S`.

A lease saves work, it does not guard the values: where it fails (a process that was stopped for
longer than `EXPIRY_S` and goes on, storage without conditional puts), two processes write the
same bytes one after the other. The folder may be deleted when nothing runs.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from patchsweep.errors import StoreError
from patchsweep.store.folder import PARTIAL, Folder
from patchsweep.store.process import is_gone, process_name

EXPIRY_S = 120.0


@dataclass(frozen=True)
class Lease:
    """A unit's lease, as another process sees it."""

    owner: str  # process name and a random part; see `process_of`
    live: bool  # the owner is at work; else it has died or hangs


def process_of(owner: str) -> str:
    """The name of the owner's process (see `process`)."""
    return owner.partition("~")[0]


class Leases:
    """The leases that this process holds in one store."""

    def __init__(self, folder: Folder, *, expiry_s: float = EXPIRY_S) -> None:
        self.owner = f"{process_name()}~{uuid.uuid4().hex[:8]}"
        self._folder, self._expiry_s = folder, expiry_s
        self._content = json.dumps({"owner": self.owner}).encode()
        self._held: dict[str, str] = {}  # unit -> key of our lease
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()

    def claim(self, units: Iterable[str]) -> list[str]:
        """Those of `units` (names) that are ours now; the others are some live process's."""
        wanted = list(units)
        if not wanted:
            return []
        self._start()
        judge = _Judge(self._folder, self._expiry_s, self._now)
        there = _generations(self._folder)
        fresh = []
        for unit in wanted:
            keys = there[unit]
            if self._held.get(unit) in keys.values():
                continue
            self._held.pop(unit, None)  # if it was ours: lost while this process hung
            owners = (_owner(self._folder, key) for key in keys.values())
            if any(owner and judge.lives(owner) for owner in owners):
                continue
            key = f"units/{unit}@{max(keys, default=-1) + 1}"
            if self._folder.put_new(key, self._content):
                self._held[unit] = key
                fresh.append(unit)
        self._look_again(fresh)
        return [unit for unit in wanted if unit in self._held]

    def holds(self, unit: str) -> bool:
        """Whether `unit` is ours, as far as we have heard; see `has_lost`."""
        return unit in self._held

    def has_lost(self, unit: str) -> bool:
        """Whether `unit` was ours and another process has taken it over."""
        key = self._held.get(unit)
        return key is not None and self._folder.read(key) != self._content

    def release(self, units: Iterable[str]) -> None:
        """Give `units` back; those that are not ours are passed over."""
        for unit in units:
            if (key := self._held.pop(unit, None)) is not None:
                self._folder.delete(key)

    def close(self) -> None:
        """Give everything back and stop the heartbeat."""
        if self._heart is None:
            return
        self._stop.set()
        self._heart.join()
        self._heart = None
        with suppress(StoreError):  # storage that is gone holds nobody up: leases expire
            self.release(list(self._held))
            self._folder.delete(self._owner_key)

    def _look_again(self, fresh: list[str]) -> None:
        """Withdraw from units that a living rival holds too, and clear away dead owners' leases.

        Two rivals that saw different states may have made different generations. Whoever looks
        second sees the other's; if both do, both withdraw, and the unit waits for the next claim.
        """
        judge = _Judge(self._folder, self._expiry_s, self._now)
        there = _generations(self._folder) if fresh else {}
        for unit in fresh:
            dead = []
            for key in there.get(unit, {}).values():
                owner = _owner(self._folder, key)
                if owner is None or owner == self.owner:
                    continue
                if judge.lives(owner):
                    self.release([unit])
                    break
                dead.append(key)
            else:
                for key in dead:
                    self._folder.delete(key)

    @property
    def _owner_key(self) -> str:
        return f"owners/{self.owner}"

    def _start(self) -> None:
        if self._heart is None:
            self._folder.make()
            self._beat()
            self._stop.clear()
            self._heart = threading.Thread(target=self._keep_beating, daemon=True)
            self._heart.start()

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._expiry_s / 4):
            with suppress(StoreError):  # a write that matters will fail and say so
                self._beat()

    def _beat(self) -> None:
        self._folder.put(self._owner_key, json.dumps({"time": time.time()}).encode())

    def _now(self) -> float:
        """The storage's clock."""
        self._beat()
        return self._folder.modified(self._owner_key) or time.time()


def read_leases(folder: Folder, *, expiry_s: float = EXPIRY_S) -> dict[str, Lease]:
    """The lease of each unit that has one, by the unit's name; changes nothing.

    Ages are measured by this machine's clock.
    """
    judge = _Judge(folder, expiry_s, time.time)
    found = {}
    for unit, keys in _generations(folder).items():
        for owner in (_owner(folder, key) for key in keys.values()):
            if owner and (unit not in found or judge.lives(owner)):
                found[unit] = Lease(owner, judge.lives(owner))
    return found


class _Judge:
    """Tells which owners live; asks the storage about each of them once."""

    def __init__(self, folder: Folder, expiry_s: float, clock: Callable[[], float]) -> None:
        self._folder, self._expiry_s, self._clock = folder, expiry_s, clock
        self._known: dict[str, bool] = {}

    def lives(self, owner: str) -> bool:
        if owner not in self._known:
            self._known[owner] = not is_gone(process_of(owner)) and self._beats(owner)
        return self._known[owner]

    def _beats(self, owner: str) -> bool:
        key = f"owners/{owner}"
        data = self._folder.read(key)
        if data is None:
            return False
        last = self._folder.modified(key)
        if last is None:
            last, now = float(json.loads(data)["time"]), time.time()
        else:
            now = self._clock()
        return now - last <= self._expiry_s


def _owner(folder: Folder, key: str) -> str | None:
    data = folder.read(key)
    if data is None:
        return None
    try:
        return str(json.loads(data)["owner"])
    except (ValueError, KeyError, TypeError):
        return None  # a file that no Leases made


def _generations(folder: Folder) -> defaultdict[str, dict[int, str]]:
    """Keys of all leases: unit -> generation -> key."""
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for key in folder.list("units"):
        unit, _, generation = key.removeprefix("units/").rpartition("@")
        if not key.endswith(PARTIAL) and generation.isdigit():
            found[unit][int(generation)] = key
    return found
