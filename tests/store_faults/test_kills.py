"""SIGKILL at any moment, by one process or many: the same bytes in the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from patchsweep.cli import main
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.local import LocalFolder
from patchsweep.store.layout import COMPLETE
from patchsweep.store.lease import EXPIRY_S, Leases
from patchsweep.store.store import Store
from store_checks import checksums, verify_structure

from store_faults.runs import kill_at_random, run, small_layout, start

Observed = Callable[[str, str], None]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checksums of a store that one process wrote in peace."""
    path = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    run(path)
    return checksums(path)


def assert_equal(path: Path, undisturbed: dict[str, str]) -> None:
    assert checksums(path) == undisturbed
    assert verify_structure(Store.open(path)) == []


def test_writer_killed_20_times_resumes_to_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], observed: Observed
) -> None:
    path, rng = tmp_path / "run.zarr", random.Random(7)
    killed = 0
    while killed < 20:
        process = start(path, kill_after=rng.randrange(1, 120), journal=True)
        process.join(60)
        if process.exitcode == -signal.SIGKILL:
            killed += 1
        else:  # it got to the end: start over
            assert process.exitcode == 0
            assert_equal(path, undisturbed)
            shutil.rmtree(path)
    run(path)
    assert_equal(path, undisturbed)
    observed("SIGKILL of the only writer, 20 times over", "resumed to the undisturbed run's bytes")


@pytest.mark.slow
def test_writer_killed_at_every_step_resumes_to_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], observed: Observed
) -> None:
    for step in range(1, 1000):
        path = tmp_path / f"{step}.zarr"
        process = start(path, kill_after=step)
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        run(path)
        assert_equal(path, undisturbed)
        shutil.rmtree(path)
    assert step > 100  # or the steps were not seen
    observed("SIGKILL before every single file operation", "resumed to the undisturbed run's bytes")


@pytest.mark.parametrize(
    "kills", [20, pytest.param(200, marks=pytest.mark.slow)], ids=["20", "200"]
)
def test_four_writers_killed_at_random_end_in_same_bytes(
    tmp_path: Path, undisturbed: dict[str, str], observed: Observed, kills: int
) -> None:
    path, done = tmp_path / "run.zarr", 0
    for seed in range(1000):  # a store is soon full; then the next one
        exits, hits = kill_at_random(path, kills=10, seed=seed, n_writers=4, longest_s=0.08)
        assert exits == [0, 0, 0, 0]
        assert_equal(path, undisturbed)
        shutil.rmtree(path)
        done += hits
        if done >= kills:
            break
    observed(f"{kills} random SIGKILLs over four writers at once", "the undisturbed run's bytes")


def test_eight_writers_of_the_same_units_lose_nothing(
    tmp_path: Path, undisturbed: dict[str, str], observed: Observed
) -> None:
    path = tmp_path / "run.zarr"
    halves = [slice(0, None, 2), slice(1, None, 2)] * 3  # each half three times
    writers = [start(path, only=half, pause_s=0.01) for half in halves]
    writers += [start(path, pause_s=0.01) for _ in range(2)]
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 8
    assert_equal(path, undisturbed)
    observed("eight writers at once, slices three times over", "nothing lost, nothing torn")


