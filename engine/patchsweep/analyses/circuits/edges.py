"""`edges`, `exact_edges` and `screen_edges`: effects of edges as xarray Datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.adaptive_edges import check_edge_tolerance
from patchsweep.analyses.circuits.eap import EapBatches, check_gradients, eap
from patchsweep.analyses.circuits.edge_batch import (
    EdgeBatch,
    ExactBatches,
    Question,
    ask,
    nodes_of,
    run_batches,
)
from patchsweep.analyses.circuits.every_edge import every_edge
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, EdgeLike, Nodes
from patchsweep.analyses.circuits.results import edge_dataset, length_of, node_coords
from patchsweep.analyses.stages import Computed, Stages
from patchsweep.analyses.thresholds import tolerance_words
from patchsweep.arguments import one_of, true_or_false, whole_number
from patchsweep.attribution import RULES
from patchsweep.attribution.estimates import Work
from patchsweep.attribution.quadrature import Path, Rule, Steps, path_of, settings_of
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError
from patchsweep.models.running import runs_model
from patchsweep.spec.finite import check_references
from patchsweep.spec.interventions import Direction, Intervention, ValueFn
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import MetricLike, SweepSpec
from patchsweep.sweeps.identity import question_settings
from patchsweep.sweeps.layout import strings

Values = NDArray[np.float32]

ALL = "all"
ENDS = ("edge_sender", "edge_reader")  # coordinates of the ends of chosen edges
# variable of the stage -> the ending of its name in results, and what it is
_VARIABLES = {
    "estimates": ("", "estimate of metric(patched) - metric(base) of an edge"),
    "error": ("_error", "how far the integral of {} may be from converged"),
    "residual": (
        "_residual",
        "what {} of the embeddings adds up to, minus metric(source) - metric(base)",
    ),
    "nodes": ("_nodes", "number of gradients in the integral of {}"),
}


@runs_model
def edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    intervention: str | Intervention | float | Tensor | ValueFn = SweepSpec.intervention,
    steps: Steps | None = None,
    rule: Rule = Path.rule,
    rtol: float = Path.rtol,
    rules: str | None = None,
    positions: bool = False,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Return the edge attribution of every edge: `edge_eap` [metric, pair, sender, reader(, pos)].

    Values are signed estimates of metric(patched) - metric(base), in the metric's unit, NaN
    where there is no such edge; `base_metric` and `source_metric` are [metric, pair]. Senders are
    named embed, a3.h2 (head 2 of layer 3) and m5 (the MLP of layer 5); readers a7.h1.q, a7.h1.k
    and a7.h1.v (for k and v the key-value head), m5 and logits.

    A norm after attention (Gemma 2 and 3) is linearised at the base run. A sender's edges sum
    over all readers to its attribution patching estimate (site z, mlp_out, or the first block's
    input).

    Args:
        steps: number of nodes between the base and the source prompt's embeddings over which to
            average gradients, which gives `edge_eap_ig`. It is complete only at the embeddings:
            the path of the gradients is not that of other senders' changes. `edge_eap_ig_error`
            states how far each integral may be from converged, `edge_eap_ig_residual`
            [metric, pair] what the edges of the embeddings add up to minus the true difference of
            the two prompts, `edge_eap_ig_nodes` the number of nodes. "auto" adds nodes to a pair
            until no error is above `rtol` times its largest score.
        rule: "gauss", or "left": the left Riemann sum of the EAP-IG package, which converges
            slowly; for comparison with published numbers.
        rtol: see `steps`.
        rules: relp or gim: the rules of that method's backward pass, which give `edge_relp` or
            `edge_gim` (see `patchsweep.attribution`); not with `steps`.
        positions: keep the position at which an edge is written and read.
        means_from: as in `patchsweep.sweep`.
        stages: as in `screen_edges`.

    Raises:
        PatchsweepError: an argument breaks a rule; the text states the rule and a remedy.
        MethodError: gradients cannot attribute the metric, or the stream is not a sum of parts.
    """
    question = ask(model, pairs, metrics, direction, intervention, read, means_from)
    path = path_of(steps, rule, rtol)
    check_gradients(question, path)
    if rules is not None:
        one_of("rules", rules, sorted(RULES), error=MethodError)
        if path is not None:
            raise MethodError(f"rules={rules} take one gradient at the base run; leave steps out")
    true_or_false("positions", positions)
    stages = Stages.of(stages)
    settings = {**question_settings(question), **settings_of(path), "positions": positions}
    if rules is not None:
        settings["rules"] = rules
    return stages.analysis(
        "edges", model, pairs, settings, lambda: _edges(question, path, rules, positions, stages)
    )


