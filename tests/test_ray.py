"""A sweep on a Ray cluster of two workers on this machine, one of them killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import patchsweep as ps
import pytest
import xarray as xr
from patchsweep.cli import main as patchsweep
from patchsweep.store.journal import UNIT, read_journal
from patchsweep.store.store import Store
from store_checks import checksums, verify_structure

pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason='pip install "patchsweep[ray]"')

# the hooked runner, since packed batches would be done before anybody could kill their worker
SWEEP = ["model=tiny:llama", "task=ioi", "task.n_pairs=48", "sites=default", "runner=hooked"]
RAY = [
    "-m",
    "slice=range(0,3)",
    "n_slices=3",
    "hydra/launcher=ray_local",
    "hydra.launcher.ray.init.num_cpus=2",
    "hydra.sweep.dir=jobs",
]

pytestmark = pytest.mark.slow


@pytest.fixture
def ray_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # a short path: it holds sockets
        yield folder


def units(store: Path) -> dict[int, int]:
    """Process id -> units that it wrote."""
    written: dict[int, int] = {}
    for event in read_journal(store):
        if event["event"] == UNIT:
            process = int(event["process"].rsplit("-", 2)[1])
            written[process] = written.get(process, 0) + 1
    return written


def test_two_ray_workers_one_of_them_killed_write_what_one_process_writes(
    tmp_path: Path, ray_folder: str
) -> None:
    alone, shared = tmp_path / "alone.zarr", tmp_path / "shared.zarr"
    assert patchsweep(["run", *SWEEP, f"store={alone}"]) == 0

    env = {
        **os.environ,
        "HOME": ray_folder,  # Ray writes a token there
        "RAY_TMPDIR": ray_folder,
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    launcher = subprocess.Popen(
        [sys.executable, "-m", "patchsweep", "run", *SWEEP, *RAY, f"store={shared}"],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (written := units(shared)):
        assert time.monotonic() < deadline, "no worker wrote anything"
        assert launcher.poll() is None, launcher.communicate()[0]
        time.sleep(0.02)
    killed = next(iter(written))
    os.kill(killed, signal.SIGKILL)
    assert Store.open(shared).pending(), "nothing was left to do: the test came too late"

    output, _ = launcher.communicate(timeout=200)
    print(output)
    assert launcher.returncode == 0, output  # Ray starts a lost worker's slice again by itself
    assert len(units(shared)) > 1, f"one process wrote all: {units(shared)}"
    assert set(checksums(shared)) == set(checksums(alone))
    assert verify_structure(Store.open(shared)) == []
    # a forward pass of a batch may round otherwise in another process: 1.5e-6 here
    values = ps.open_store(shared).load()
    xr.testing.assert_allclose(values, ps.open_store(alone).load(), rtol=0, atol=1e-5)
