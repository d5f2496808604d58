"""The docs' table of GPU measurements, from the files under `benchmarks/results/`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kernel_cases import CASES

RESULTS = Path(__file__).parents[1] / "results"
HEADER = (
    "| kernel | case | dtype | device | time | rate | of the ceiling | beside | largest error |"
)


def render(results: Path = RESULTS) -> str:
    """A markdown table: every case once per device, its newest commit; or "not measured"."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json"))]
    newest: dict[str, dict[str, Any]] = {}
    for run in sorted(runs, key=lambda run: run["time"]):
        newest[run["device"]] = run
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    for case in CASES:
        dtype = str(case.dtype).removeprefix("torch.")
        start = f"| `{case.kernel}` | {case.name} | {dtype} |"
        measured = [
            (device, _result(run, case.name, case.kernel, dtype)) for device, run in newest.items()
        ]
        rows = [f"{start} {device} {_cells(result)} |" for device, result in measured if result]
        lines += rows or [f"{start} not measured | | | | | |"]
    for device, run in newest.items():
        ceilings = run["ceilings"]
        rates = ", ".join(
            f"{name} {rate / 1e12:.0f} TFLOP/s"
            for name, rate in ceilings["matmul_flop_per_s"].items()
        )
        lines += [
            "",
            f"{device}, commit {run['commit']}, torch {run['torch']}, triton {run['triton']}. "
            f"Ceilings in the same run: large copy {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s; "
            f"large matmul {rates}.",
        ]
    return "\n".join(lines) + "\n"


def _result(run: dict[str, Any], *key: str) -> dict[str, Any] | None:
    for result in run["results"]:
        if (result["name"], result["kernel"], result["dtype"]) == key:
            return dict(result)
    return None


def _cells(result: dict[str, Any]) -> str:
    seconds = result["seconds"]["median"]
    rate = result["rate"]
    shown = f"{rate / 1e12:.1f} TFLOP/s" if result["unit"] == "flop/s" else f"{rate / 1e9:.0f} GB/s"
    beside = "; ".join(
        f"{name}: {rival['median'] / seconds:.1f}x the time"
        for name, rival in result["rivals"].items()
    )
    share, error = result["of_ceiling"], result["largest_error"]
    return f"| {seconds * 1e6:.0f} µs | {shown} | {share:.0%} | {beside or '-'} | {error:.1e}"


if __name__ == "__main__":
    print(render(), end="")
