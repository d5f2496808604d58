"""The benchmark table in markdown, from the JSON that `make bench` writes.

python benchmarks/table.py runs/bench.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def site_of(benchmark: dict[str, Any]) -> str:
    """The site that a benchmark swept."""
    site: str = (benchmark["params"] or benchmark["extra_info"])["site"]
    return site


def table(result: dict[str, Any]) -> str:
    """One row per contender; speeds are patches per second within this one run."""
    rows = [b for b in result["benchmarks"] if "patches_per_second" in b["extra_info"]]
    ours = {
        site_of(b): b["extra_info"]["patches_per_second"]
        for b in rows
        if b["name"].startswith("bench_patchsweep")
    }
    lines = [
        "| site | how | patches timed | token-layers | seconds | patches/s | patchsweep is "
        "| largest difference |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [b for b in rows + _whole_demo(rows) if site_of(b) in ours]
    for b in sorted(rows, key=lambda b: (site_of(b), -b["extra_info"]["patches_per_second"])):
        info, site = b["extra_info"], site_of(b)
        name = b["name"].partition("[")[0].removeprefix("bench_").replace("_", " ")
        ratio = ours[site] / info["patches_per_second"]
        timed = f"{info['timed_patches']} of {info['patches']}"
        difference = f"{info['largest_difference']:.1e}" if "largest_difference" in info else "-"
        lines.append(
            f"| {site} | {name} | {timed} | {info['token_layers']:,} | "
            f"{b['stats']['median']:.2f} | {info['patches_per_second']:.0f} | "
            f"{ratio:.0f}x | {difference} |"
        )
    first = rows[0]["extra_info"]
    shares = ", ".join(
        f"{b['params']['site']} {b['extra_info']['share_of_peak']:.0%}"
        for b in rows
        if "share_of_peak" in b["extra_info"]
    )
    peak = next(
        b["extra_info"]["matmul_peak_gflops"] for b in rows if "share_of_peak" in b["extra_info"]
    )
    lines += [
        "",
        f"{first['threads']} threads of {first['device']}, torch {first['torch']}, commit "
        f"{first['commit']}; share of the matrix-product peak measured in the same run "
        f"({peak:.0f} GFLOP/s): {shares}.",
    ]
    return "\n".join(lines)


def _whole_demo(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The loop over all of the demo's sites: its seconds per site, scaled up, added."""
    loops = [b for b in rows if b["name"].startswith("bench_transformer_lens_loop")]
    if not any(site_of(b) == "demo" for b in rows) or not loops:
        return []
    total = {
        key: sum(b["extra_info"][key] for b in loops)
        for key in ("patches", "timed_patches", "token_layers")
    }
    seconds = sum(b["extra_info"]["patches"] / b["extra_info"]["patches_per_second"] for b in loops)
    info = {
        **total,
        "patches_per_second": total["patches"] / seconds,
        "largest_difference": max(b["extra_info"]["largest_difference"] for b in loops),
    }
    return [
        {
            "name": loops[0]["name"],
            "params": {"site": "demo"},
            "extra_info": info,
            "stats": {"median": sum(b["stats"]["median"] for b in loops)},
        }
    ]


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text())))
