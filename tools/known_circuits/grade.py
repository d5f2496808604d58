"""Grades every method by models whose circuit is known.

    python -m tools.known_circuits.grade [NAME ...]     # the tables of docs/known_circuits.md

AUROC: how often a true edge scores higher by size than a false one, ties count half. Faithfulness:
that of the circuit of as many edges as are true, the best by score. The score of ACDC is the number
of thresholds at which it leaves an edge in.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import patchsweep as ps
import torch
import xarray as xr
from numpy.typing import NDArray
from scipy.stats import rankdata

from tools.known_circuits.load import Compiled, names, read, save_gpt2, true_edges

EDGE_METHODS = ("exact", "acdc", "eap", "eap_ig", "relp", "gim", "ifr")
NODE_METHODS = ("exact", "atp", "ig_inputs", "relp", "gim", "ifr")
N_PAIRS = 16
# of ACDC, as shares of the mean |metric(clean) - metric(corrupted)|
THRESHOLDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)


@dataclass
class Grade:
    """How well the methods did on one program."""

    name: str
    n_edges: int
    n_true: int
    copies: bool
    truth_faithfulness: float
    unseen: list[str]  # true edges without an exact effect on any pair
    edges: dict[str, tuple[float, float]] = field(default_factory=dict)  # AUROC, faithfulness
    nodes: dict[str, float] = field(default_factory=dict)  # AUROC


def model_of(of: Compiled) -> Any:
    """Load a program's model as users load theirs."""
    with tempfile.TemporaryDirectory() as folder:
        return ps.load_model(str(save_gpt2(of, Path(folder) / of.name)))


def outputs_of(of: Compiled, model: Any, prompts: list[list[str]]) -> NDArray[np.float32]:
    """Return the program's outputs `[prompt, pos, output]`, as the model computes them."""
    ids = [[of.about["inputs"][token] for token in ("BOS", *prompt)] for prompt in prompts]
    first = len(of.about["inputs"])
    with torch.no_grad():
        logits = model(torch.tensor(ids)).float().numpy()
    found: NDArray[np.float32] = logits[..., first : first + len(of.about["outputs"])]
    return found


def pairs_of(of: Compiled, model: Any, n: int = N_PAIRS) -> ps.PromptPairs:
    """Return random prompt pairs whose outputs at the last position differ."""
    rng = random.Random(of.name)
    length = len(of.about["prompts"][0])
    prompts = [[rng.choice(of.about["vocab"]) for _ in range(length)] for _ in range(12 * n)]
    last = outputs_of(of, model, prompts)[:, -1]
    half = len(prompts) // 2
    number = last.shape[1] == 1
    chosen = []
    for i in range(half):
        a, b = last[i], last[half + i]
        differ = abs(a[0] - b[0]) > 0.15 if number else a.argmax() != b.argmax()
        if differ:
            names = ("value", "zero")
            if not number:
                names = tuple(of.about["outputs"][int(x.argmax())] for x in (a, b))
            chosen.append((prompts[i], prompts[half + i], [f" ={name}" for name in names]))
    chosen = chosen[:n]
    return ps.PromptPairs.from_strings(
        model,
        clean=[" ".join(clean) for clean, _, _ in chosen],
        corrupted=[" ".join(corrupted) for _, corrupted, _ in chosen],
        answers=[tuple(answers) for _, _, answers in chosen],
    )


def truth_of(of: Compiled, scores: xr.DataArray) -> xr.DataArray:
    """Return 1 for the true edges and 0 for the others, in the shape of `scores`."""
    truth = xr.zeros_like(scores).where(scores.notnull())
    for sender, reader in true_edges(of):
        truth.loc[{"sender": sender, "reader": reader}] = 1
    return truth


