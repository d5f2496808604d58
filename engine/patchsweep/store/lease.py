"""Leases: who works on which unit, so that two processes do not compute the same one.

They lie beside the store, in `<store>.leases`:

- `units/<unit>@<generation>` names the owner of a unit. It is made exclusively: on a local disk
  by linking, on object stores by a conditional put where they have one.
- `owners/<owner>` is an owner's heartbeat. The loop that does the work puts it, with another
  content each time, at most every quarter of `EXPIRY_S` (see `patchsweep.models.heartbeat`): a
  process that hangs gives no sign, although its threads may live.

An owner is dead if its process has certainly ended, if it has no heartbeat, or if this process has
seen the same heartbeat for `EXPIRY_S` by its own monotonic clock. No clocks are compared, so that
neither a host's wrong time nor a heartbeat from the future keeps a lease alive, and nobody waits
longer than one lease for an owner that gives no sign. A dead owner's unit is taken over by making
the next generation, which just one of several rivals can do; so no file is ever replaced that a
rival may have replaced already.

A lease saves work, it does not guard the values: where it fails (a process that hung and goes on,
storage without conditional puts), two processes compute the same values, and whoever is done
first has written them. The folder may be deleted when nothing runs.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

from patchsweep.errors import StoreError
from patchsweep.store.backends.base import PARTIAL, Folder
from patchsweep.store.backends.process import is_gone, process_name

EXPIRY_S = 120.0
_N_TRIES = 8  # a lease's place may be taken by what is no file, a folder for example
_OWNER = re.compile(r"[\w.-]+~[0-9a-f]+")  # a process name, and a random part


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

    def __init__(self, folder: Folder) -> None:
        self.owner = f"{process_name()}~{uuid.uuid4().hex[:8]}"
        self._folder = folder
        self._content = json.dumps({"owner": self.owner}).encode()
        self._held: dict[str, str] = {}  # unit -> key of our lease
        self._beats, self._last_beat = 0, float("-inf")
        # owner -> its last heartbeat, and when we saw that first
        self._seen: dict[str, tuple[bytes, float]] = {}

    def claim(self, units: Iterable[str]) -> list[str]:
        """Those of `units` (names) that are ours now; the others are some live process's."""
        wanted = list(units)
        if not wanted:
            return []
        self.beat()
        lives = self._judge()
        there = _generations(self._folder)
        fresh = []
        for unit in wanted:
            keys = there[unit]
            if self._held.get(unit) in keys.values():
                continue
            self._held.pop(unit, None)  # if it was ours: lost while this process hung
            owners = (_owner(self._folder, key) for key in keys.values())
            if any(owner and lives(owner) for owner in owners):
                continue
            first = max(keys, default=-1) + 1
            for key in (f"units/{unit}@{first + i}" for i in range(_N_TRIES)):
                if self._folder.put_new(key, self._content):
                    self._held[unit] = key
                    fresh.append(unit)
                    break
                if self._folder.exists(key):  # a rival was first
                    break
        self._look_again(fresh)
        return [unit for unit in wanted if unit in self._held]

    def beat(self) -> None:
        """Put a heartbeat if the last one is a quarter of a lease old; called as work goes on."""
        now = time.monotonic()
        if now - self._last_beat < EXPIRY_S / 4:
            return
        first = not self._beats
        self._beats, self._last_beat = self._beats + 1, now
        with suppress(*() if first else (StoreError,)):  # a write that matters will fail and say so
            self._folder.make()
            self._folder.put(self._owner_key, json.dumps({"beat": self._beats}).encode())

    def holders(self, units: Iterable[str]) -> dict[str, str]:
        """The process that has the lease of each of `units`; those without one are left out."""
        there = _generations(self._folder)
        found = {}
        for unit in units:
            for key in there.get(unit, {}).values():
                if (owner := _owner(self._folder, key)) is not None:
                    found[unit] = process_of(owner)
        return found

    def release(self, units: Iterable[str]) -> None:
        """Give `units` back; those that are not ours are passed over."""
        for unit in units:
            if (key := self._held.pop(unit, None)) is not None:
                self._folder.delete(key)

    def close(self) -> None:
        """Give everything back."""
        if not self._beats:
            return
        with suppress(StoreError):  # storage that is gone holds nobody up: leases expire
            self.release(list(self._held))
            self._folder.delete(self._owner_key)
        self._beats, self._last_beat = 0, float("-inf")

    def _look_again(self, fresh: list[str]) -> None:
        """Withdraw from units that a living rival holds too, and clear away dead owners' leases.

        Two rivals that saw different states may have made different generations. Whoever looks
        second sees the other's; if both do, both withdraw, and the unit waits for the next claim.
        """
        lives = self._judge()
        there = _generations(self._folder) if fresh else {}
        for unit in fresh:
            dead = []
            for key in there.get(unit, {}).values():
                owner = _owner(self._folder, key)
                if owner is None or owner == self.owner:
                    continue
                if lives(owner):
                    self.release([unit])
                    break
                dead.append(key)
            else:
                for key in dead:
                    self._folder.delete(key)

    def _judge(self) -> Callable[[str], bool]:
        """Tells which owners live; asks the storage about each of them once."""
        known: dict[str, bool] = {}

        def lives(owner: str) -> bool:
            if owner not in known:
                known[owner] = not is_gone(process_of(owner)) and self._beats_still(owner)
            return known[owner]

        return lives

    def _beats_still(self, owner: str) -> bool:
        data = self._folder.read(_key_of(owner))
        if data is None:
            return False
        now = time.monotonic()
        last, since = self._seen.get(owner, (None, now))
        if data != last:
            self._seen[owner] = data, now
            return True
        return now - since < EXPIRY_S

    @property
    def _owner_key(self) -> str:
        return _key_of(self.owner)


def read_leases(folder: Folder) -> dict[str, Lease]:
    """The lease of each unit that has one, by the unit's name; changes nothing.

    A single look cannot tell whether a heart still beats, so its age is taken by the storage's
    clock and this machine's: for people to see, not to decide by.
    """
    known: dict[str, bool] = {}

    def lives(owner: str) -> bool:
        if owner not in known:
            last = folder.modified(_key_of(owner))
            fresh = last is not None and abs(time.time() - last) <= EXPIRY_S
            known[owner] = fresh and not is_gone(process_of(owner))
        return known[owner]

    found = {}
    for unit, keys in _generations(folder).items():
        for owner in (_owner(folder, key) for key in keys.values()):
            if owner and (unit not in found or lives(owner)):
                found[unit] = Lease(owner, lives(owner))
    return found


def _key_of(owner: str) -> str:
    return f"owners/{owner}"


def _owner(folder: Folder, key: str) -> str | None:
    data = folder.read(key)
    if data is None:
        return None
    try:
        owner = str(json.loads(data)["owner"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # a file that no Leases made
    return owner if _OWNER.fullmatch(owner) else None


def _generations(folder: Folder) -> defaultdict[str, dict[int, str]]:
    """Keys of all leases: unit -> generation -> key."""
    found: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for key in folder.list("units"):
        unit, _, generation = key.removeprefix("units/").rpartition("@")
        if not key.endswith(PARTIAL) and generation.isdecimal() and len(generation) < 10:
            found[unit][int(generation)] = key
    return found
