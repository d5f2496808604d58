"""How far attribution can be trusted on a real model: every method beside exact patching.

    python examples/attribution_study.py --pairs 32 --stores runs/study > study.md

For each task, on the embedded SmolLM2-135M: exact patching, atp, atp_ends, atp_star, relp, relp_ah,
gim, ig_inputs and ig over the same pairs, their agreement and their cost, as Markdown tables.

- resid_pre, attn_out and mlp_out are patched at every position;
- z is patched head by head at the task's named positions, where prompts of different lengths
  mean the same;
- q and k, where AtP* differs from AtP, likewise, on the first task;
- ig, which walks through every layer for itself, on three layers.

Runs go to `--stores` and are taken up again from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import patchsweep as ps
import xarray as xr
from patchsweep.attribution import IntegratedInputs, IntegratedSite
from patchsweep.results.compare import Agreement, compare
from patchsweep.tasks import load_task

WHOLE = ["resid_pre", "attn_out", "mlp_out"]
INPUT_STEPS = 5
CHEAP = ["atp", "atp_ends", "relp", "relp_ah", "gim", IntegratedInputs(INPUT_STEPS)]
# named positions at which single heads are patched: from the first token that differs on
POSITIONS = {
    "ioi": ["S2", "end"],
    "facts": ["subject", "end"],
    "greater_than": ["start", "end"],
}
IG_LAYERS = [0, 10, 20]
IG_STEPS = 3


def main() -> None:
    """Run the study and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32, help="prompt pairs per task")
    parser.add_argument("--tasks", nargs="+", default=list(POSITIONS), choices=list(POSITIONS))
    parser.add_argument("--stores", type=Path, default=Path("runs/attribution_study"))
    arguments = parser.parse_args()
    model = ps.load_model("smollm2-135m")
    print(f"SmolLM2-135M, fp32, {arguments.pairs} pairs a task, metric logit_diff, denoising.\n")
    for number, task in enumerate(arguments.tasks):
        pairs = load_task(model, task, arguments.pairs)
        folder = arguments.stores / task
        start = time.perf_counter()
        found = study(model, pairs, POSITIONS[task], folder, queries=number == 0)
        print(f"## {task}\n")
        print(table(found))
        print()
        print(worst(found))
        print()
        seconds = time.perf_counter() - start
        print(f"{task}: {seconds:.0f} s", file=sys.stderr)
        sys.stdout.flush()


def study(
    model: object, pairs: ps.PromptPairs, positions: list[str], folder: Path, *, queries: bool
) -> list[Agreement]:
    """Agreements of all methods with exact, site by site."""
    options = {"sites": WHOLE, "store": folder / "whole.zarr"}
    whole = ps.sweep(model, pairs, method=["exact", *CHEAP], **options)  # type: ignore[arg-type]
    heads = ps.sweep(
        model,  # type: ignore[arg-type]
        pairs,
        ["z"],
        positions=positions,
        method=["exact", *CHEAP],
        store=folder / "heads.zarr",
    )
    found = [*compare(whole.load()).sites, *compare(heads.load()).sites]
    for exact, name, where in ((whole, "whole", None), (heads, "heads", positions)):
        ig = ps.sweep(
            model,  # type: ignore[arg-type]
            pairs,
            WHOLE if where is None else ["z"],
            positions=where,
            layers=IG_LAYERS,
            method=IntegratedSite(IG_STEPS),
            store=folder / f"ig_{name}.zarr",
        )
        found += compare(beside(exact, ig.load())).sites
    if queries:
        moved = ps.sweep(
            model,  # type: ignore[arg-type]
            pairs,
            ["q", "k"],
            positions=positions,
            method=["exact", "atp", "atp_star", "relp", IntegratedInputs(INPUT_STEPS)],
            store=folder / "queries.zarr",
        )
        found += compare(moved.load()).sites
    return sorted(found, key=lambda a: [*WHOLE, "z", "q", "k"].index(a.site))


def beside(exact: xr.Dataset, estimates: xr.Dataset) -> xr.Dataset:
    """The exact values at the layers of some estimates, and those, with the costs of both."""
    chosen = exact.sel(layer=estimates.layer)
    names = [n for n in chosen.data_vars if "_" not in str(n) or n in WHOLE or "metric" in str(n)]
    joined = chosen[names].merge(
        estimates.drop_vars(["base_metric", "source_metric"]), compat="override"
    )
    joined.attrs = {**estimates.attrs, "plan": estimates.attrs["plan"]}
    return joined


def table(found: Sequence[Agreement]) -> str:
    """One row for each site and method."""
    lines = [
        "| site | method | cells | Pearson, every pair | Pearson of means (95 %) | slope | "
        "sign | top-k found | exact / method |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for a in found:
        method = f"{a.method} (layers 0, 10, 20)" if a.method == "ig" else a.method
        lines.append(
            f"| {a.site} | {method} | {a.n_cells} | {a.pearson_of_pairs:.3f} | "
            f"{a.pearson.value:.3f} ({a.pearson.low:.2f} to {a.pearson.high:.2f}) | "
            f"{a.slope.value:.2f} | {a.sign_agreement.value:.2f} | "
            f"{a.recall.value * a.top_k:.0f} of {a.top_k} | {a.cost_ratio:.3g} |"
        )
    return "\n".join(lines)


def worst(found: Sequence[Agreement]) -> str:
    """The largest miss of every site and method."""
    lines = ["Largest misses:", ""]
    for a in found:
        miss = a.misses[0]
        lines.append(
            f"- {a.method} on {a.site}: {miss.place} has {miss.exact:.2f} and is given "
            f"{miss.estimate:.2f}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