@runs_model
def exact_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    edges: Sequence[EdgeLike] | Literal["all"],
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    intervention: str | Intervention | float | Tensor | ValueFn = SweepSpec.intervention,
    positions: bool = False,
    tolerance: float | str | None = SweepSpec.tolerance,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Run exact patches of `edges`: `edge` [metric, pair, chosen(, pos)], the raw patched metric.

    Only the reader's input changes, by what the sender's change adds to the stream, at all
    positions; the run then continues. The coordinates `edge_sender` and `edge_reader` name the
    ends; `edge - base_metric` compares with the estimates of `edges`.

    An edge may have a position: `("a3.h2", "a7.h1.q", 16)` or `"m5->logits@16"` change the
    reader's input only at that position, and the coordinate `edge_pos` holds it.

    `edges="all"` runs every edge: `edge` is [metric, pair, sender, reader(, pos)] then, NaN where
    there is no such edge. Edges that are proved dead are not run; `edge_dead`
    [pair, sender, reader(, pos)] says why, and the attribute `dead` counts them.

    Args:
        positions: run every edge at every single position; NaN beyond a pair's length.
        tolerance: with `edges="all"`: run what an edge changes noticeably and take the rest from
            the base run's gradient, as in `patchsweep.sweep`. A sample that is run both ways keeps
            to it; `edge_linear` is the part of each effect from the gradient,
            `edge_token_layers` what ran for it.
        means_from: as in `patchsweep.sweep`.
        stages: as in `screen_edges`.

    Raises:
        PlanError: `edges` is empty, names an edge that does not exist or names one twice, or only
            some of its edges have a position.
        ConfigError: there is a tolerance without `edges="all"`, or it is no positive number.
        PatchsweepError: another argument breaks a rule.
    """
    question = ask(model, pairs, metrics, direction, intervention, read, means_from)
    true_or_false("positions", positions)
    stages = Stages.of(stages)
    every = isinstance(edges, str) and edges == ALL
    check_edge_tolerance(question, tolerance, every, "edges='all'")
    if every:
        own = {"edges": ALL, "positions": positions, **tolerance_words(tolerance)}
        return stages.analysis(
            "edges", model, pairs, {**question_settings(question), **own},
            lambda: _every(question, positions, tolerance, stages),
        )  # fmt: skip
    parsed = chosen_edges(nodes_of(model), edges, length_of(question))
    if positions and parsed[0].pos is not None:
        raise PlanError(
            f"edge {edges[0]!r} has a position of its own, and positions=True runs each edge at "
            "every position; leave one of them out"
        )

    def compute() -> xr.Dataset:
        if not positions:
            return run_chosen(question, parsed, stages)
        n_pos = length_of(question)
        at_positions = [replace(edge, pos=pos) for edge in parsed for pos in range(n_pos)]
        flat = run_chosen(question, at_positions, stages)
        ends = {name: ("chosen", flat[name].values[::n_pos]) for name in ENDS}
        dims = ("metric", "pair", "chosen", "pos")
        values = flat["edge"].values.reshape(*flat["base_metric"].shape, len(parsed), -1)
        return (
            flat.drop_dims("chosen")
            .assign_coords(ends)
            .assign(edge=(dims, values, flat["edge"].attrs))
            .assign_attrs(positions=True)
        )

    own = {"edges": list(map(str, parsed)), "positions": positions}
    return stages.analysis("edges", model, pairs, {**question_settings(question), **own}, compute)


@runs_model
def screen_edges(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    top: int | Literal["all"] = 200,
    direction: Direction | None = SweepSpec.direction,
    intervention: str | Intervention | float | Tensor | ValueFn = SweepSpec.intervention,
    steps: Steps | None = None,
    rule: Rule = Path.rule,
    rtol: float = Path.rtol,
    positions: bool = False,
    tolerance: float | str | None = SweepSpec.tolerance,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Rank all edges by estimates and run the top-k exactly.

    The rank is by mean |estimate| over pairs for the first metric; ties go to the earlier edge.
    The Dataset holds `edge_eap` of all edges (see `edges`), `edge` of the `top` edges in rank order
    (see `exact_edges`), and their `edge_estimate` [metric, pair, chosen].

    Args:
        top: how many are run; "all" runs every edge, and `edge` has the layout of
            `exact_edges(edges="all")`.
        steps, rule, rtol: as in `edges`.
        positions: rank and run edges at single positions, counted from the start; a pair too
            short for a position counts as 0. The coordinate `edge_pos` holds the positions.
        tolerance: with `top="all"`, as in `exact_edges`.
        config: config of the command line, kept in the provenance.
        means_from: as in `patchsweep.sweep`.
        stages: where and how the stages "estimates" and "exact" run, see
            `patchsweep.analyses.stages`. Default: in memory.

    Raises:
        PlanError: `top` is less than one or more than there are edges.
        ConfigError: there is a tolerance without `top="all"`, or it is no positive number.
        PatchsweepError: another argument breaks a rule.
    """
    question = ask(model, pairs, metrics, direction, intervention, read, means_from)
    path = path_of(steps, rule, rtol)
    check_gradients(question, path)
    nodes = nodes_of(model)
    most = nodes.n_edges * (length_of(question) if positions else 1)
    n_exact = most if top == ALL else whole_number("top", top, least=1, most=most)
    true_or_false("positions", positions)
    check_edge_tolerance(question, tolerance, top == ALL, "top='all'")
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        with stages.whole() if top == ALL else nullcontext():
            scores = _edges(question, path, None, positions, stages)
        name = _name(path)
        screen_attrs = {
            "method": f"screen:{scores.attrs['method']}",
            "positions": positions,
            "top": top,
            **settings_of(path),
        }
        of_all = {str(x): scores[x] for x in scores.data_vars if str(x).startswith(name)}
        if top == ALL:
            found = _every(question, positions, tolerance, stages, scores[name])
            return found.assign(of_all).assign_attrs(screen_attrs)
        values = scores[name].values
        ranked = _top_edges(values[0], n_exact)
        at = np.unravel_index(ranked, values.shape[2:])
        verified = run_chosen(question, nodes.edges_at(at), stages)
        dims = ("metric", "pair", "chosen")
        estimate = values.reshape(*values.shape[:2], -1)[:, :, ranked]
        estimates = {"edge_estimate": (dims, estimate), **of_all}
        return verified.assign(estimates).assign_attrs(screen_attrs)

    settings = {
        **question_settings(question),
        "positions": positions,
        "top": top,
        **tolerance_words(tolerance),
        **settings_of(path),
    }
    return stages.analysis("edges", model, pairs, settings, compute, config)


