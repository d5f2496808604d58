"""Thresholds of adaptive runs of edges: the loosest whose errors on a sample are small enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.analyses.circuits.adaptive_edges import AdaptiveEdges
from patchsweep.analyses.circuits.eap import check_gradients
from patchsweep.analyses.circuits.edge_batch import Question
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, Nodes
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.arguments import check_tolerance
from patchsweep.errors import ConfigError
from patchsweep.forward.grad import frozen
from patchsweep.results.tolerance import in_units
from patchsweep.store.difference import ADAPTIVE
from patchsweep.sweeps.adaptive import LEVELS, MARGIN, N_EACH, sampled_pairs
from patchsweep.sweeps.thresholds import EXACTLY

_STAGE = "thresholds"
_VALUES = ("largest", "median")  # errors of a pair's sample, by level
_NUMBERS = ("share", "n")  # token-layers relative to the exact runs'; edges of the sample


@dataclass(frozen=True)
class EdgeThresholds:
    """The thresholds of a run, and what its sample says of them."""

    tolerance: float | str
    level: tuple[float, float]  # theta in units of the tolerance, and tau; `EXACTLY`
    sample: Mapping[str, Any]  # number of edges, errors by metric, share of token-layers

    def theta(self, base: NDArray[np.float32], source: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return theta in units of each metric, for unpatched metrics `[metric, pair]`."""
        return np.float32(self.level[0]) * in_units(self.tolerance, base, source)

    def attributes(self, n_live: int, token_layers: int) -> dict[str, Any]:
        """Return what results record, as sweeps do; `token_layers`: of exact runs of all edges."""
        theta, tau = self.level
        site = {"theta": theta, "tau": tau, **self.sample}
        return {
            ADAPTIVE: {"tolerance": self.tolerance, "sites": {"edge": site}},
            "plan": {"edge": {"n_live": n_live, "token_layers": token_layers}},
        }


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


def tolerance_setting(tolerance: float | str | None) -> dict[str, float | str]:
    """Return what an identity holds of a tolerance; nothing if there is none."""
    return {} if tolerance is None else {"tolerance": tolerance}


def edge_thresholds(
    question: Question,
    at: Callable[[range], Sequence[AdaptiveEdges]],
    estimates: NDArray[np.float32],
    tolerance: float | str,
    attrs: Mapping[str, Any],
    stages: Stages,
) -> EdgeThresholds:
    """Run a sample of edges exactly and at each level of thresholds; return those that suffice.

    `at` returns the batches of some pairs. `estimates` [metric, pair, sender, reader(, pos)] are
    first-order effects: half of the sample are the largest of them, the others are random.
    """
    n_pairs, levels = len(question.pairs), {"level": len(LEVELS)}
    n_metrics = len(question.metrics)
    shapes = {name: {"metric": n_metrics, "pair": n_pairs, **levels} for name in _VALUES}
    shapes |= {name: {"pair": n_pairs, **levels} for name in _NUMBERS}
    sampled = sampled_pairs(n_pairs)

    def block(pairs: range) -> Computed:
        cells, references = empty(shapes, pairs), np.full((2, n_metrics, 1), np.nan, np.float32)
        if pairs.start not in sampled:
            return cells, references
        with frozen(question.bridge):
            (run,) = at(pairs)
            base, source = (x.cpu().numpy() for x in run.edge_batch.references())
            references[:] = base, source
            sample = _sample(run.edge_batch.nodes, estimates[:, pairs.start], len(sampled))
            known = exact(run.edge_batch, sample, writes=run.writes).cpu().numpy()
            unit = in_units(tolerance, base, source)
            full = sum(run.exact_cost(edge) for edge in sample)
            for i, (theta, tau) in enumerate(LEVELS):
                values, _, token_layers = run.run(sample, np.float32(theta) * unit, tau)
                errors = np.abs(values - known)
                cells["largest"][..., i] = errors.max(axis=-1)
                cells["median"][..., i] = np.median(errors, axis=-1)
                cells["share"][..., i] = token_layers.sum() / max(1, full)
        cells["n"][:] = len(sample)
        return cells, references

    found = stages.run(
        _STAGE,
        shapes,
        1,
        block,
        metrics=[metric.name for metric in question.metrics],
        attrs={**attrs, "tolerance": tolerance},
    )
    stages.wait()
    chosen = found.isel(pair=sampled).load()
    allowed = MARGIN * in_units(
        tolerance, chosen["base_metric"].values, chosen["source_metric"].values
    )
    within = (chosen["largest"].values <= allowed[..., None]).all(axis=(0, 1))
    if not within.any():
        return EdgeThresholds(tolerance, EXACTLY, _sample_words(question, chosen, None))
    i = int(within.argmax())
    return EdgeThresholds(tolerance, LEVELS[i], _sample_words(question, chosen, i))


def _sample(nodes: Nodes, estimates: NDArray[np.float32], n_pairs: int) -> list[Edge]:
    """Return one pair's part of the sample, the same in every process."""
    strength = np.abs(np.nan_to_num(estimates)).max(axis=0)
    live = np.flatnonzero(strength)
    n = min(len(live), -(-(N_EACH + math.isqrt(len(live)) // 4) // n_pairs))
    largest = live[np.argsort(-strength.ravel()[live], kind="stable")[:n]]
    random = np.random.default_rng(len(live)).choice(live, n, replace=False)
    at = np.unravel_index(np.union1d(largest, random), strength.shape)
    return [
        Edge(nodes.senders[sender], nodes.readers[reader], *pos)
        for sender, reader, *pos in zip(*(x.tolist() for x in at), strict=True)
    ]


def _sample_words(question: Question, chosen: xr.Dataset, level: int | None) -> dict[str, Any]:
    """Return what a sample says at a level; None: all its edges run exactly."""
    names = [metric.name for metric in question.metrics]
    at = chosen.isel(level=-1 if level is None else level)
    errors = {
        name: dict.fromkeys(names, 0.0)
        if level is None
        else dict(zip(names, at[name].values.max(axis=1).tolist(), strict=True))
        for name in _VALUES
    }
    return {
        "n": int(at["n"].sum()),
        "sample_token_layers": 1.0 if level is None else float(at["share"].mean()),
        "largest_error": errors["largest"],
        "median_error": errors["median"],
    }
