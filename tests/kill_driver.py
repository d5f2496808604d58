"""Kill a sweep at random moments, go on until it is done, compare with an undisturbed one.

That again and again until the wanted number of kills has fallen.

    python tests/kill_driver.py FOLDER N_KILLS N_SLICES [TOLERANCE]

Children are forked after the imports, so that a kill falls into the sweep and not into them.
Prints one JSON line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import patchsweep as ps
import torch
from patchsweep.spec import shards
from patchsweep.spec.shards import site_groups_of
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.sweeps import executor as work
from store_checks import checksums

torch.set_num_threads(1)
shards.UNIT_TOKENS = 150  # many small units, so that kills fall between and inside them
work.WAIT_S = 0.05
NAME = "tiny:llama"
SITES = ["resid_pre", "z", "mlp_out"]


def main(folder: Path, n_kills: int, n_slices: int, tolerance: float | None = None) -> None:
    model = ps.load_model(NAME)
    pairs = ps.PromptPairs.from_strings(
        model,
        clean=["When John and Mary went to the shops, John gave a bottle of milk to"] * 2,
        corrupted=["When John and Mary went to the shops, Mary gave a bottle of milk to"] * 2,
        answers=[(" Mary", " John")] * 2,
    )

    def run(store: Path, index: int = 0, n: int = 1) -> None:
        ps.sweep(
            model,
            pairs,
            SITES,
            store=store,
            runner="packed",
            tolerance=tolerance,
            slice_index=index,
            n_slices=n,
        )

    def child(store: Path, index: int) -> int:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                run(store, index, n_slices)
                code = 0
            finally:
                os._exit(code)
        return pid

    site_groups = site_groups_of(make_request(model, pairs, SweepSpec(SITES)).plans).values()
    assert 1 < len(set(site_groups)) < len(SITES)  # some units are computed together, some are not

    start = time.perf_counter()
    run(folder / "whole.zarr")
    seconds = time.perf_counter() - start
    whole = checksums(folder / "whole.zarr")
    rng = random.Random(0)
    broken = folder / "broken.zarr"
    killed = 0
    equal: list[bool] = []  # one entry for each time the killed sweep was done
    while killed < n_kills or not equal:
        done: set[int] = set()
        running: dict[int, int] = {}  # pid -> slice
        while len(done) < n_slices:
            for index in range(n_slices):
                if index not in done and index not in running.values():
                    running[child(broken, index)] = index
            time.sleep(rng.uniform(0, seconds / n_slices))
            pid = rng.choice(list(running))
            if killed < n_kills:
                os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            index = running.pop(pid)
            if os.WIFSIGNALED(status):
                killed += 1
            elif os.waitstatus_to_exitcode(status) == 0:
                done.add(index)
        equal.append(checksums(broken) == whole)
        for path in folder.glob("broken.zarr*"):
            shutil.rmtree(path)
    print(json.dumps({"killed": killed, "n_files": len(whole), "equal": equal}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *map(float, sys.argv[4:]))