def _every(
    question: Question,
    positions: bool,
    tolerance: float | str | None,
    stages: Stages,
    estimates: xr.DataArray | None = None,
) -> xr.Dataset:
    """Return `every_edge`; `estimates` of all edges, if they are known."""
    if tolerance is None:
        return every_edge(question, positions, stages)
    if estimates is None:
        with stages.whole():
            estimates = _edges(question, None, None, positions, stages)["edge_eap"]
    return every_edge(question, positions, stages, (tolerance, estimates.values))


def _top_edges(scores: Values, top: int) -> NDArray[np.intp]:
    """Return flat indices of the `top` edges by mean |score| over pairs, the first axis."""
    known = np.isfinite(scores).any(axis=0)
    mean = np.nansum(np.abs(scores), axis=0, dtype=np.float64) / len(scores)
    strength = np.where(known, mean, -1.0)
    # parallel blocks may leave fewer than `top` edges; the stable sort gives ties to the earlier
    # edge on every machine
    return np.argsort(-strength, axis=None, kind="stable")[: min(top, int(known.sum()))]


def _edges(
    question: Question, path: Path | None, rules: str | None, positions: bool, stages: Stages
) -> xr.Dataset:
    batches = EapBatches(question)
    nodes = nodes_of(question.bridge)
    dims = {"sender": len(nodes.senders), "reader": len(nodes.readers)}
    if positions:
        dims["pos"] = length_of(question)
    shapes: dict[str, dict[str, int]] = {"estimates": dims}
    if path is not None:
        shapes |= {"error": dims, "residual": {}, "nodes": {}}

    def estimate(work: Work) -> Computed:
        got = eap(batches.model, work, path, rules=rules, positions=positions)
        values = {"estimates": got.scores.cpu().numpy()}
        if path is not None:
            values["error"] = got.errors.cpu().numpy()
            values["residual"] = got.residual.cpu().numpy()
            values["nodes"] = np.broadcast_to(got.nodes, got.residual.shape).astype(np.float32)
        references = check_references(
            *work.references(got.base_logits), work.batch.pairs, question.metrics
        )
        return values, np.stack(references)

    found = run_batches(stages, "estimates", batches, shapes, estimate)
    stages.wait()
    name = _name(path, rules)
    more = {"method": name[5:], "positions": positions, **settings_of(path)}
    variables = {}
    for key in shapes:
        ending, text = _VARIABLES[key]
        variables[name + ending] = (found[key].dims, found[key].values, text.format(name))
    return edge_dataset(question, variables, found, node_coords(nodes), more)


