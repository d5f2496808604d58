"""Results of edges and circuits as xarray Datasets, and how faithful circuits are."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from patchsweep.analyses.circuits.edge_batch import Question
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.selection import Floats, Plan, areas
from patchsweep.data.tokenize import token_table
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.finite import names_of
from patchsweep.spec.spec import model_shape
from patchsweep.sweeps.layout import metric_and_pair_coords, strings

# largest rounding error of a metric, as a share of it; a run's own measured error counts if larger
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
LOW_PRECISION_ROUNDING = 1e-2


def edge_dataset(
    question: Question,
    variables: Mapping[str, tuple[Sequence[Hashable], NDArray[Any], str]],
    found: xr.Dataset,
    coords: Mapping[str, Any],
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    """Return variables (dims, values, text), with the metrics of the unpatched runs of `found`."""
    return xr.Dataset(
        {
            **{
                name: (dims, values, {"long_name": long_name})
                for name, (dims, values, long_name) in variables.items()
            },
            "base_metric": (("metric", "pair"), found["base_metric"].values),
            "source_metric": (("metric", "pair"), found["source_metric"].values),
        },
        coords={
            **metric_and_pair_coords(question.metrics, question.pairs),
            **_tokens(question),
            **coords,
        },
        attrs={**attrs, **question_attrs(question)},
    )


def question_attrs(question: Question) -> dict[str, Any]:
    """Return the attributes that say what was asked of which heads."""
    shape = model_shape(question.bridge)
    return {
        "direction": question.direction,
        "intervention": question.intervention.name,
        **question.means_attrs(),
        "read": question.read,
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.n_kv_heads,
    }


def _tokens(question: Question) -> dict[str, Any]:
    """Return the tokens of both runs by position; "" beyond a prompt's end."""
    runs = [base_and_source(pair, question.direction) for pair in question.pairs]
    base, source = (token_table(question.bridge, side) for side in zip(*runs, strict=True))
    return {
        "pos": np.arange(base.shape[1]),
        "base_token": (("pair", "pos"), base),
        "source_token": (("pair", "pos"), source),
    }


def labels_of(nodes: Nodes, level: str) -> dict[str, NDArray[Any]]:
    """Return the names of all nodes, or of senders and readers."""
    senders = strings([str(sender) for sender in nodes.senders])
    if level == "nodes":
        return {"node": senders[1:]}
    return {"sender": senders, "reader": strings([str(reader) for reader in nodes.readers])}


def node_coords(nodes: Nodes) -> dict[str, Any]:
    """Return the coordinates of the axes `sender` and `reader`."""
    return {
        **labels_of(nodes, "edges"),
        "sender_layer": ("sender", [sender.layer for sender in nodes.senders]),
        "reader_layer": ("reader", [reader.layer for reader in nodes.readers]),
    }


def length_of(question: Question) -> int:
    """Return the number of positions of the longest pair, including forced answer tokens."""
    return max(len(base_and_source(pair, question.direction)[0]) for pair in question.pairs)


@dataclass(frozen=True)
class Runs:
    """The metrics of all runs of some pairs."""

    values: NDArray[np.float32]  # [metric, pair, run] of `Plan.rows`
    base: NDArray[np.float32]  # [metric, pair]
    source: NDArray[np.float32]  # [metric, pair]

    @property
    def empty(self) -> NDArray[np.float32]:
        """[metric, pair] of the run with everything ablated."""
        return self.values[:, :, -2]

    @property
    def whole(self) -> NDArray[np.float32]:
        """[metric, pair] of the run with nothing ablated."""
        return self.values[:, :, -1]


