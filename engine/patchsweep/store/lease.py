"""Leases of shards, so that two processes do not compute the same one.

They lie beside the store, in `<store>.leases`:

- `units/<unit>@<generation>` names the owner of a shard. It is created exclusively: on a local
  disk by linking, on object stores by a conditional put if they support it.
- `owners/<owner>` is an owner's heartbeat. The working loop writes it, with new content each time,
  at most every quarter of `EXPIRY_S` (see `patchsweep.models.heartbeat`): a process that hangs
  writes no heartbeat, even if some of its threads live.

An owner is dead if its process has certainly ended, if it has no heartbeat, or if this process has
seen the same heartbeat for `EXPIRY_S` by its own monotonic clock. Clocks of hosts are not compared,
so neither a wrong clock nor a heartbeat from the future keeps a lease alive, and no process waits
longer than one lease for a silent owner. A process takes over a dead owner's shard by creating the
next generation, which only one of several rivals can do. So no process replaces a file that a rival
may have replaced already.

A lease saves work; it does not guard the values. Where it fails (a process that hung and continues,
storage without conditional puts), two processes compute the same values, and the first to finish
writes them. The folder may be deleted when nothing runs.
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
from functools import cache

from patchsweep.errors import StoreError
from patchsweep.store.backends.base import PARTIAL, Folder
from patchsweep.store.backends.process import is_gone, process_name

EXPIRY_S = 120.0
_N_TRIES = 8  # a lease's place may be taken by what is no file, a folder for example
_OWNER = re.compile(r"[\w.-]+~[0-9a-f]+")  # a process name, and a random part


@dataclass(frozen=True)
class Lease:
    """A shard's lease, as another process sees it."""

    owner: str  # process name and a random part; see `process_of`
    live: bool  # the owner works; otherwise it has died or hangs


def process_of(owner: str) -> str:
    """Return the name of the owner's process (see `process`)."""
    return owner.partition("~")[0]


class Leases:
    """The leases that this process holds in one store."""

    def __init__(self, folder: Folder) -> None:
        self.owner = f"{process_name()}~{uuid.uuid4().hex[:8]}"
        self._folder = folder
        self._content = json.dumps({"owner": self.owner}).encode()
        self._held: dict[str, str] = {}  # unit -> key of this process's lease
        self._beats, self._last_beat = 0, float("-inf")
        # owner -> its last heartbeat, and when this process saw it first
        self._seen: dict[str, tuple[bytes, float]] = {}

    def claim(self, units: Iterable[str]) -> list[str]:
        """Lease `units` (names) and return those now held; live processes hold the others."""
        names = list(units)
        if not names:
            return []
        self.beat()
        lives = self._judge()
        generations = _generations(self._folder)
        fresh = []
        for unit in names:
            keys = generations[unit]
            if self._held.get(unit) in keys.values():
                continue
            self._held.pop(unit, None)  # if it was held: lost while this process hung
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
        return [unit for unit in names if unit in self._held]

    def beat(self) -> None:
        """Write a heartbeat if the last one is older than `EXPIRY_S` / 4; call it during work."""
        now = time.monotonic()
        if now - self._last_beat < EXPIRY_S / 4:
            return
        first = not self._beats
        self._beats, self._last_beat = self._beats + 1, now
        with suppress(*() if first else (StoreError,)):  # a later write of values will report it
            self._folder.make()
            self._folder.put(self._owner_key, json.dumps({"beat": self._beats}).encode())

    def holders(self, units: Iterable[str]) -> dict[str, str]:
        """Return unit -> name of the process that has its lease; no entry without a lease."""
        generations = _generations(self._folder)
        processes = {}
        for unit in units:
            for key in generations.get(unit, {}).values():
                if (owner := _owner(self._folder, key)) is not None:
                    processes[unit] = process_of(owner)
        return processes

    def release(self, units: Iterable[str]) -> None:
        """Release `units`; those that this process does not hold are skipped."""
        for unit in units:
            if (key := self._held.pop(unit, None)) is not None:
                self._folder.delete(key)

    def close(self) -> None:
        """Release all leases and delete the heartbeat."""
        if not self._beats:
            return
        with suppress(StoreError):  # if the storage is gone, the leases expire
            self.release(list(self._held))
            self._folder.delete(self._owner_key)
        self._beats, self._last_beat = 0, float("-inf")

    def _look_again(self, fresh: list[str]) -> None:
        """Release units that a live rival holds too, and delete the leases of dead owners.

        Two rivals that saw different states may have created different generations. The second to
        look sees the other's; if both do, both release the unit until the next claim.
        """
        lives = self._judge()
        generations = _generations(self._folder) if fresh else {}
        for unit in fresh:
            dead = []
            for key in generations.get(unit, {}).values():
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
        """Return a test of whether an owner lives, which reads each heartbeat once."""
        return cache(lambda owner: not is_gone(process_of(owner)) and self._beats_still(owner))

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
    """Return unit name -> lease, for all leases; changes nothing.

    A single read cannot tell whether a heartbeat still changes, so its age is the difference of the
    storage's clock and this machine's. Use it for display, not for decisions.
    """

    @cache
    def lives(owner: str) -> bool:
        last = folder.modified(_key_of(owner))
        fresh = last is not None and abs(time.time() - last) <= EXPIRY_S
        return fresh and not is_gone(process_of(owner))

    leases = {}
    for unit, keys in _generations(folder).items():
        for owner in (_owner(folder, key) for key in keys.values()):
            if owner and (unit not in leases or lives(owner)):
                leases[unit] = Lease(owner, lives(owner))
    return leases


def _key_of(owner: str) -> str:
    return f"owners/{owner}"


def _owner(folder: Folder, key: str) -> str | None:
    data = folder.read(key)
    if data is None:
        return None
    try:
        owner = str(json.loads(data)["owner"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None  # not written by `Leases`
    return owner if _OWNER.fullmatch(owner) else None


def _generations(folder: Folder) -> defaultdict[str, dict[int, str]]:
    """Return the keys of all leases: unit -> generation -> key."""
    keys: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for key in folder.list("units"):
        unit, _, generation = key.removeprefix("units/").rpartition("@")
        if not key.endswith(PARTIAL) and generation.isdecimal() and len(generation) < 10:
            keys[unit][int(generation)] = key
    return keys
