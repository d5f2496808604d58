"""What a sweep with a tolerance costs and errs by, against the length of the prompt.

    python benchmarks/adaptive.py [--figure FILE.svg] [LENGTH ...]

Prints a Markdown table; the figure draws milliseconds a live patch over the tokens. The pair has
two names that change places, early and at the end, with a filler between them. "Exact" is timed on
a random sample of live patches and scaled by token-layers; the adaptive sweep is the call that
users make, calibration and gradients included. Errors are those of random live patches that the
calibration did not see, and the top 20 those among these and the 100 largest estimates.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import patchsweep as ps
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.store.attributes import attributes
from transformer_lens.model_bridge import TransformerBridge

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import plots

LENGTHS = (17, 40, 80, 160, 320)
TOLERANCE = 0.01
N_UNSEEN, N_LARGEST, N_TIMED = 500, 100, 200
SITES = (["z"], ["resid_pre", "attn_out", "mlp_out", "z"])


class Seconds(NamedTuple):
    """What one pair took: three ways to the same live patches."""

    n_tokens: int
    n_live: int
    exact: float
    tolerance: float
    atp: float


FILLER = "The weather was fine that day and many people walked along the river to see the boats. "


def pair_of(model: TransformerBridge, length: int) -> ps.PromptPairs:
    """Return the demo pair, or a longer one with about `length` tokens."""
    if length <= 17:
        return ps.load_task(model, "ioi_demo")
    words = (FILLER * 40).split()

    def text(first: str, n: int) -> str:
        return (
            f"When Mary and John met, {first} was there first. {' '.join(words[:n])} "
            f"Then, when Mary and John went to the store, {first} gave a drink to"
        )

    n = next(
        n for n in range(len(words)) if len(model.tokenizer(text("John", n)).input_ids) >= length
    )
    return ps.PromptPairs.from_strings(
        model,
        clean=[text("John", n)],
        corrupted=[text("Mary", n)],
        answers=[(" Mary", " John")],
    )


def row(model: TransformerBridge, length: int, sites: list[str]) -> tuple[str, Seconds]:
    """Return one line of the table, and its times."""
    pairs = pair_of(model, length)
    request = make_request(model, pairs, SweepSpec(sites))
    runner = PackedRunner(model, request.sites)
    (batch,) = request.batches([0])
    start = time.perf_counter()
    loaded = runner.load(batch, request.intervention)
    capture = time.perf_counter() - start
    start = time.perf_counter()
    within = ps.sweep(model, pairs, sites, runner="packed", tolerance=TOLERANCE)
    adaptive = time.perf_counter() - start
    start = time.perf_counter()
    estimates = ps.sweep(model, pairs, sites, method="atp")
    atp = time.perf_counter() - start

    rng = np.random.default_rng(1)
    recorded = attributes(within)["adaptive"]["sites"]
    unseen, largest = [], []
    for plan in request.plans:
        live = np.setdiff1d(plan.live_patches(), recorded[plan.site.name]["patches"])
        n = min(len(live), N_UNSEEN // len(request.plans))
        unseen.append(PatchSet(plan, np.sort(rng.choice(live, n, replace=False))))
        all_live = plan.live_patches()
        size = np.abs(estimates[f"{plan.site.name}_atp"].values.ravel()[plan.cell[all_live]])
        largest.append(PatchSet(plan, np.sort(all_live[np.argsort(-size)[:N_LARGEST]])))
    timed = [
        PatchSet(s.plan, s.patches[:: max(1, len(s.patches) * len(unseen) // N_TIMED)])
        for s in unseen
    ]
    start = time.perf_counter()
    runner.run_together(loaded, timed, request.metrics)
    seconds = time.perf_counter() - start
    cost = sum(int(s.plan.cost[s.patches].sum()) for s in timed)
    token_layers = sum(plan.token_layers for plan in request.plans)
    exact = capture + seconds * token_layers / cost

    errors, values, found = [], [], []
    for chosen in (unseen, largest):
        results = runner.run_together(loaded, chosen, request.metrics)
        for s, result in zip(chosen, results, strict=True):
            mine = within[s.plan.site.name].values.ravel()[s.plan.cell[s.patches]]
            errors.append(np.abs(mine - result[0].numpy()))
            values.append(result[0].numpy())
            found.append(mine)
    base = float(within.base_metric.values[0, 0])
    true, mine = (np.abs(np.concatenate(x) - base) for x in (values, found))
    top = len(np.intersect1d(np.argsort(-true)[:20], np.argsort(-mine)[:20]))
    n_live = sum(plan.n_live for plan in request.plans)
    ran = sum(float(np.nansum(within[f"{name}_token_layers"].values)) for name in sites)
    line = (
        f"| {'+'.join(sites)} | {batch.length} | {n_live:,} | {exact:.1f} | {adaptive:.1f} | "
        f"{exact / adaptive:.1f}x | {1e3 * adaptive / n_live:.2f} | {atp:.1f} | "
        f"{ran / token_layers:.2%} | {max(float(e.max()) for e in errors[: len(sites)]):.4f} | "
        f"{max(float(e.max()) for e in errors[len(sites) :]):.4f} | {true.max():.1f} | {top} |"
    )
    return line, Seconds(batch.length, n_live, exact, adaptive, atp)


def figure(panels: dict[str, list[Seconds]]) -> str:
    """Return an SVG: milliseconds a live patch over tokens, one panel for each list of sites."""
    drawn = [
        plots.curves(
            {
                name: (
                    [row.n_tokens for row in rows],
                    [1e3 * getattr(row, field) / row.n_live for row in rows],
                )
                for name, field in (
                    ("exact", "exact"),
                    (f"tolerance {TOLERANCE}", "tolerance"),
                    ("atp", "atp"),
                )
            },
            sites,
            x_name="tokens of the prompt",
            y_name="ms a live patch",
            log=True,
            size=(330, 240),
        )
        for sites, rows in panels.items()
    ]
    alt = "Milliseconds a live patch over the tokens of the prompt: exact, with a tolerance, atp"
    return plots.picture(*drawn, alt=alt).svg


def main() -> None:
    """Print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--figure", type=Path)
    arguments = parser.parse_args()
    model = ps.load_model("smollm2-135m")
    ps.sweep(model, pair_of(model, 17), "z", runner="packed", tolerance=TOLERANCE)  # warm
    columns = (
        "sites",
        "tokens",
        "live patches",
        "exact, s",
        f"tolerance {TOLERANCE}, s",
        "faster",
        "ms a live patch",
        "atp, s",
        "token-layers",
        f"largest error of {N_UNSEEN} unseen",
        "of the largest estimates",
        "largest effect",
        "of the top 20",
    )
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    panels: dict[str, list[Seconds]] = {}
    for sites in SITES:
        for length in arguments.lengths:
            line, seconds = row(model, length, sites)
            panels.setdefault(", ".join(sites), []).append(seconds)
            print(line, flush=True)
    if arguments.figure:
        arguments.figure.write_text(figure(panels))


if __name__ == "__main__":
    main()