def circuit_dataset(question: Question, plan: Plan, runs: Runs, method: str) -> xr.Dataset:
    n_sizes = len(plan.sizes.counts)
    inside, outside = runs.values[:, :, :n_sizes], runs.values[:, :, n_sizes:-2]
    shares = np.array(plan.sizes.shares)
    names = names_of(question.metrics)
    dtype = next(question.bridge.original_model.parameters()).dtype
    without = undefined(names, runs.empty, runs.base, runs.whole, dtype)
    faithfulness, completeness = (
        fraction(names, values, runs.empty, runs.base, without) for values in (inside, outside)
    )
    area_values = {
        name: areas(shares.tolist(), curve.tolist())
        for name, curve in zip(names, faithfulness, strict=True)
        if np.isfinite(curve).all()  # attributes are JSON, which has no NaN
    }
    dims, coords = _dims(plan)
    kept = "share of the metric that {} keeps"
    return xr.Dataset(
        {
            "faithfulness": (
                ("metric", "size"),
                faithfulness,
                {"long_name": kept.format("the circuit alone")},
            ),
            "completeness": (
                ("metric", "size"),
                completeness,
                {"long_name": kept.format("all but the circuit")},
            ),
            "circuit_metric": (("metric", "pair", "size"), inside),
            "complement_metric": (("metric", "pair", "size"), outside),
            "empty_metric": (("metric", "pair"), runs.empty),
            "base_metric": (("metric", "pair"), runs.base),
            "source_metric": (("metric", "pair"), runs.source),
            "score": (dims, plan.scores, {"long_name": "what ranked it"}),
            "rank": (dims, plan.ranks, {"long_name": "the turn at which it joins; -1: no edge"}),
            **_membership(plan),
        },
        coords={
            **metric_and_pair_coords(question.metrics, question.pairs),
            **_prompt_tokens(question),
            "size": shares,
            "count": ("size", np.array(plan.sizes.counts)),
            **coords,
        },
        attrs={
            "level": plan.level,
            "method": method,
            "growth": plan.growth,
            "rank_by": plan.rank_by,
            "undefined": without,
            **question_attrs(question),
            "cpr": {name: cpr for name, (cpr, _) in area_values.items()},
            "cmd": {name: cmd for name, (_, cmd) in area_values.items()},
        },
    )


def _dims(plan: Plan) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the dims of scores and ranks, and their coordinates."""
    if plan.level == "edges":
        return ("sender", "reader"), node_coords(plan.nodes)
    layers = [node.layer for node in plan.nodes.senders[1:]]
    return ("node",), {**labels_of(plan.nodes, "nodes"), "node_layer": ("node", layers)}


def _prompt_tokens(question: Question) -> dict[str, Any]:
    """Return the tokens of clean and corrupted prompts by position; "" beyond a prompt's end."""
    pairs = question.pairs
    width = max(len(pair) for pair in pairs)
    coords: dict[str, Any] = {"pos": np.arange(width)}
    for name, attribute in (("base_token", "clean_tokens"), ("source_token", "corrupted_tokens")):
        table = [[*getattr(pair, attribute), *[""] * (width - len(pair))] for pair in pairs]
        coords[name] = (("pair", "pos"), strings(table))
    return coords


def _membership(plan: Plan) -> dict[str, Any]:
    if plan.level == "nodes":
        return {"member": (("size", "node"), plan.circuits)}
    alive = plan.rows[: len(plan.sizes.counts)].sum(axis=(1, 2))
    text = "edges of the circuit on a way from embed to the logits"
    return {"n_connected": (("size",), alive, {"long_name": text})}


def undefined(
    names: Sequence[str], empty: Floats, base: Floats, whole: Floats, dtype: torch.dtype
) -> dict[str, str]:
    """Return metric -> reason for metrics without faithfulness; all arrays are [metric, pair].

    Ablating everything must change the mean over pairs by more than rounding, or faithfulness
    would be a ratio of rounding errors. `whole` is the run with nothing ablated, which differs
    from `base` only by rounding.
    """
    reasons = {}
    share = ROUNDING.get(dtype, LOW_PRECISION_ROUNDING)
    for name, none, all_, again in zip(names, empty, base, whole, strict=True):
        span = float(all_.mean(dtype=np.float64) - none.mean(dtype=np.float64))
        size = max(float(np.abs(all_).max()), float(np.abs(none).max()))
        rounding = max(share * size, float(np.abs(again - all_).max()))
        if not abs(span) > rounding:
            reasons[name] = (
                f"m(clean) - m(empty) is {span:.2g}, within rounding ({rounding:.2g}) of 0: with "
                f"everything ablated {name} is what it is in the whole model"
            )
    return reasons


def fraction(
    names: Sequence[str],
    values: Floats,
    empty: Floats,
    base: Floats,
    without: Mapping[str, str],
) -> NDArray[np.float64]:
    """Return fractions [metric, size] of `values` [metric, pair, size]; 0 as empty, 1 as base.

    It is a ratio of means over pairs, so that pairs with a small difference do not get a large
    weight. NaN for the metrics in `without`.
    """
    m, none, all_ = (x.mean(axis=1, dtype=np.float64) for x in (values, empty, base))
    known = np.array([name not in without for name in names])[:, None]
    span = np.where(known, (all_ - none)[:, None], 1)
    return np.where(known, (m - none[:, None]) / span, np.nan)