def auroc(size: NDArray[Any], truth: NDArray[Any]) -> float:
    """Return the share of (true, false) pairs that the sizes order rightly; ties count half."""
    positive = truth > 0.5
    n_true, n_false = int(positive.sum()), int((~positive).sum())
    # what differs by rounding alone is a tie
    ranks = rankdata(np.round(size / max(float(size.max()), 1e-30), 6))
    return float((ranks[positive].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def pruned(model: Any, pairs: ps.PromptPairs) -> xr.DataArray:
    """Return how many thresholds of ACDC leave each edge in, NaN where there is none."""
    ends = ps.acdc(model, pairs, "logit_diff", thresholds=[1e9])
    gap = float(abs(ends["base_metric"] - ends["source_metric"]).mean())
    found = ps.acdc(model, pairs, "logit_diff", thresholds=[gap * share for share in THRESHOLDS])
    return found["kept"].sum("threshold").astype(np.float32)


def grade(
    of: Compiled,
    model: Any,
    edge_methods: Sequence[str] = EDGE_METHODS,
    node_methods: Sequence[str] = NODE_METHODS,
    n_pairs: int = N_PAIRS,
) -> Grade:
    """Grade the methods by one program, whose model is `model`."""
    pairs = pairs_of(of, model, n_pairs)
    exact = ps.circuit_scores(model, pairs, method="exact", by_pair=True)
    truth = truth_of(of, exact.isel(pair=0, drop=True))
    known = truth.notnull().values
    wanted = truth.values[known]
    n_true = int(wanted.sum())

    def faithfulness(scores: xr.DataArray) -> float:
        ds = ps.circuit(model, pairs, scores=scores, sizes=[n_true / len(wanted)])
        return float(ds["faithfulness"].values[0, 0])

    size = np.abs(exact).max("pair")
    missed = (truth == 1) & (size < 1e-4)
    result = Grade(
        of.name, len(wanted), n_true, bool(of.about["copies"]), faithfulness(truth),
        [
            f"{size.sender.values[i]}->{size.reader.values[j]}"
            for i, j in np.argwhere(missed.values)
        ],
    )  # fmt: skip
    for method in edge_methods:
        scores = exact.mean("pair", skipna=False)
        if method == "acdc":
            scores = pruned(model, pairs).where(truth.notnull())
        elif method != "exact":
            scores = ps.circuit_scores(model, pairs, method=method)
        result.edges[method] = (
            auroc(np.abs(scores.values[known]), wanted), faithfulness(scores)
        )  # fmt: skip
    senders = {sender for sender, _ in true_edges(of)} - {"embed"}
    for method in node_methods:
        scores = ps.circuit_scores(model, pairs, level="nodes", method=method)
        true_nodes = np.array([str(node) in senders for node in scores["node"].values])
        if true_nodes.any() and not true_nodes.all():
            result.nodes[method] = auroc(np.abs(scores.values), true_nodes.astype(float))
    return result


def main(chosen: list[str]) -> None:
    """Print the table of the programs called `chosen`; all of them by default."""
    grades = []
    print("| program | edges | true | of the truth | " + " | ".join(EDGE_METHODS) + " | unseen |")
    print("|---|---:|---:|---:|" + "---:|" * (len(EDGE_METHODS) + 1))
    for name in chosen or names():
        of = read(name)
        found = grade(of, model_of(of))
        grades.append(found)
        cells = [f"{a:.3f} ({f:.2f})" for a, f in found.edges.values()]
        print(
            f"| {name} | {found.n_edges} | {found.n_true} | {found.truth_faithfulness:.2f} | "
            + " | ".join(cells)
            + f" | {len(found.unseen)} |",
            flush=True,
        )
    print("\n| | " + " | ".join(EDGE_METHODS) + " |")
    for i, what in enumerate(("AUROC", "faithfulness")):
        good = [sum(g.edges[m][i] >= 0.99 for g in grades) for m in EDGE_METHODS]
        print(f"| {what} of 0.99 or above | " + " | ".join(map(str, good)) + " |")
    for label, of in (("median", np.median), ("least", np.min)):
        for i, what in enumerate(("AUROC", "faithfulness")):
            values = [of([g.edges[m][i] for g in grades]) for m in EDGE_METHODS]
            print(f"| {label} {what} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    print("\n| nodes | " + " | ".join(NODE_METHODS) + " |")
    for label, of in (("median", np.median), ("least", np.min)):
        values = [of([g.nodes[m] for g in grades if m in g.nodes]) for m in NODE_METHODS]
        print(f"| {label} AUROC | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    for g in grades:
        if g.unseen:
            print(f"{g.name}: no exact effect: {', '.join(g.unseen)}")


if __name__ == "__main__":
    main(sys.argv[1:])
