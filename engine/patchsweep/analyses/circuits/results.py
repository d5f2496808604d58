"""The plan of circuit runs, and their metrics as an xarray Dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from patchsweep.analyses.circuits.edge_batch import Question
from patchsweep.analyses.circuits.faithfulness import fraction, undefined
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.scores import Level
from patchsweep.analyses.circuits.selection import (
    RankBy,
    Sizes,
    areas,
    connected,
    rank_greedy,
    rank_top,
    sizes_of,
    strength_of,
)
from patchsweep.store.attributes import flat_attributes
from patchsweep.sweeps.layout import strings

Growth = Literal["top", "greedy"]


@dataclass(frozen=True)
class Plan:
    """The circuits to run."""

    nodes: Nodes
    level: Level
    growth: Growth
    rank_by: RankBy
    sizes: Sizes
    scores: NDArray[np.float32]  # [node] or [sender, reader]; NaN: no such edge
    ranks: NDArray[np.int32]  # likewise; -1: no such edge

    @property
    def circuits(self) -> NDArray[np.bool_]:
        """Members [size, ...] of the circuit of each size."""
        counts = np.array(self.sizes.counts).reshape(-1, *[1] * self.ranks.ndim)
        return (self.ranks >= 0) & (self.ranks < counts)

    @cached_property
    def rows(self) -> NDArray[np.bool_]:
        """Kept nodes or edges [row, ...] of each run: circuits, complements, nothing, everything.

        Edges that are on no path from embed to the logits are removed, as in MIB: the input of a
        node without a kept edge is not computed by the circuit.
        """
        circuits = self.circuits
        everything = np.broadcast_to(self.ranks >= 0, circuits.shape)
        parts = [circuits, everything & ~circuits, np.zeros_like(circuits[:1]), everything[:1]]
        rows = np.concatenate(parts)
        return connected(self.nodes, rows) if self.level == "edges" else rows

    @cached_property
    def runs(self) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        """The distinct `rows`, and the index among them of each row.

        Small circuits are often equal, since none of their edges is on a path to the logits.
        """
        different, inverse = np.unique(self.rows, axis=0, return_inverse=True)
        return different, inverse.ravel()


def make_plan(
    nodes: Nodes,
    level: Level,
    growth: Growth,
    rank_by: RankBy,
    sizes: Sequence[float] | None,
    scores: NDArray[np.float32],
) -> Plan:
    strength = strength_of(scores, rank_by)
    ranks = rank_greedy(nodes, strength) if growth == "greedy" else rank_top(strength)
    plan_sizes = sizes_of(sizes, int((ranks >= 0).sum()), level)
    return Plan(nodes, level, growth, rank_by, plan_sizes, scores, ranks)


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


def circuit_dataset(
    question: Question, plan: Plan, runs: Runs, method: str, attrs: Mapping[str, Any]
) -> xr.Dataset:
    n_sizes = len(plan.sizes.counts)
    raw = {
        "circuit_metric": runs.values[:, :, :n_sizes],
        "complement_metric": runs.values[:, :, n_sizes:-2],
        "empty_metric": runs.empty,
        "base_metric": runs.base,
        "source_metric": runs.source,
    }
    shares = np.array(plan.sizes.shares)
    names = [metric.name for metric in question.metrics]
    empty, base = raw["empty_metric"], raw["base_metric"]
    dtype = next(question.bridge.original_model.parameters()).dtype
    without = undefined(names, empty, base, runs.whole, dtype)
    faithfulness, completeness = (
        fraction(names, raw[name], empty, base, without)
        for name in ("circuit_metric", "complement_metric")
    )
    area_values = {
        name: areas(shares.tolist(), curve.tolist())
        for name, curve in zip(names, faithfulness, strict=True)
        if np.isfinite(curve).all()  # attributes are JSON, which has no NaN
    }
    curves = {
        "faithfulness": "share of the metric that the circuit alone keeps",
        "completeness": "share of the metric that all but the circuit keeps",
    }
    dims, coords = _dims(plan)
    return xr.Dataset(
        {
            "faithfulness": (
                ("metric", "size"), faithfulness, {"long_name": curves["faithfulness"]}
            ),
            "completeness": (
                ("metric", "size"), completeness, {"long_name": curves["completeness"]}
            ),
            "circuit_metric": (("metric", "pair", "size"), raw["circuit_metric"]),
            "complement_metric": (("metric", "pair", "size"), raw["complement_metric"]),
            **{
                name: (("metric", "pair"), raw[name])
                for name in ("empty_metric", "base_metric", "source_metric")
            },
            "score": (dims, plan.scores, {"long_name": "what ranked it"}),
            "rank": (dims, plan.ranks, {"long_name": "the turn at which it joins; -1: no edge"}),
            **_membership(plan),
        },
        coords={
            "metric": strings(names),
            "metric_unit": ("metric", strings([metric.unit for metric in question.metrics])),
            "pair": np.arange(len(question.pairs)),
            "answer": ("pair", strings([pair.answer_text for pair in question.pairs])),
            "wrong_answer": ("pair", strings([pair.wrong_answer_text for pair in question.pairs])),
            **_tokens(question),
            "size": shares,
            "count": ("size", np.array(plan.sizes.counts)),
            **coords,
        },
        attrs=flat_attributes(
            {
                **attrs,
                "level": plan.level,
                "method": method,
                "growth": plan.growth,
                "rank_by": plan.rank_by,
                "undefined": without,
                **question.means_attrs(),
                "direction": question.direction,
                "intervention": question.intervention.name,
                "read": question.read,
                "n_heads": plan.nodes.n_heads,
                "n_kv_heads": plan.nodes.n_kv_heads,
                "cpr": {name: cpr for name, (cpr, _) in area_values.items()},
                "cmd": {name: cmd for name, (_, cmd) in area_values.items()},
            }
        ),
    )  # fmt: skip


def _dims(plan: Plan) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the dims of scores and ranks, and their coordinates."""
    senders = plan.nodes.senders
    if plan.level == "nodes":
        return ("node",), {
            "node": strings([str(node) for node in senders[1:]]),
            "node_layer": ("node", [node.layer for node in senders[1:]]),
        }
    return ("sender", "reader"), {
        "sender": strings([str(sender) for sender in senders]),
        "reader": strings([str(reader) for reader in plan.nodes.readers]),
        "sender_layer": ("sender", [sender.layer for sender in senders]),
        "reader_layer": ("reader", [reader.layer for reader in plan.nodes.readers]),
    }


def _tokens(question: Question) -> dict[str, Any]:
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