def _name(path: Path | None, rules: str | None = None) -> str:
    if rules is not None:
        return f"edge_{rules}"
    return "edge_eap" if path is None else "edge_eap_ig"


def chosen_edges(nodes: Nodes, given: Sequence[EdgeLike], length: int) -> list[Edge]:
    """Return the checked edges; edges of parallel blocks are checked later, when they are known."""
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise PlanError(
            f"edges={given!r} is no list of edges; write [('a3.h2', 'a7.h1.q'), 'm5->logits'], "
            "or 'all'"
        )
    parsed = [nodes.edge(edge) for edge in given]
    twice, count = Counter(map(str, parsed)).most_common(1)[0]
    if count > 1:
        raise PlanError(f"edges names {twice} twice; name each edge once")
    if len({edge.pos is None for edge in parsed}) > 1:
        raise PlanError(
            "some edges have a position and others have none; give all of them one, or none"
        )
    late = next((edge for edge in parsed if edge.pos is not None and edge.pos >= length), None)
    if late is not None:
        raise PlanError(
            f"edge {late}: the longest prompt has {length} tokens; use positions 0..{length - 1}"
        )
    return parsed


def run_chosen(question: Question, chosen: Sequence[Edge], stages: Stages) -> xr.Dataset:
    """Run `chosen` exactly: `edge` [metric, pair, chosen], in this order."""

    def run(edge_batch: EdgeBatch) -> Computed:
        checked = [edge_batch.nodes.edge(edge) for edge in chosen]  # parallel blocks have fewer
        return edge_batch.computed("exact", exact(edge_batch, checked).cpu().numpy())

    attrs = {"chosen": [*map(str, chosen)]}
    dims = {"exact": {"chosen": len(chosen)}}
    found = run_batches(stages, "exact", ExactBatches(question), dims, run, attrs)
    stages.wait()
    positions = chosen[0].pos is not None
    coords: dict[str, Any] = {
        "edge_sender": ("chosen", strings([str(edge.sender) for edge in chosen])),
        "edge_reader": ("chosen", strings([str(edge.reader) for edge in chosen])),
    }
    if positions:
        coords["edge_pos"] = ("chosen", np.array([edge.pos for edge in chosen]))
    edge = (found["exact"].dims, found["exact"].values, "metric with one edge patched")
    more = {"method": "exact", "positions": positions}
    return edge_dataset(question, {"edge": edge}, found, coords, more)
