"""Thresholds of adaptive runs of all edges: a sample of edges decides, as in sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from patchsweep.analyses.circuits.adaptive_edges import AdaptiveEdges
from patchsweep.analyses.circuits.eap import check_gradients
from patchsweep.analyses.circuits.edge_batch import Question
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, Nodes
from patchsweep.arguments import check_tolerance
from patchsweep.errors import ConfigError
from patchsweep.forward.grad import frozen
from patchsweep.results.tolerance import in_units
from patchsweep.sweeps.calibration import Level, Part, calibrate, n_each, sampled_pairs
from patchsweep.sweeps.thresholds import Ran, SampleSummary

SITE = "edge"  # what results call the patches of all edges


def check_edge_tolerance(
    question: Question, tolerance: float | str | None, every: bool, remedy: str
) -> None:
    """Check that a run of edges can meet its tolerance; `every`: it runs all of them.

    Raises:
        ConfigError: it is no positive number, or the run is of chosen edges.
        MethodError: a metric has no gradient.
    """
    check_tolerance(tolerance)
    if tolerance is None:
        return
    if not every:
        raise ConfigError(
            f"tolerance={tolerance!r} needs a sample, which is worth its time for all edges alone; "
            f"use {remedy}, or leave the tolerance out"
        )
    check_gradients(question, None)


def calibrated(
    question: Question,
    at: Callable[[range], Sequence[AdaptiveEdges]],
    estimates: NDArray[np.float32],
    tolerance: float | str,
) -> dict[str, SampleSummary]:
    """Run a sample of edges exactly and at levels of thresholds; return what it says of them.

    `at` returns the batches of some pairs. `estimates` [metric, pair, sender, reader(, pos)] are
    first-order effects: half of the sample are the largest of them, the others are random.
    """
    pairs = sampled_pairs(len(question.pairs))
    parts = []
    with frozen(question.bridge):
        for pair in pairs:
            (run,) = at(range(pair, pair + 1))
            sample = _sample(run.edge_batch.nodes, estimates[:, pair], len(pairs))
            base, source = (x.cpu().numpy() for x in run.edge_batch.references())
            parts.append(
                Part(
                    run,
                    sample,
                    np.arange(len(sample)),
                    exact(run.edge_batch, sample, writes=run.writes).cpu().numpy()[:, 0],
                    base,
                    in_units(tolerance, base, source),
                    sum(run.exact_cost(edge) for edge in sample),
                )
            )

        def run_sets(
            run: AdaptiveEdges, sets: Sequence[Sequence[Edge]], levels: Sequence[Level]
        ) -> list[Ran]:
            of_pair = [
                run_at(run, edges, tolerance, level)
                for edges, level in zip(sets, levels, strict=True)
            ]
            return [(values[:, 0], linear[:, 0], ran[0]) for values, linear, ran in of_pair]

        found = calibrate({SITE: parts}, run_sets)
    return {name: SampleSummary.of(sample) for name, sample in found.items()}


def run_at(
    run: AdaptiveEdges, edges: Sequence[Edge], tolerance: float | str, level: Level
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Return what `AdaptiveEdges.run` returns, at a level of thresholds."""
    base, source = (x.cpu().numpy() for x in run.edge_batch.references())
    theta, tau = level
    return run.run(edges, np.float32(theta) * in_units(tolerance, base, source), tau)


def _sample(nodes: Nodes, estimates: NDArray[np.float32], n_pairs: int) -> list[Edge]:
    """Return one pair's part of the sample, the same in every process."""
    strength = np.abs(np.nan_to_num(estimates)).max(axis=0)
    live = np.flatnonzero(strength)
    n = min(len(live), n_each(len(live), n_pairs))
    largest = live[np.argsort(-strength.ravel()[live], kind="stable")[:n]]
    random = np.random.default_rng(len(live)).choice(live, n, replace=False)
    at = np.unravel_index(np.union1d(largest, random), strength.shape)
    return [
        Edge(nodes.senders[sender], nodes.readers[reader], *pos)
        for sender, reader, *pos in zip(*(x.tolist() for x in at), strict=True)
    ]
