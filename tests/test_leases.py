"""Leases: one process a unit, taken over from the dead and the hung, whatever the clocks say."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.lease import EXPIRY_S, Leases, read_leases
from patchsweep.store.store import Store
from store_faults.runs import small_layout, values_of
from subjects import demo_pairs, model


class Clock:
    """Stands for a process' monotonic clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    stand_in = SimpleNamespace(monotonic=clock, time=time.time)
    monkeypatch.setattr("patchsweep.store.lease.time", stand_in)
    return clock


def _leases(tmp_path: Path, n: int, **options: Any) -> list[Leases]:
    return [
        Leases(open_folder(tmp_path / "run.zarr").beside(".leases"), **options) for _ in range(n)
    ]


def _kill(leases: Leases, dead_process: str) -> None:
    """Let it look as if the owner had died: nothing is given back."""
    folder = leases._folder
    for key in folder.list("units"):
        data = folder.read(key)
        if data and leases.owner in data.decode():
            folder.put(key, json.dumps({"owner": f"{dead_process}~1"}).encode())


def test_a_unit_is_leased_to_one_and_given_back(tmp_path: Path) -> None:
    mine, rival = _leases(tmp_path, 2)
    assert mine.claim(["z/0.0", "z/0.1"]) == ["z/0.0", "z/0.1"]
    assert rival.claim(["z/0.1", "z/1.0"]) == ["z/1.0"]
    assert mine.claim(["z/0.0", "z/1.0"]) == ["z/0.0"]
    mine.release(["z/0.1", "never claimed"])
    assert rival.claim(["z/0.1"]) == ["z/0.1"]
    mine.close()
    assert rival.claim(["z/0.0"]) == ["z/0.0"]
    rival.close()
    assert not [p for p in (tmp_path / "run.zarr.leases").rglob("*") if p.is_file()]


def test_a_dead_owners_lease_is_taken_over_at_once(tmp_path: Path, dead_process: str) -> None:
    victim, heir, late = _leases(tmp_path, 3)
    victim.claim(["z/0.0"])
    assert read_leases(heir._folder)["z/0.0"].live
    _kill(victim, dead_process)
    assert not read_leases(heir._folder)["z/0.0"].live
    assert heir.claim(["z/0.0"]) == ["z/0.0"]
    assert late.claim(["z/0.0"]) == []
    assert read_leases(late._folder)["z/0.0"].owner == heir.owner
    heir.close()
    late.close()


def test_a_silent_owners_lease_expires_and_a_beating_ones_does_not(
    tmp_path: Path, clock: Clock
) -> None:
    beating, silent, rival = _leases(tmp_path, 3)
    assert beating.claim(["z/0.0"])
    assert silent.claim(["z/0.1"])
    for _ in range(12):  # ten seconds each: two minutes without a sign of the silent one
        assert rival.claim(["z/0.0", "z/0.1"]) == []
        clock.now += EXPIRY_S / 12
        beating.beat()
    assert rival.claim(["z/0.0", "z/0.1"]) == ["z/0.1"]
    assert silent.claim(["z/0.1"]) == []


def test_a_heart_beats_often_enough_and_not_more_often(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mine,) = _leases(tmp_path, 1)
    mine.claim(["z/0.0"])
    puts: list[float] = []
    monkeypatch.setattr(LocalFolder, "put", lambda *args: puts.append(clock.now))
    for _ in range(600):
        clock.now += 1.0
        mine.beat()
    assert set(np.diff(puts)) == {EXPIRY_S / 4}


@pytest.mark.parametrize("hours", [2, -2], ids=["two-hours-ahead", "two-hours-behind"])
def test_clocks_do_not_decide_who_lives(tmp_path: Path, clock: Clock, hours: int) -> None:
    """Heartbeats of another host, with times of its own or of a storage that is wrong."""
    living, dead, rival = _leases(tmp_path, 3)
    for leases, number in ((living, 1), (dead, 2)):
        leases.owner = f"another_host.01234567-{number}-1~ab"
        leases._content = json.dumps({"owner": leases.owner}).encode()

    def shift() -> None:
        for path in (tmp_path / "run.zarr.leases" / "owners").iterdir():
            os.utime(path, (time.time() + 3600 * hours,) * 2)

    assert living.claim(["z/0.0"])
    assert dead.claim(["z/0.1"])
    for _ in range(12):
        shift()
        assert rival.claim(["z/0.0", "z/0.1"]) == []
        clock.now += EXPIRY_S / 12
        living.beat()
    shift()
    assert rival.claim(["z/0.0", "z/0.1"]) == ["z/0.1"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"owner": 3}',
        b'{"owner": "../../../etc/passwd"}',
        b'{"owner": "vm.0-99999999999999999999999-1~ab"}',
        b"[" * 100_000,
        b"\xff\x00",
    ],
    ids=["empty", "list", "number", "path", "huge-pid", "deep", "bytes"],
)
def test_a_lease_that_nobody_made_holds_nothing_up(tmp_path: Path, content: bytes) -> None:
    (mine,) = _leases(tmp_path, 1)
    mine._folder.make()
    mine._folder.put("units/z/0.0@0", content)
    mine._folder.put(f"units/z/0.0@{'9' * 5000}"[:200], content)
    read_leases(mine._folder)
    assert mine.claim(["z/0.0"]) == ["z/0.0"]


