"""Circuits: how much of what a model does is done by a few of its nodes or edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attributes import flat_attributes
from patchsweep.attribution import Method
from patchsweep.errors import MethodError, PlanError
from patchsweep.finite import check_finite, names_of
from patchsweep.identity import identity_of, question_settings, read_weights
from patchsweep.pairs import PromptPairs
from patchsweep.paths.ablate import run_edges, run_nodes
from patchsweep.paths.blocks import frozen
from patchsweep.paths.growth import (
    Sizes,
    areas,
    connected,
    rank_greedy,
    rank_top,
    sizes_of,
)
from patchsweep.paths.nodes import Nodes
from patchsweep.paths.scene import Question, Scene, ask, nodes_of, scenes
from patchsweep.paths.scores import (
    Ablation,
    Level,
    circuit_scores,
    method_name,
    method_settings,
    score_values,
)
from patchsweep.request import MetricLike
from patchsweep.results import analysis_attrs
from patchsweep.running import runs_model

Growth = Literal["top", "greedy"]

# the largest error of the runs in which all or nothing is ablated that rounding may explain, as a
# share of the largest difference between base and source
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.3


@runs_model
def circuit(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    level: Level = "edges",
    method: str | Method = "atp",
    growth: Growth = "top",
    sizes: Sequence[float] | None = None,
    ablation: Ablation = "resample",
    scores: xr.DataArray | None = None,
    read: int = -1,
    config: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Circuits of several sizes and what each does without the rest of the model.

    `circuit_metric` [metric, pair, size] is the metric on the clean prompt with all nodes or
    edges outside the circuit ablated, `complement_metric` the one with the circuit itself ablated
    and all else kept, `empty_metric` [metric, pair] the one with everything ablated, and
    `base_metric` and `source_metric` those of the clean and the corrupted prompt.

        faithfulness(C) = (m(C) - m(empty)) / (m(clean) - m(empty)),   m: mean over the pairs

    [metric, size] is 1 where the circuit does all that the model does; `completeness` is the same
    fraction for the complement, so 0 where nothing of it happens outside the circuit (Marks et
    al., arXiv 2403.19647). Both are NaN where m(clean) = m(empty). The attributes `cpr` and `cmd`
    are the areas of the faithfulness curve (see `growth.areas`), by metric.

    `rank` [node] or [sender, reader] is the turn at which each node or edge joins, -1 where there
    is no such edge: a circuit of n edges is those of the ranks below n. `score` is what they were
    ranked by. Senders and readers are named as in `edges`; nodes are the senders without
    embed, which belongs to every circuit of nodes.

    Args:
        level: circuits of nodes (heads and MLPs, whole) or of edges.
        method: what ranks them. Nodes: a method of `sweep` at all positions together, such as
            atp, ig or exact. Edges: eap (or atp, which is the same), eap_ig (or
            `IntegratedInputs(n_steps)`), or exact, which runs every edge.
        growth: top takes the largest |score| first; greedy, for edges, goes from the logits
            backwards, so that every edge leads somewhere.
        sizes: shares of all nodes or edges (up to 1) or their numbers; default: MIB's ten.
        ablation: what takes the place of what is ablated: resample (the corrupted prompt's),
            mean, zero, or anything else that `edges` takes as its intervention.
        scores: rank by these, one for each node or edge as `circuit_scores` gives them, such as
            those of other pairs; `method` is then not used.
        config: what a command line was told, kept in the provenance.

    Raises:
        PatchsweepError: an argument breaks a rule; the text says which, and what to do.
        MethodError: the model's blocks cannot be taken apart.
    """
    _check(level, growth)
    question = ask(model, pairs, metrics, "noising", ablation, read)
    nodes = nodes_of(model)
    n = nodes.n_edges if level == "edges" else len(nodes.senders) - 1
    sizes_of(sizes, n, level)  # before anything runs
    if scores is not None:
        score_values(scores, nodes, level)  # likewise
    attrs = _attrs(question, level, method, growth, sizes, scores, config)
    if scores is None:
        name = method_name(level, method)
        scores = circuit_scores(
            model, pairs, question.metrics[0], level=level, method=method, ablation=ablation,
            read=read,
        )  # fmt: skip
    else:
        name = str(scores.attrs.get("method", "given"))
    found: dict[tuple[int, ...], _Runs] = {}
    plan: _Plan | None = None
    with frozen(model):
        for scene in scenes(question):
            if plan is None:  # only now it is known which blocks are parallel
                plan = _plan(
                    scene.nodes, level, growth, sizes, score_values(scores, scene.nodes, level)
                )
            found[scene.batch.pairs] = _run(scene, plan, question)
    assert plan is not None
    return _dataset(question, plan, found, name, attrs)