def test_of_a_hung_writer_and_its_heir_the_first_to_finish_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, observed: Observed
) -> None:
    path, now = tmp_path / "run.zarr", [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr("patchsweep.store.lease.time", clock)
    sleeper, rival = (Store.create_or_resume(path, small_layout()) for _ in range(2))
    first, second, *_ = sleeper.pending()
    assert sleeper.claim([first, second]) == [first, second]
    assert rival.claim([first, second]) == []
    now[0] += EXPIRY_S
    assert rival.claim([first, second]) == [first, second]
    shape = sleeper.variables["z"].block_shape(first)
    sleeper.write(first, np.full(shape, 1.0))  # it goes on after all
    rival.write(first, np.full(shape, 2.0))
    rival.write(second, np.full(shape, 2.0))
    sleeper.write(second, np.full(shape, 1.0))
    values = rival.dataset()["z"]
    assert (values[:, :2, 0] == 1.0).all()
    assert (values[:, :2, 1] == 2.0).all()
    assert verify_structure(Store.open(path)) == []
    observed("a writer hangs past its lease, then goes on", "who finishes first has written")


LEASE_S = 1.0  # of the waiting run, in the tests below
DEAD_ELSEWHERE = "elsewhere.01234567-1-1"


def lease_elsewhere(path: Path, units: list[str], hours: float) -> None:
    """Leases of a process on another host that has died; its heartbeat is `hours` from now."""
    leases = Leases(open_folder(path).beside(".leases"))
    leases.owner = f"{DEAD_ELSEWHERE}~ab"
    leases._content = json.dumps({"owner": leases.owner}).encode()
    assert leases.claim(units) == units
    heartbeat = path.with_name(f"{path.name}.leases") / "owners" / leases.owner
    os.utime(heartbeat, (time.time() + 3600 * hours,) * 2)


def test_a_run_goes_on_past_a_process_that_hangs(
    tmp_path: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    observed: Observed,
) -> None:
    path = tmp_path / "run.zarr"
    hung = start(path, pause_s=0.3)
    while not list(path.with_name("run.zarr.leases").glob("units/*/*")):
        time.sleep(0.01)
    os.kill(hung.pid, signal.SIGSTOP)
    monkeypatch.setattr("patchsweep.store.lease.EXPIRY_S", LEASE_S)
    begin = time.monotonic()
    run(path)
    assert time.monotonic() - begin < LEASE_S + 10  # of which the work and a slow machine have 10
    assert_equal(path, undisturbed)
    os.kill(hung.pid, signal.SIGCONT)
    hung.join(60)
    assert hung.exitcode == 0
    assert_equal(path, undisturbed)
    observed("a process hangs", "another run goes on after one lease; the undisturbed run's bytes")


@pytest.mark.parametrize("hours", [2, 0, -2])
def test_a_dead_process_elsewhere_holds_a_run_up_for_one_lease(
    tmp_path: Path,
    undisturbed: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    observed: Observed,
    hours: int,
) -> None:
    path = tmp_path / "run.zarr"
    with Store.create_or_resume(path, small_layout()) as store:
        lease_elsewhere(path, [unit.name for unit in store.units()], hours)
    monkeypatch.setattr("patchsweep.store.lease.EXPIRY_S", LEASE_S)
    begin = time.monotonic()
    run(path)
    assert LEASE_S <= time.monotonic() - begin < LEASE_S + 10
    assert_equal(path, undisturbed)
    ahead = {2: "two hours ahead", 0: "of now", -2: "two hours old"}[hours]
    observed(
        f"a process elsewhere died, its heartbeat is {ahead}",
        "the run goes on after one lease; the undisturbed run's bytes",
    )


def test_a_run_says_whom_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, words = tmp_path / "run.zarr", ["run", "model=tiny", "task=ioi_demo", "sites=[resid_pre]"]
    assert main([*words, f"store={path}"]) == 0
    before = checksums(path)
    (path / "progress" / "resid_pre" / "c.0.0.0").unlink()
    lease_elsewhere(path, ["resid_pre/0.0"], 2)
    monkeypatch.setattr("patchsweep.store.lease.EXPIRY_S", LEASE_S)
    monkeypatch.setattr("patchsweep.sweeps.executor.WAIT_S", 0.05)
    capsys.readouterr()
    assert main([*words, f"store={path}"]) == 0
    told = " ".join("".join(capsys.readouterr()).split())
    assert f"waiting for 1 units; they are held by {DEAD_ELSEWHERE} (1)" in told
    assert checksums(path) == before


def test_half_made_store_is_completed_by_the_next_run(
    tmp_path: Path, undisturbed: dict[str, str]
) -> None:
    path = tmp_path / "run.zarr"
    Store.create_or_resume(path, small_layout())
    (path / COMPLETE).unlink()
    shutil.rmtree(path / "z")
    run(path)
    assert_equal(path, undisturbed)


def test_store_made_by_a_rival_between_two_looks_is_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.zarr"
    look = LocalFolder.is_empty

    def late_look(folder: LocalFolder) -> bool:
        with monkeypatch.context() as patch:
            patch.setattr(LocalFolder, "is_empty", look)
            Store.create_or_resume(path, small_layout())
        return look(folder)

    monkeypatch.setattr(LocalFolder, "is_empty", late_look)
    store = Store.create_or_resume(path, small_layout())
    assert len(store.pending()) == len(store.units())
