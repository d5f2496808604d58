"""Measure every kernel on this machine's GPU and write one JSON file (`make bench-gpu`).

Each case is checked against fp64 first; a wrong kernel is an error, not a fast one.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, Case, Prepared
from kernel_table import RESULTS, render
from timing import Ceilings, measure_ceilings, time_calls
from torch import Tensor

# Sums are in fp32, so fp32 results differ from fp64 by rounding alone; 16-bit outputs by half a
# unit in the last place more, and attention also rounds its weights to 16 bits.
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


def measure_case(
    case: Case, device: torch.device, ceilings: Ceilings, shrink: int = 1
) -> dict[str, Any]:
    """One entry of the file's `results`.

    Raises:
        AssertionError: the kernel or a rival differs from fp64 by more than the tolerance.
    """
    torch.manual_seed(0)
    prepared: Prepared = case.prepare(device, shrink)
    expected = prepared.exact()
    errors = {"": _error(prepared.run(), expected)}
    errors |= {name: _error(run(), expected) for name, run in prepared.rivals.items()}
    for name, error in errors.items():
        limit = TOLERANCE[case.dtype]
        assert error <= limit, f"{case.kernel} {name or 'kernel'}: error {error:.2e} > {limit}"
    del expected
    seconds = time_calls(prepared.run, device)
    rivals = {name: asdict(time_calls(run, device)) for name, run in prepared.rivals.items()}
    dtype = str(case.dtype).removeprefix("torch.")
    by_flops = prepared.n_flops > 0
    rate = (prepared.n_flops or prepared.n_bytes) / seconds.median
    ceiling = ceilings.matmul_flop_per_s[dtype] if by_flops else ceilings.copy_bytes_per_s
    return {
        "kernel": case.kernel,
        "name": case.name,
        "dtype": dtype,
        "seconds": asdict(seconds),
        "n_bytes": prepared.n_bytes,
        "n_flops": prepared.n_flops,
        "unit": "flop/s" if by_flops else "byte/s",
        "rate": rate,
        "of_ceiling": rate / ceiling,
        "rivals": rivals,
        "largest_error": errors[""],
    }


def _error(out: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the value where that is above 1."""
    scale = expected.abs().clamp_min(1.0)
    return float(((out.double() - expected).abs() / scale).max())


def _commit() -> str:
    """The short commit, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    folder = parser.parse_args().results
    if not torch.cuda.is_available():
        print(
            "bench-gpu measures kernels on a GPU, and torch sees none here: "
            "nothing was measured. Run it on a machine with a GPU and a torch built for it.",
            file=sys.stderr,
        )
        return 2
    try:
        import triton
    except ImportError:
        print("bench-gpu needs triton: pip install 'patchsweep[gpu]'", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    ceilings = measure_ceilings(device, copy_bytes=2**30, side=8192)
    results = []
    for case in CASES:
        print(f"{case.kernel}: {case.name}, {case.dtype}", file=sys.stderr, flush=True)
        results.append(measure_case(case, device, ceilings))
        torch.cuda.empty_cache()
    name = torch.cuda.get_device_name(device)
    run = {
        "device": name,
        "commit": _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": asdict(ceilings),
        "results": results,
    }
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = folder / f"gpu-{slug}-{run['commit']}.json"
    path.write_text(json.dumps(run, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    print(render(folder), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
