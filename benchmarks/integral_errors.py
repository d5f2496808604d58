"""Whether the errors that integrals state are true, on the bundled model.

    python benchmarks/integral_errors.py [N_PAIRS [TASK ...]]

For each task and number of nodes: the share of cells whose distance to a rule of `N_TRUE` nodes is
within the stated error, the largest such distance, the largest stated error (both over the largest
estimate of the pair), nodes per pair, and how many of the 200 largest edges or estimates are the
converged ones, averaged over pairs. Prints a Markdown table.
"""

from __future__ import annotations

import sys

import numpy as np
import patchsweep as ps
from numpy.typing import NDArray
from patchsweep.attribution import Attribution, IntegratedInputs, IntegratedSite
from patchsweep.spec.spec import SweepSpec, make_request
from transformer_lens.model_bridge import TransformerBridge

TASKS = ("ioi", "greater_than", "facts")
SITES = ["embed", "resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "q", "k", "v"]
N_TRUE = 200
STEPS = (5, 10, 20, "auto")
TOP = 200
# `ig` runs one row per layer, site and node
IG_SITES, IG_LAYERS, IG_PAIRS = ["resid_pre", "z", "mlp_out"], [0, 10, 20], 8

Cells = NDArray[np.float32]


def line(
    task: str, what: str, steps: object, value: Cells, error: Cells, true: Cells, nodes: Cells
) -> str:
    """Return a line of the table; arrays are `[pair, cell]`."""
    scale = np.abs(true).max(axis=1, keepdims=True)
    live = np.abs(true) > 1e-6 * scale
    missed = np.abs(value - true)
    within = (missed <= error + 1e-6 * scale)[live].mean()
    top = min(TOP, true.shape[1] // 5)
    same = [
        len({*np.argsort(-np.abs(a))[:top]} & {*np.argsort(-np.abs(b))[:top]})
        for a, b in zip(value, true, strict=True)
    ]
    return (
        f"| {task} | {what} | {steps} | {nodes.mean():.0f} | {within:.1%} | "
        f"{(missed / scale).max():.4f} | {(error / scale).max():.4f} | "
        f"{np.mean(same):.1f} of {top} |"
    )


def inputs(model: TransformerBridge, task: str, pairs: ps.PromptPairs) -> None:
    """Print the lines of `ig_inputs` and of edges."""
    request = make_request(model, pairs, SweepSpec(SITES))

    def run(steps: int | str) -> dict[str, tuple[Cells, Cells, Cells]]:
        method = IntegratedInputs(steps)  # type: ignore[arg-type]
        parts = []
        attribution = Attribution(request, [method])
        for i in range(0, len(pairs), 8):
            parts.append(attribution.run(method, range(i, min(i + 8, len(pairs)))))
        found = {}
        for site in SITES:
            values = [np.concatenate([p.cells[site][0] for p in parts])]
            values.append(np.concatenate([p.stated[site, "error"][0] for p in parts]))
            values = [np.nan_to_num(x.reshape(len(pairs), -1)) for x in values]
            nodes = [p.stated.get(("", "nodes"), np.full((1, 1, 1), steps)) for p in parts]  # type: ignore[arg-type]
            found[site] = (*values, np.concatenate([x.ravel() for x in nodes]))
        ds = ps.edges(model, pairs, steps=steps)
        real = np.isfinite(ds["edge_eap_ig"].values[0, 0])
        edge = [ds[x].values[0][:, real] for x in ("edge_eap_ig", "edge_eap_ig_error")]
        found["edges"] = (*edge, ds["edge_eap_ig_nodes"].values.ravel())
        return found

    true = run(N_TRUE)
    for steps in STEPS:
        found = run(steps)
        some = [np.concatenate([found[s][i] for s in SITES], axis=1) for i in (0, 1)]
        converged = np.concatenate([true[s][0] for s in SITES], axis=1)
        print(line(task, "ig_inputs", steps, *some, converged, found["embed"][2]), flush=True)
        print(line(task, "edges", steps, *found["edges"][:2], true["edges"][0], found["edges"][2]))


def sites(model: TransformerBridge, task: str, pairs: ps.PromptPairs) -> None:
    """Print the lines of `ig`."""
    request = make_request(model, pairs, SweepSpec(IG_SITES, layers=IG_LAYERS))

    def run(steps: int | str) -> tuple[Cells, Cells, Cells]:
        method = IntegratedSite(steps)  # type: ignore[arg-type]
        found = Attribution(request, [method]).run(method, range(len(pairs)))
        values = [
            np.concatenate([x[0].reshape(len(pairs), -1) for x in arrays], axis=1)
            for arrays in (
                [found.cells[site] for site in IG_SITES],
                [found.stated[site, "error"] for site in IG_SITES],
            )
        ]
        nodes = [found.stated.get((s, "nodes"), np.full((1, 1, 1), steps)) for s in IG_SITES]  # type: ignore[arg-type]
        flat = np.concatenate([x.ravel() for x in nodes])
        return np.nan_to_num(values[0]), np.nan_to_num(values[1]), flat

    true, _, _ = run(N_TRUE)
    for steps in STEPS:
        value, error, nodes = run(steps)
        print(line(task, "ig", steps, value, error, true, nodes), flush=True)


def main() -> None:
    """Print the table."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    model = ps.load_model("smollm2-135m", device="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    print("| task | estimates | steps | nodes | within | largest miss | largest error | top |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for task in sys.argv[2:] or TASKS:
        pairs = ps.load_task(model, task, n)
        inputs(model, task, pairs)
        sites(model, task, ps.load_task(model, task, min(n, IG_PAIRS)))


if __name__ == "__main__":
    main()
