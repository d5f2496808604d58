"""Error against cost from attribution to exact: what each pair of thresholds takes and errs by.

    python benchmarks/adaptive_curves.py [FIGURE.svg]

Prints a Markdown table and writes the figure. For the first pair of each task, all live patches of
the four sites run exactly and at each pair of thresholds. A cell holds the token-layers relative to
the exact sweep's, the largest error in logits, and how many of the 20 largest effects are among the
20 that the thresholds give. Counts, not times: they do not depend on the machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import patchsweep as ps
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.plan import PatchSet
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.sweeps.adaptive import Adaptive
from transformer_lens.model_bridge import TransformerBridge

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import plots

TASKS = ("ioi", "greater_than", "facts")
SITES = ("resid_pre", "attn_out", "mlp_out", "z")
INF = math.inf
# theta in logits, and tau: from attribution to exact
LEVELS = (
    (INF, INF),
    (0.1, 0.3),
    (0.03, 0.1),
    (0.01, 0.03),
    (0.003, 0.01),
    (0.001, 0.003),
    (1e-4, 3e-4),
    (0.0, 0.0),
)
N_TOP = 20
Point = tuple[float, float, int]  # share of token-layers, largest error, of the top 20


def curves(model: TransformerBridge, task: str) -> tuple[int, dict[str, list[Point]]]:
    """Return the number of tokens, and by site a point for each of `LEVELS`."""
    pairs = ps.load_task(model, task, 1)
    request = make_request(model, pairs, SweepSpec(list(SITES), tolerance=1.0))
    runner = RunnerChoice(PackedRunner(model, request.sites), "asked for", None)
    adaptive = Adaptive(request, runner)
    (captured,) = adaptive.captures.of(range(1))
    sets = [PatchSet(plan, plan.live_patches()) for plan in request.plans]
    exact = adaptive.exact(captured, sets)
    points: dict[str, list[Point]] = {site: [] for site in SITES}
    for level in LEVELS:
        results = adaptive.run(captured, sets, [level] * len(sets))
        for chosen, truth, (values, _, token_layers) in zip(sets, exact, results, strict=True):
            true, found = (np.abs(x - captured.base)[0] for x in (truth, values))
            top = len(np.intersect1d(np.argsort(-true)[:N_TOP], np.argsort(-found)[:N_TOP]))
            share = float(token_layers.sum()) / float(chosen.plan.cost[chosen.patches].sum())
            error = float(np.abs(values - truth).max())
            points[chosen.plan.site.name].append((share, error, top))
    return len(pairs[0]), points


def figure(found: Sequence[tuple[str, int, dict[str, list[Point]]]]) -> str:
    """Return an SVG: the largest error against token-layers, one panel a task."""
    panels = [
        plots.curves(
            {
                site: ([share for share, _, _ in line], [max(error, 1e-6) for _, error, _ in line])
                for site, line in points.items()
            },
            f"{task}, {n_tokens} tokens",
            x_name="share of token-layers",
            y_name="largest error",
            log=True,
        )
        for task, n_tokens, points in found
    ]
    alt = "Largest error against token-layers, from attribution at the left to exact at the right"
    return plots.picture(*panels, alt=alt).svg


def main() -> None:
    """Print the table and write the figure."""
    model = ps.load_model("smollm2-135m")
    print(f"| task | theta | tau | {' | '.join(SITES)} |\n|{'---|' * (3 + len(SITES))}")
    found = []
    for task in TASKS:
        n_tokens, points = curves(model, task)
        found.append((task, n_tokens, points))
        for i, (theta, tau) in enumerate(LEVELS):
            cells = (f"{s:.1%}, {e:.2g}, {top}" for s, e, top in (x[i] for x in points.values()))
            name = f"{task} ({n_tokens} tokens)"
            print(f"| {name} | {theta:g} | {tau:g} | {' | '.join(cells)} |", flush=True)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(figure(found))


if __name__ == "__main__":
    main()
