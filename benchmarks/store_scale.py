"""How long `status`, `verify` and `report` take on a store of 131,072 units.

    python benchmarks/store_scale.py [FOLDER]

Prints a Markdown table: seconds on the clock, seconds of processor time, and the largest memory of
each verb in a process of its own. The store holds one site of 4,096 pairs and 32 layers, each pair
and layer a unit, and the journal of the process that wrote it; its values are random.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from patchsweep.store.digest import seal
from patchsweep.store.layout import FIXED, Layout, Variable, fixed_key, references_key
from patchsweep.store.store import Store

N_PAIRS, N_LAYERS, N_POS, N_HEADS = 4096, 32, 4, 2
VERBS = {
    "status": ["status"],
    "verify (every byte)": ["verify"],
    "report": ["report", "-o", "report.html"],
}


def main(folder: Path) -> None:
    store = folder / "large.zarr"
    if not store.exists():
        start = time.perf_counter()
        write(store)
        print(f"written in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print("| verb | seconds | of the processor | memory |\n|---|---:|---:|---:|")
    for name, (verb, *options) in VERBS.items():
        start = time.perf_counter()
        command = [sys.executable, "-m", "patchsweep", verb, str(store), *options]
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, name
        seconds, busy = time.perf_counter() - start, used.ru_utime + used.ru_stime
        print(f"| {name} | {seconds:.1f} | {busy:.1f} | {used.ru_maxrss / 1e6:.2f} GB |")


def write(path: Path) -> None:
    """The store, its files put without waiting for the disk."""
    store = Store.create_or_resume(path, layout())
    rng = np.random.default_rng(0)
    (variable,) = store.variables.values()
    identity = store.contents.identity
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
    lines = [{"event": "started", "time": 0.0, "n_units": variable.n_units}]
    blocks = rng.normal(size=(512, *variable.block_shape(variable.at(0, 0)))).astype(np.float32)
    encoded = [encoder.encode(variable.slices(variable.at(0, 0)), block) for block in blocks]
    for i, unit in enumerate(variable.units()):
        key, data = variable.shard_key(unit), encoded[i % len(encoded)]
        put(key, data)
        put(variable.flag_key(unit), seal(identity, key, data))
        line = {"event": "unit", "time": i / 10, "variable": variable.name, "seconds": 0.1}
        line |= {"pair_block": unit.pair_block, "layer_block": unit.layer_block}
        lines.append({**line, "token_layers": 100, "n_live": 8})
    journal = path.with_name(f"{path.name}.journal")
    journal.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"event": "finished", "time": 1e5}])
    (journal / "elsewhere.00000000-1-1.jsonl").write_text(text)


def layout() -> Layout:
    tokens = [[f"token {pos}" for pos in range(N_POS)]] * N_PAIRS
    words = np.array([" Mary"] * N_PAIRS, dtype=object)
    shape = (1, N_PAIRS, N_LAYERS, N_POS, N_HEADS)
    dims = ("metric", "pair", "layer", "pos", "head")
    return Layout(
        variables=(Variable("z", dims, shape, (1, 1), {}),),
        coords={
            "metric": (("metric",), np.array(["logit_diff"], dtype=object)),
            "pair": (("pair",), np.arange(N_PAIRS)),
            "layer": (("layer",), np.arange(N_LAYERS)),
            "pos": (("pos",), np.arange(N_POS)),
            "head": (("head",), np.arange(N_HEADS)),
            "base_token": (("pair", "pos"), np.array(tokens, dtype=object)),
            "source_token": (("pair", "pos"), np.array(tokens, dtype=object)),
            "answer": (("pair",), words),
            "wrong_answer": (("pair",), words),
        },
        attrs={"intervention": "resample", "direction": "denoising", "provenance": {}},
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as place:
            main(Path(place))
