"""docs/gpu.md, from the files under `benchmarks/results/`.

python benchmarks/gpu/kernel_table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import kernel_cases
import sweep_cases
from record import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
KERNELS = (
    "| kernel | case | dtype | device | time | rate | of the ceiling | beside | largest error |"
)
SWEEPS = (
    "| model | site | dtype | device | sweep | TransformerLens loop | sweep is | GPU busy | "
    "launches | peak memory | largest error, sweep and loop | with 1 % tolerance | attribution | "
    "nnsight, scaled up |"
)
SITES = ("resid_pre", "z")
INTRODUCTION = """\
# On a GPU

Written by `python benchmarks/gpu/kernel_table.py` from the files that `make bench-gpu` leaves under
`benchmarks/results/`, one per device and commit; a test holds this page against them. Where no GPU
could be had, a row says "not measured".

Each kernel is checked against fp64 before it is timed, on inputs that are far larger than a cache.
Its rate counts the bytes that must be read and written, or the products that the formula has; the
ceiling is a large copy, or a large product of square matrices of the same type, in the same run.
"Beside" are other ways to the same result.
"""
SWEEPS_INTRODUCTION = """\
## Whole sweeps

All patches of one site on one pair of 17 tokens (or as said), from prompts to the array, by
`ps.sweep` in the model's own dtype; random weights. The loop is `transformer_lens.patching` on the
same model object: a sample of its patches is timed, and the time scaled up. Errors are those of a
few patches of each, against the loop in the next wider type. While the GPU is not busy it waits for
the host ([launches](design/launches.md)). Behind it the same sweep with a tolerance, by attribution
(`atp`), and by nnsight, of which one layer's positions are timed, where it is installed.
"""


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    return "\n".join(
        (
            INTRODUCTION,
            "## Kernels\n",
            render(results),
            SWEEPS_INTRODUCTION,
            render_sweeps(results),
        )
    )


def write_page(results: Path = RESULTS) -> None:
    """Write the page where the docs have it, if `results` is the folder that it is made of."""
    text = page(results)
    if results == RESULTS:
        PAGE.write_text(text)
    else:
        print(text, end="")


def _newest(results: Path, part: str) -> dict[str, dict[str, Any]]:
    """Device -> its newest file that holds `part`."""
    runs = [json.loads(path.read_text()) for path in sorted(results.glob("gpu-*.json"))]
    having = [run for run in runs if part in run]
    return {run["device"]: run for run in sorted(having, key=lambda run: run["time"])}


def _table(header: str, rows: list[str]) -> list[str]:
    return [header, "|" + " --- |" * (header.count("|") - 1), *rows]


def _unmeasured(start: str, header: str) -> str:
    missing = header.count("|") - start.count("|") - 1
    return f"{start} not measured |" + " |" * missing


def render(results: Path = RESULTS) -> str:
    """A markdown table: every case once per device, its newest commit; or "not measured"."""
    newest = _newest(results, "results")
    rows = []
    for case in kernel_cases.CASES:
        dtype = str(case.dtype).removeprefix("torch.")
        start = f"| `{case.kernel}` | {case.name} | {dtype} |"
        measured = [
            (device, _found(run["results"], name=case.name, kernel=case.kernel, dtype=dtype))
            for device, run in newest.items()
        ]
        lines = [f"{start} {device} {_cells(result)} |" for device, result in measured if result]
        rows += lines or [_unmeasured(start, KERNELS)]
    lines = _table(KERNELS, rows)
    for run in newest.values():
        ceilings = run["ceilings"]
        rates = ", ".join(
            f"{name} {rate / 1e12:.0f} TFLOP/s"
            for name, rate in ceilings["matmul_flop_per_s"].items()
        )
        lines += [
            "",
            f"{_origin(run)} Ceilings in the same run: large copy "
            f"{ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s; large matmul {rates}.",
        ]
    return "\n".join(lines) + "\n"


def render_sweeps(results: Path = RESULTS) -> str:
    """As `render`, of whole sweeps."""
    newest = _newest(results, "sweeps")
    rows = []
    for case in sweep_cases.CASES:
        dtype = str(case.dtype).removeprefix("torch.")
        for site in SITES:
            start = f"| {case.name} | {site} | {dtype} |"
            measured = [
                (device, _found(run["sweeps"], name=case.name, site=site, dtype=dtype))
                for device, run in newest.items()
            ]
            lines = [
                f"{start} {device} {_sweep_cells(result)} |"
                for device, result in measured
                if result
            ]
            rows += lines or [_unmeasured(start, SWEEPS)]
    lines = _table(SWEEPS, rows)
    for run in newest.values():
        lines += ["", _origin(run)]
    return "\n".join(lines) + "\n"


def _origin(run: dict[str, Any]) -> str:
    return f"{run['device']}, commit {run['commit']}, torch {run['torch']}, triton {run['triton']}."


def _found(entries: list[dict[str, Any]], **wanted: str) -> dict[str, Any] | None:
    for entry in entries:
        if all(entry[key] == value for key, value in wanted.items()):
            return entry
    return None


def _failed(result: dict[str, Any], header: str, n_before: int) -> str:
    """Return the cells of a measurement that failed: why, and empty ones."""
    why = result["failed"].replace("|", "/").replace("\n", " ")[:120]
    return f"| failed: {why}" + " |" * (header.count("|") - 2 - n_before)


def _cells(result: dict[str, Any]) -> str:
    if "failed" in result:
        return _failed(result, KERNELS, 4)
    seconds = result["seconds"]["median"]
    rate = result["rate"]
    shown = f"{rate / 1e12:.1f} TFLOP/s" if result["unit"] == "flop/s" else f"{rate / 1e9:.0f} GB/s"
    beside = "; ".join(
        f"{name}: refuses"
        if "refuses" in rival
        else f"{name}: {rival['median'] / seconds:.1f}x the time"
        for name, rival in result["rivals"].items()
    )
    share, error = result["of_ceiling"], result["largest_error"]
    return f"| {seconds * 1e6:.0f} µs | {shown} | {share:.0%} | {beside or '-'} | {error:.1e}"


def _sweep_cells(result: dict[str, Any]) -> str:
    if "failed" in result:
        return _failed(result, SWEEPS, 4)
    seconds, loop = result["seconds"]["median"], result["loop_seconds"]
    launches, peak = result["launches"], result["peak_bytes"]
    busy = "-" if launches is None else f"{launches['busy_seconds'] / seconds:.0%}"
    count = "-" if launches is None else f"{launches['n_launches']:,}"
    timed = f"{result['loop_patches_timed']} of {result['n_patches']:,} patches timed"
    errors = f"{result['largest_error']:.1e}, {result['loop_largest_error']:.1e}"
    ways = [
        f"{way['seconds']:.2f} s" if "seconds" in way else "refuses"
        for way in (result["ways"][name] for name in ("tolerance", "attribution", "nnsight"))
    ]
    memory = "-" if peak is None else f"{peak / 2**30:.1f} GiB"
    return (
        f"| {seconds:.2f} s | {loop:.0f} s ({timed}) | {loop / seconds:.0f}x as fast | {busy} | "
        f"{count} | {memory} | {errors} | {' | '.join(ways)}"
    )


if __name__ == "__main__":
    write_page()
