"""Edges of a model on prompt pairs, as xarray datasets: estimated, exact, or screened."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attribution.integrated import nodes as quadrature
from patchsweep.batch import base_and_source
from patchsweep.errors import MethodError, PlanError
from patchsweep.interventions import Direction, Intervention, ValueFn
from patchsweep.metrics import Metric, has_gradient
from patchsweep.pairs import PromptPairs
from patchsweep.paths.blocks import frozen
from patchsweep.paths.eap import eap
from patchsweep.paths.exact import exact
from patchsweep.paths.nodes import Edge, Nodes
from patchsweep.paths.scene import Question, ask, nodes_of, scenes
from patchsweep.request import MetricLike
from patchsweep.results import model_provenance

EdgeLike = Edge | str | tuple[str, str]
Values = NDArray[np.float32]


def edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    direction: Direction | None = None,
    intervention: str | Intervention | float | Tensor | ValueFn = "resample",
    steps: int | None = None,
    positions: bool = False,
    read: int = -1,
) -> xr.Dataset:
    """Edge attribution of every edge: `edge_eap` [metric, pair, sender, reader(, pos)].

    Values are signed estimates of metric(patched) - metric(base), in the metric's unit, NaN
    where there is no such edge; `base_metric` and `source_metric` stand beside them. Senders are
    called embed, a3.h2 (head 2 of layer 3) and m5 (the MLP of layer 5); readers a7.h1.q, a7.h1.k
    and a7.h1.v (for k and v the key-value head), m5 and logits.

    A head's write passes the norm after attention where there is one (Gemma 2 and 3), to first
    order at the base run. Over all readers a sender's edges sum to its attribution patching
    estimate (site z, mlp_out, or the first block's input).

    Args:
        steps: average the gradients at this many nodes between the base and the source prompt's
            embeddings, which gives `edge_eap_ig`. It is complete at the embeddings alone: other
            senders' whole changes meet gradients taken along a path that they do not follow.
        positions: keep the position at which an edge is written and read.

    Raises:
        PatchsweepError: an argument breaks a rule; the text says which, and what to do.
        MethodError: the metric has no use for gradients, or the model is not a sum of parts.
    """
    question = ask(model, pairs, metrics, direction, intervention, read)
    _check_gradients(question, steps)
    return _edges(question, steps, positions)


def exact_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    edges: Sequence[EdgeLike],
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    direction: Direction | None = None,
    intervention: str | Intervention | float | Tensor | ValueFn = "resample",
    read: int = -1,
) -> xr.Dataset:
    """Exact patches of `edges`: `edge` [metric, pair, edge], the raw patched metric.

    The reader alone gets its base input plus what the sender's change adds to the stream, at all
    positions; nothing else changes but what follows from that. The coordinates `edge_sender` and
    `edge_reader` name the ends; `edge - base_metric` compares with the estimates of `edges`.

    Raises:
        PlanError: there is no edge, or no such edge; `edges` names one twice.
        PatchsweepError: another argument breaks a rule.
    """
    question = ask(model, pairs, metrics, direction, intervention, read)
    chosen = _chosen(nodes_of(model), edges)
    return _exact(question, chosen)


def screen_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    top: int = 200,
    direction: Direction | None = None,
    intervention: str | Intervention | float | Tensor | ValueFn = "resample",
    steps: int | None = None,
    read: int = -1,
) -> xr.Dataset:
    """Estimates rank all edges, exact patches verify the foremost `top`.

    They are ranked by their mean |estimate| over the pairs for the first metric. The dataset
    holds `edge_eap` of all edges (see `edges`) and `edge` of the chosen, in the order of their
    rank (see `exact_edges`), with `edge_estimate` [metric, pair, edge] beside it.

    Raises:
        PlanError: `top` is less than one or more than there are edges.
        PatchsweepError: another argument breaks a rule.
    """
    question = ask(model, pairs, metrics, direction, intervention, read)
    _check_gradients(question, steps)
    most = nodes_of(model).n_edges
    if not 1 <= top <= most:
        raise PlanError(f"top={top} edges of {most}; use 1..{most}")
    scores = _edges(question, steps, positions=False)
    name = _name(steps)
    strength = np.nan_to_num(np.abs(scores[name].values[0]).mean(axis=0), nan=-1.0)
    top = min(top, int((strength >= 0).sum()))  # parallel blocks have fewer edges
    # stable, so that ties go to the earlier edge on every machine
    ranked = np.argsort(-strength, axis=None, kind="stable")[:top]
    at = np.unravel_index(ranked, strength.shape)
    ends = [scores[dim].values[i] for dim, i in zip(("sender", "reader"), at, strict=True)]
    nodes = nodes_of(model)
    verified = _exact(question, [nodes.edge((str(u), str(v))) for u, v in zip(*ends, strict=True)])
    estimate = scores[name].values[:, :, at[0], at[1]]
    both = {"edge_estimate": (("metric", "pair", "edge"), estimate), name: scores[name]}
    return verified.assign(both).assign_attrs(method=f"screen:{scores.attrs['method']}")


def _edges(question: Question, steps: int | None, positions: bool) -> xr.Dataset:
    found: dict[tuple[int, ...], tuple[Values, ...]] = {}
    with frozen(question.bridge):
        for scene in scenes(question, gradient=steps is None):
            nodes = scene.nodes
            values = eap(scene, steps=steps, positions=positions).cpu().numpy()
            found[scene.batch.pairs] = (values, *_references(scene))
    dims = ["metric", "pair", "sender", "reader"]
    if positions:
        dims.append("pos")
    coords: dict[str, Any] = {
        "sender": _strings([str(sender) for sender in nodes.senders]),
        "reader": _strings([str(reader) for reader in nodes.readers]),
        "sender_layer": ("sender", [sender.layer for sender in nodes.senders]),
        "reader_layer": ("reader", [reader.layer for reader in nodes.readers]),
    }
    if positions:
        coords |= _tokens(question)
    attrs = {"long_name": "estimate of metric(patched) - metric(base) of an edge"}
    return _dataset(question, _name(steps), dims, found, coords, attrs, method=_name(steps)[5:])


def _exact(question: Question, chosen: Sequence[Edge]) -> xr.Dataset:
    found: dict[tuple[int, ...], tuple[Values, ...]] = {}
    with frozen(question.bridge):
        for scene in scenes(question):
            checked = [scene.nodes.edge(edge) for edge in chosen]  # parallel blocks have fewer
            values = exact(scene, checked).cpu().numpy()
            found[scene.batch.pairs] = (values, *_references(scene))
    coords = {
        "edge_sender": ("edge", _strings([str(edge.sender) for edge in chosen])),
        "edge_reader": ("edge", _strings([str(edge.reader) for edge in chosen])),
    }
    attrs = {"long_name": "metric with one edge patched"}
    dims = ["metric", "pair", "edge"]
    return _dataset(question, "edge", dims, found, coords, attrs, method="exact")


def _references(scene: Any) -> tuple[Values, Values]:
    base, source = scene.references()
    return base.cpu().numpy(), source.cpu().numpy()


def _dataset(
    question: Question,
    name: str,
    dims: list[str],
    found: dict[tuple[int, ...], tuple[Values, ...]],
    coords: dict[str, Any],
    attrs: dict[str, str],
    method: str,
) -> xr.Dataset:
    n_metrics, n_pairs = len(question.metrics), len(question.pairs)
    shape = list(next(iter(found.values()))[0].shape)
    shape[1] = n_pairs
    if "pos" in dims:
        shape[-1] = max(values.shape[-1] for values, *_ in found.values())
    cells = np.full(shape, np.nan, np.float32)
    references = np.full((2, n_metrics, n_pairs), np.nan, np.float32)
    for members, (values, *both) in found.items():
        which = list(members)
        if "pos" in dims:
            cells[:, which, ..., : values.shape[-1]] = values
        else:
            cells[:, which] = values
        references[:, :, which] = both
    return xr.Dataset(
        {
            name: (dims, cells, attrs),
            "base_metric": (("metric", "pair"), references[0]),
            "source_metric": (("metric", "pair"), references[1]),
        },
        coords={
            "metric": _strings([metric.name for metric in question.metrics]),
            "metric_unit": ("metric", _strings([metric.unit for metric in question.metrics])),
            "pair": np.arange(n_pairs),
            "answer": ("pair", _strings([pair.answer_text for pair in question.pairs])),
            "wrong_answer": ("pair", _strings([pair.wrong_answer_text for pair in question.pairs])),
            **coords,
        },
        attrs={
            "patchsweep_version": version("patchsweep"),
            "method": method,
            "direction": question.direction,
            "intervention": question.intervention.name,
            "provenance": model_provenance(question.bridge),
        },
    )


def _tokens(question: Question) -> dict[str, Any]:
    """The tokens of both runs, position by position; "" beyond a prompt's end."""
    tokenizer: Any = question.bridge.tokenizer
    runs = [base_and_source(pair, question.direction) for pair in question.pairs]
    width = max(len(base) for base, _ in runs)
    coords: dict[str, Any] = {"pos": np.arange(width)}
    for name, which in (("base_token", 0), ("source_token", 1)):
        table = [[tokenizer.decode([i]) for i in run[which]] for run in runs]
        coords[name] = (
            ("pair", "pos"),
            _strings([[*row, *[""] * (width - len(row))] for row in table]),
        )
    return coords


def _strings(values: Any) -> NDArray[Any]:
    return np.array(values, dtype=object)


def _name(steps: int | None) -> str:
    return "edge_eap" if steps is None else "edge_eap_ig"


def _chosen(nodes: Nodes, given: Sequence[EdgeLike]) -> list[Edge]:
    """The edges given, as far as their labels tell whether there are such edges."""
    if isinstance(given, str) or not given:
        raise PlanError(
            f"edges={given!r} is no list of edges; write [('a3.h2', 'a7.h1.q'), 'm5->logits']"
        )
    chosen = [nodes.edge(edge) for edge in given]
    names = [str(edge) for edge in chosen]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PlanError(f"edges names {twice} twice; name each edge once")
    return chosen


def _check_gradients(question: Question, steps: int | None) -> None:
    """Raise unless gradients say something about every metric.

    Raises:
        MethodError: with what to use in its place.
    """
    if steps is not None:
        quadrature(steps)
        if not question.intervention.from_source:
            raise MethodError(
                f"steps={steps} walks from the base prompt's embeddings to the source prompt's, "
                f"and intervention={question.intervention.name} has no source prompt; leave "
                "steps out, or use intervention=resample"
            )
    for metric in question.metrics:
        _check_metric(metric, steps)


def _check_metric(metric: Metric, steps: int | None) -> None:
    if not metric.smooth:
        raise MethodError(
            f"metric {metric.name} changes by jumps, so its gradient is zero or undefined; use "
            "logit_diff, or exact_edges"
        )
    if metric.flat_at_base and steps is None:
        raise MethodError(
            f"metric {metric.name} is smallest at the base run, where its gradient is zero, so "
            "every edge would get 0; use the metric logit_diff, or steps=5"
        )
    if not has_gradient(metric):
        raise MethodError(
            f"metric {metric.name} returns numbers that have no gradient; write it in torch "
            "operations that keep one (no argmax, item or detach), or use exact_edges"
        )