def test_a_folder_in_the_place_of_a_lease_holds_nothing_up(tmp_path: Path) -> None:
    mine, rival = _leases(tmp_path, 2)
    (tmp_path / "run.zarr.leases/units/z/0.0@0").mkdir(parents=True)
    assert mine.claim(["z/0.0"]) == ["z/0.0"]
    assert rival.claim(["z/0.0"]) == []


def test_rivals_never_hold_one_unit_at_the_same_time(
    tmp_path: Path, dead_process: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four rivals claim and release units that a dead process held, with pauses in every step."""
    rng = random.Random(0)

    def slowed(step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any) -> Any:
            if rng.random() < 0.3:
                time.sleep(rng.random() * 0.004)
            return step(*args)

        return wrapper

    for step in ("put_new", "list", "read", "delete"):
        monkeypatch.setattr(LocalFolder, step, slowed(getattr(LocalFolder, step)))
    clashes: list[str] = []
    n_held = 0

    def contend(rival: Leases, units: list[str], holders: dict[str, int]) -> None:
        nonlocal n_held
        for unit in rng.sample(units, len(units)) * 3:
            if not rival.claim([unit]):
                continue
            with lock:
                n_held += 1
                holders[unit] += 1
                if holders[unit] > 1:
                    clashes.append(unit)
            time.sleep(rng.random() * 0.003)
            with lock:
                holders[unit] -= 1
            rival.release([unit])

    lock = threading.Lock()
    for i in range(12):
        (victim, *rivals) = _leases(tmp_path / str(i), 5)
        units = [f"z/{pair}.0" for pair in range(4)]
        victim.claim(units)
        _kill(victim, dead_process)
        holders = dict.fromkeys(units, 0)
        threads = [threading.Thread(target=contend, args=(r, units, holders)) for r in rivals]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for rival in rivals:
            rival.close()
    assert clashes == []
    assert n_held > 100


def test_a_lost_unit_can_be_claimed_again_when_the_heir_dies(
    tmp_path: Path, dead_process: str
) -> None:
    sleeper, heir = _leases(tmp_path, 2)
    sleeper.claim(["z/0.0"])
    sleeper._folder.delete(f"owners/{sleeper.owner}")
    assert heir.claim(["z/0.0"]) == ["z/0.0"]
    assert sleeper.claim(["z/0.0"]) == []
    _kill(heir, dead_process)
    assert sleeper.claim(["z/0.0"]) == ["z/0.0"]


@pytest.mark.parametrize(
    ("words", "least"),
    [
        ({"runner": "packed"}, 6),
        ({"runner": "hooked"}, 3),
        ({"method": "atp"}, 6),
        ({"method": "ig", "layers": [0]}, 9),
    ],
    ids=["packed", "hooked", "atp", "ig"],
)
def test_heart_beats_throughout_a_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: dict[str, Any], least: int
) -> None:
    """Not only between work items, of which a large model may need minutes each."""
    monkeypatch.setattr("patchsweep.store.lease.EXPIRY_S", 0.0)
    beats: list[str] = []
    put = LocalFolder.put

    def noted(folder: LocalFolder, key: str, data: bytes) -> None:
        beats.extend([key] * key.startswith("owners/"))
        put(folder, key, data)

    monkeypatch.setattr(LocalFolder, "put", noted)
    ps.sweep(model("tiny:llama"), demo_pairs("tiny:llama"), "z", store=tmp_path / "a.zarr", **words)
    units = Store.open(tmp_path / "a.zarr").units()
    # one work item: one claim for each of its shards, and one beat for it
    assert len({(unit.pair_block, unit.layer_block) for unit in units}) == 1
    assert len(beats) >= least


def test_two_stores_share_the_units_and_done_ones_are_nobodys(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with Store.create_or_resume(path, small_layout()) as a, Store.open(path) as b:
        first, second, third, *_ = a.units()
        assert a.claim([first, second]) == [first, second]
        assert b.claim([first, third]) == [third]
        a.write(first, values_of(a.variables["z"], first))
        assert b.claim([first, second]) == []
        a.release([second])
        assert b.claim([second]) == [second]
