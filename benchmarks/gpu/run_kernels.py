"""Measure every kernel on this machine's GPU and record it (`make bench-gpu`).

Each case is checked against fp64 first; a wrong kernel is an error, not a fast one. Entries are
written one by one, failures too, and those that a file of this commit has are not measured again.
Needs torch, Triton and jaxtyping alone; PYTHONPATH=kernels.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import record
import torch
from kernel_cases import CASES, Case, Prepared
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
        AssertionError: the kernel differs from fp64 by more than the tolerance.
    """
    torch.manual_seed(0)
    prepared: Prepared = case.prepare(device, shrink)
    expected = prepared.exact()
    limit = TOLERANCE[case.dtype]
    largest_error = _error(prepared.run(), expected)
    assert largest_error <= limit, f"{case.kernel} kernel: error {largest_error:.2e} > {limit}"
    rivals: dict[str, dict[str, Any]] = {}
    for name, run in prepared.rivals.items():
        try:
            error = _error(run(), expected)
        except Exception as reason:  # a rival may refuse a shape or a device
            rivals[name] = {"refuses": f"{type(reason).__name__}: {reason}"[:500]}
            continue
        if error > limit:
            rivals[name] = {"refuses": f"is wrong: error {error:.2e} > {limit}"}
        else:
            rivals[name] = asdict(time_calls(run, device))
    del expected
    seconds = time_calls(prepared.run, device)
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
        "largest_error": largest_error,
    }


def _error(out: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the value where that is above 1."""
    scale = expected.abs().clamp_min(1.0)
    return float(((out.double() - expected).abs() / scale).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--minutes", type=float, default=5.0, help="no case is begun after them")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print(record.NO_GPU, file=sys.stderr)
        return 2
    device = torch.device("cuda")
    kept = record.Record(given.results, torch.cuda.get_device_name(device))
    if "ceilings" not in kept.content:
        ceilings = measure_ceilings(device, copy_bytes=2**30, side=8192)
        kept.put("ceilings", asdict(ceilings))
    ceilings = Ceilings(**kept.content["ceilings"])
    measure_all(CASES, device, ceilings, kept, time.monotonic() + 60 * given.minutes)
    return 0


def measure_all(
    cases: Sequence[Case],
    device: torch.device,
    ceilings: Ceilings,
    kept: record.Record,
    until: float,
    shrink: int = 1,
) -> None:
    """Put an entry into `kept` for each case that it lacks, until that time of the clock."""
    for case in cases:
        key = {
            "kernel": case.kernel,
            "name": case.name,
            "dtype": str(case.dtype).removeprefix("torch."),
        }
        if kept.has("results", **key):
            continue
        if time.monotonic() > until:
            print("time is up; the same command goes on", file=sys.stderr)
            return
        print(f"{case.kernel}: {case.name}, {case.dtype}", file=sys.stderr, flush=True)
        try:
            entry = measure_case(case, device, ceilings, shrink)
        except Exception as error:
            entry = record.failure(error)
        kept.add("results", entry, **key)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
