"""How long the verbs take on a store of 131,072 units, and planning and resuming such a run.

    python benchmarks/store_scale.py [FOLDER]

Prints a Markdown table: seconds on the clock, seconds of processor time, and the largest memory of
each, in a process of its own whose imports count. The run is of one site, 4,096 pairs and 32 layers
of a tiny model, each pair and layer a unit. Its values are random; all else is a sweep's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import patchsweep as ps
from patchsweep.models.tiny import TINY_FAMILIES
from patchsweep.store.digest import seal
from patchsweep.store.layout import FIXED, fixed_key, references_key
from patchsweep.store.store import Store

N_PAIRS, N_LAYERS = 4096, 32
N_LOST = 32  # units that a resumed run has left to do
PROMPT = "When John and Mary went to the shops, {} gave a bottle of milk to"
SELF = [sys.executable, __file__]
COMMANDS = {
    "status": [sys.executable, "-m", "patchsweep", "status", "STORE"],
    "verify -n 0 (every byte)": [sys.executable, "-m", "patchsweep", "verify", "STORE", "-n", "0"],
    "report": [sys.executable, "-m", "patchsweep", "report", "STORE", "-o", "report.html"],
    "plan": [*SELF, "--plan", "STORE"],
    "the same run again, all done": [*SELF, "--sweep", "STORE"],
    f"the same run again, {N_LOST} units to do": [*SELF, "--resume", "STORE"],
}


def main(folder: Path) -> None:
    store = folder / "large.zarr"
    if not store.exists():
        start = time.perf_counter()
        with patch("patchsweep.sweeps.api.run_work", fill):
            call(ps.sweep, store=store)
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print("| verb | seconds | of the processor | memory |\n|---|---:|---:|---:|")
    for name, words in COMMANDS.items():
        start = time.perf_counter()
        command = [str(store) if word == "STORE" else word for word in words]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, name
        seconds, busy = time.perf_counter() - start, used.ru_utime + used.ru_stime
        print(
            f"| {name} | {seconds:.1f} | {busy:.1f} | {used.ru_maxrss / 1e6:.2f} GB |", flush=True
        )


def call(function: Any, **options: Any) -> Any:
    """`sweep` or `plan` of the run."""
    TINY_FAMILIES["llama"][1]["num_hidden_layers"] = N_LAYERS
    model = ps.load_model("tiny:llama", device="cpu")
    pairs = ps.PromptPairs.from_strings(
        model,
        clean=[PROMPT.format("John")] * N_PAIRS,
        corrupted=[PROMPT.format("Mary")] * N_PAIRS,
        answers=[(" Mary", " John")] * N_PAIRS,
    )
    with patch("patchsweep.spec.shards.UNIT_TOKENS", 1):
        return function(model, pairs, "z", runner="packed", **options)


def fill(works: Any, store: Store, *others: Any) -> None:
    """Stands for the work: random values, their files put without waiting for the disk."""
    rng = np.random.default_rng(0)
    (variable,) = store.variables.values()
    path, identity = store.folder.path, store.contents.identity
    encoder = store._encoder(variable.name)

    def put(key: str, data: bytes) -> None:
        (path / key).write_bytes(data)

    for name in (variable.name, *FIXED):
        (path / "progress" / name).mkdir(exist_ok=True)
        (path / name).mkdir(exist_ok=True)
    (path / "progress" / "references").mkdir(exist_ok=True)
    for pair in range(N_PAIRS):
        flag = b""
        for name in FIXED:
            where, key = (slice(None), slice(pair, pair + 1)), fixed_key(name, pair)
            data = store._encoder(name).encode(where, rng.normal(size=(1, 1)).astype(np.float32))
            put(key, data)
            flag += seal(identity, key, data)
        put(references_key(pair), flag)
    lines = []
    blocks = rng.normal(size=(512, *variable.block_shape(variable.at(0, 0)))).astype(np.float32)
    encoded = [encoder.encode(variable.slices(variable.at(0, 0)), block) for block in blocks]
    for i, unit in enumerate(variable.units()):
        key, data = variable.shard_key(unit), encoded[i % len(encoded)]
        put(key, data)
        put(variable.flag_key(unit), seal(identity, key, data))
        line = {"event": "unit", "time": i / 10, "variable": variable.name, "seconds": 0.1}
        line |= {"pair_block": unit.pair_block, "layer_block": unit.layer_block}
        lines.append({**line, "token_layers": 100, "n_live": 8})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    journal = path.with_name(f"{path.name}.journal")
    journal.mkdir(exist_ok=True)
    (journal / "elsewhere.00000000-1-1.jsonl").write_text(text)


def resume(store: Path) -> None:
    """The run again after some of its values were lost."""
    for pair in range(N_LOST):
        (store / "z" / f"c.0.{pair}.0.0.0").unlink()
    call(ps.sweep, store=store)


if __name__ == "__main__":
    task, *rest = sys.argv[1:] or [""]
    if task == "--plan":
        call(ps.plan)
    elif task == "--sweep":
        call(ps.sweep, store=Path(rest[0]))
    elif task == "--resume":
        resume(Path(rest[0]))
    elif task:
        main(Path(task).absolute())
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
