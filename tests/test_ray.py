"""A sweep through the Ray launcher: a cluster on this machine with two workers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from patchsweep.store.journal import read_journal
from patchsweep.store.store import Store
from patchsweep.store.verify import checksums, verify_structure

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason='Ray is not installed: pip install "patchsweep[ray]"')
pytest.importorskip(
    "hydra_plugins.hydra_ray_launcher",
    reason='the launcher is not installed: pip install "patchsweep[ray]"',
)

SWEEP = ["model=tiny:llama", "task=ioi", "task.n_pairs=24", "sites=heads", "runner=packed"]
CLUSTER = [
    "-m",
    "slice=range(0,2)",
    "n_slices=2",
    "hydra/launcher=ray_local",
    "hydra.launcher.ray.init.num_cpus=2",
    "hydra.sweep.dir=jobs",
]


def command(words: list[str], folder: Path) -> str:
    env = {
        **os.environ,
        "HOME": str(folder),  # Ray keeps a token there
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "patchsweep", "run", *SWEEP, *words],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_two_ray_workers_end_in_the_bytes_of_one_process(tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone.zarr", tmp_path / "shared.zarr"
    command([f"store={alone}"], tmp_path)
    command([*CLUSTER, f"store={shared}"], tmp_path)
    started = [event for event in read_journal(shared) if event["event"] == "started"]
    assert sorted(event["slice"] for event in started) == [0, 1]
    workers = {event["process"] for event in started}
    assert len(workers) == 2, "both slices ran in one process"
    units = [event["process"] for event in read_journal(shared) if event["event"] == "unit"]
    assert set(units) == workers, "a worker had nothing to do"
    assert checksums(shared) == checksums(alone)
    assert verify_structure(Store.open(shared)) == []