def describe(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    level: Level = "edges",
    method: str | Method = "atp",
    growth: Growth = "top",
    sizes: Sequence[float] | None = None,
    ablation: Ablation = "resample",
    scores: xr.DataArray | None = None,
    read: int = -1,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Attributes by which a store knows what `circuit` gives for these arguments; runs nothing.

    Raises:
        PatchsweepError: an argument breaks a rule.
    """
    _check(level, growth)
    question = ask(model, pairs, metrics, "noising", ablation, read)
    read_weights(model)
    return _attrs(question, level, method, growth, sizes, scores, config)


def _attrs(
    question: Question,
    level: Level,
    method: str | Method,
    growth: Growth,
    sizes: Sequence[float] | None,
    scores: xr.DataArray | None,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    asked = question_settings(question)
    settings = {
        "ablation": asked.pop("intervention"),
        **asked,
        "level": level,
        "method": method_settings(level, method) if scores is None else "scores",
        "scores": None if scores is None else _described_scores(scores),
        "growth": growth,
        "sizes": sizes,
    }
    identity = identity_of("circuit", question.bridge, question.pairs, settings)
    return analysis_attrs(question.bridge, identity, config)


def _described_scores(scores: xr.DataArray) -> dict[str, Any]:
    labels = {str(dim): list(map(str, scores[dim].values)) for dim in scores.dims}
    return {"values": scores.values, "labels": labels}


@dataclass(frozen=True)
class _Plan:
    """Which circuits are run."""

    nodes: Nodes
    level: Level
    growth: Growth
    sizes: Sizes
    scores: NDArray[np.float32]  # [node] or [sender, reader]; NaN: no such edge
    ranks: NDArray[np.int32]  # likewise; -1: no such edge

    @property
    def circuits(self) -> NDArray[np.bool_]:
        """[size, ...] what belongs to the circuit of each size."""
        counts = np.array(self.sizes.counts).reshape(-1, *[1] * self.ranks.ndim)
        return (self.ranks >= 0) & (self.ranks < counts)

    @cached_property
    def rows(self) -> NDArray[np.bool_]:
        """[row, ...] what is kept in each run: the circuits, their complements, nothing, all.

        Of edges only those on a way from embed to the logits, as MIB has it: what reaches a node
        by no kept edge is not what the circuit computes.
        """
        circuits = self.circuits
        every = np.broadcast_to(self.ranks >= 0, circuits.shape)
        both = [circuits, every & ~circuits, np.zeros_like(circuits[:1]), every[:1]]
        rows = np.concatenate(both)
        return connected(self.nodes, rows) if self.level == "edges" else rows

    @cached_property
    def runs(self) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
        """The different ones of `rows`, and where among them each of `rows` is found.

        Small circuits are often alike: none of their edges lies on a whole way.
        """
        different, where = np.unique(self.rows, axis=0, return_inverse=True)
        return different, where.ravel()


def _plan(
    nodes: Nodes,
    level: Level,
    growth: Growth,
    sizes: Sequence[float] | None,
    scores: NDArray[np.float32],
) -> _Plan:
    ranks = rank_greedy(nodes, scores) if growth == "greedy" else rank_top(scores)
    chosen = sizes_of(sizes, int((ranks >= 0).sum()), level)
    return _Plan(nodes, level, growth, chosen, scores, ranks)


@dataclass(frozen=True)
class _Runs:
    """The metrics of one batch."""

    circuit: NDArray[np.float32]  # [metric, pair, size]
    complement: NDArray[np.float32]  # [metric, pair, size]
    empty: NDArray[np.float32]  # [metric, pair]
    base: NDArray[np.float32]  # [metric, pair]
    source: NDArray[np.float32]  # [metric, pair]


def _run(scene: Scene, plan: _Plan, question: Question) -> _Runs:
    rows, where = plan.runs
    device, n_pairs = scene.batch.base.device, scene.base.n_pairs
    keep = torch.from_numpy(rows).to(device).repeat_interleave(n_pairs, dim=0)
    pair = torch.arange(n_pairs, device=device).repeat(len(rows))
    run = run_edges if plan.level == "edges" else run_nodes
    values = run(scene, keep, pair).unflatten(1, (len(rows), n_pairs)).transpose(1, 2)
    found = check_finite(
        values.cpu().numpy(),
        names_of(question.metrics),
        lambda pair, row: (
            f"a circuit of {rows[row].sum()} {plan.level} in pair {scene.batch.pairs[pair]}"
        ),
    )[:, :, where]
    base, source = (x.cpu().numpy() for x in scene.references())
    runs = _Runs(
        circuit=found[:, :, : len(plan.sizes.counts)],
        complement=found[:, :, len(plan.sizes.counts) : -2],
        empty=found[:, :, -2],
        base=base,
        source=source,
    )
    _check_ends(runs, found[:, :, -1], plan.level, question, scene.base.resid[0].dtype)
    return runs


def _check_ends(
    runs: _Runs,
    whole: NDArray[np.float32],
    level: Level,
    question: Question,
    dtype: torch.dtype,
) -> None:
    """Raise unless the whole model, taken apart and put together, is the model.

    Raises:
        MethodError: it is not.
    """
    ends = [(whole, runs.base, "with nothing ablated")]
    if level == "edges" and question.intervention.name == "resample":
        ends.append((runs.empty, runs.source, "with everything ablated"))
    for found, known, words in ends:
        gap = np.nanmax(np.abs(runs.base - runs.source), axis=1)
        worst = np.abs(found - known).max(axis=1)
        tolerance = TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE)
        for metric, off, scale in zip(question.metrics, worst, gap, strict=True):
            if not off <= tolerance * max(float(scale), 1e-3):
                raise MethodError(
                    f"the model taken apart, {words}, differs from the model by {off:.2g} in "
                    f"{metric.name}, where clean and corrupted prompts are {scale:.2g} apart: "
                    "something else than heads, MLPs and the logits reads or writes its residual "
                    "stream; sweep its sites instead"
                )


def _dataset(
    question: Question,
    plan: _Plan,
    found: dict[tuple[int, ...], _Runs],
    method: str,
    attrs: Mapping[str, Any],
) -> xr.Dataset:
    n_metrics, n_pairs = len(question.metrics), len(question.pairs)
    raw = {
        "circuit_metric": np.full((n_metrics, n_pairs, len(plan.sizes.counts)), np.nan, np.float32)
    }
    raw["complement_metric"] = raw["circuit_metric"].copy()
    for name in ("empty_metric", "base_metric", "source_metric"):
        raw[name] = np.full((n_metrics, n_pairs), np.nan, np.float32)
    for members, runs in found.items():
        for values, part in zip(
            raw.values(),
            (runs.circuit, runs.complement, runs.empty, runs.base, runs.source),
            strict=True,
        ):
            values[:, list(members)] = part
    shares = np.array(plan.sizes.shares)
    faithfulness, completeness = (
        _fraction(raw[name], raw["empty_metric"], raw["base_metric"])
        for name in ("circuit_metric", "complement_metric")
    )
    names = [metric.name for metric in question.metrics]
    both = {
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
            "metric": _strings(names),
            "metric_unit": ("metric", _strings([metric.unit for metric in question.metrics])),
            "pair": np.arange(n_pairs),
            "answer": ("pair", _strings([pair.answer_text for pair in question.pairs])),
            "wrong_answer": ("pair", _strings([pair.wrong_answer_text for pair in question.pairs])),
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
                "direction": question.direction,
                "intervention": question.intervention.name,
                "read": question.read,
                "n_heads": plan.nodes.n_heads,
                "n_kv_heads": plan.nodes.n_kv_heads,
                "cpr": {name: cpr for name, (cpr, _) in both.items()},
                "cmd": {name: cmd for name, (_, cmd) in both.items()},
            }
        ),
    )  # fmt: skip


def _dims(plan: _Plan) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The dims of scores and ranks, and the coordinates that name them."""
    senders = plan.nodes.senders
    if plan.level == "nodes":
        return ("node",), {
            "node": _strings([str(node) for node in senders[1:]]),
            "node_layer": ("node", [node.layer for node in senders[1:]]),
        }
    return ("sender", "reader"), {
        "sender": _strings([str(sender) for sender in senders]),
        "reader": _strings([str(reader) for reader in plan.nodes.readers]),
        "sender_layer": ("sender", [sender.layer for sender in senders]),
        "reader_layer": ("reader", [reader.layer for reader in plan.nodes.readers]),
    }


def _tokens(question: Question) -> dict[str, Any]:
    """The tokens of the clean and the corrupted prompts; "" beyond a prompt's end."""
    pairs = question.pairs
    width = max(len(pair) for pair in pairs)
    found: dict[str, Any] = {"pos": np.arange(width)}
    for name, which in (("base_token", "clean_tokens"), ("source_token", "corrupted_tokens")):
        table = [[*getattr(pair, which), *[""] * (width - len(pair))] for pair in pairs]
        found[name] = (("pair", "pos"), _strings(table))
    return found


def _membership(plan: _Plan) -> dict[str, Any]:
    if plan.level == "nodes":
        return {"member": (("size", "node"), plan.circuits)}
    alive = plan.rows[: len(plan.sizes.counts)].sum(axis=(1, 2))
    text = "edges of the circuit on a way from embed to the logits"
    return {"n_connected": (("size",), alive, {"long_name": text})}


def _fraction(
    values: NDArray[np.float32], empty: NDArray[np.float32], base: NDArray[np.float32]
) -> NDArray[np.float64]:
    """[metric, size] of [metric, pair, size]: 0 where a run does as the empty circuit, 1 as the
    model; of means over the pairs, so that pairs with a small difference do not count more."""
    m, none, whole = (x.astype(np.float64).mean(axis=1) for x in (values, empty, base))
    span = (whole - none)[:, None]
    return np.where(span == 0, np.nan, (m - none[:, None]) / np.where(span == 0, 1, span))


def _check(level: str, growth: str) -> None:
    if level not in ("nodes", "edges"):
        raise PlanError(f"level={level!r} is not known; use nodes or edges")
    if growth not in ("top", "greedy"):
        raise PlanError(f"growth={growth!r} is not known; use top or greedy")
    if growth == "greedy" and level == "nodes":
        raise PlanError(
            "growth=greedy follows edges back from the logits, and level=nodes has none; use "
            "growth=top or level=edges"
        )


def _strings(values: Any) -> NDArray[Any]:
    return np.array(values, dtype=object)
