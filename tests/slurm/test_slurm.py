"""A sweep as a Slurm array: one task cancelled, one killed, the same command again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from patchsweep.store.journal import UNIT, read_journal
from patchsweep.store.store import Store
from store_checks import checksums, verify_structure

from slurm import cluster

N_SLICES = 4
# the hooked runner, since packed batches would be done before anybody could cancel them
SWEEP = [
    "model=tiny:llama",
    "task=ioi",
    "task.n_pairs=384",  # seconds of work for each slice, so that two are seen at work
    "sites=default",
    "runner=hooked",
]
ARRAY = [
    "-m",
    f"slice=range(0,{N_SLICES})",
    f"n_slices={N_SLICES}",
    "hydra/launcher=slurm",
    "hydra.launcher.gres=null",
    "hydra.launcher.mem_gb=null",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.timeout_min=10",
    "hydra.sweep.dir=jobs",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(cluster.missing()), reason=cluster.missing() or "Slurm is here"),
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[cluster.Cluster]:
    with (
        tempfile.TemporaryDirectory(prefix="slurm-") as folder,  # a short path: it holds a socket
        cluster.running(Path(folder)) as running,
    ):
        yield running


def start(
    overrides: list[str], folder: Path, env: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "patchsweep", "run", *SWEEP, *overrides],
        cwd=folder,
        env={**(env or os.environ), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def workers(store: Path) -> dict[int, int]:
    """slice -> process id, of those that have written a unit and are not done."""
    found, ended = {}, set()
    slices = {}
    for event in read_journal(store):
        process = event["process"]
        if event["event"] == "started":
            slices[process] = event["slice"]
        elif event["event"] == UNIT:
            found[slices[process]] = int(process.rsplit("-", 2)[1])
        else:
            ended.add(slices[process])
    return {index: pid for index, pid in found.items() if index not in ended}


def test_array_with_a_cancelled_and_a_killed_task_ends_in_the_bytes_of_one_process(
    slurm: cluster.Cluster, tmp_path: Path
) -> None:
    alone, shared = tmp_path / "alone.zarr", tmp_path / "shared.zarr"
    output, _ = (single := start([f"store={alone}"], tmp_path)).communicate(timeout=400)
    assert single.returncode == 0, output

    array = start([*ARRAY, f"store={shared}"], tmp_path, slurm.env)
    deadline = time.monotonic() + 120
    while len(at_work := workers(shared)) < 2:
        assert time.monotonic() < deadline, f"two tasks never were at work: {slurm.tasks()}"
        assert array.poll() is None, array.communicate()[0]
        time.sleep(0.05)
    cancelled, killed = sorted(at_work)[:2]
    os.kill(at_work[killed], signal.SIGKILL)
    task = next(t for t in slurm.tasks() if t.endswith(f"_{cancelled}"))
    slurm.cancel(task)
    output, _ = array.communicate(timeout=400)
    assert array.returncode != 0, output
    states = slurm.tasks()
    print("after one task was cancelled and one killed:", states)
    assert states[task] in ("CANCELLED", "FAILED"), states
    assert states[task.replace(f"_{cancelled}", f"_{killed}")] == "FAILED", states
    assert Store.open(shared).pending(), "nothing was left to do: the test came too late"

    output, _ = (again := start([*ARRAY, f"store={shared}"], tmp_path, slurm.env)).communicate(
        timeout=400
    )
    assert again.returncode == 0, output
    assert checksums(shared) == checksums(alone)
    assert verify_structure(Store.open(shared)) == []
