"""Scores by which circuits rank nodes and edges.

Scores of the method `ifr` are information flow routes: how much of what is read at a place each
component wrote there,

    importance(x -> y) = proximity(x, y) / sum over parts x' of proximity(x', y)
    proximity(x, y)    = max(|y|_1 - |y - x|_1, 0)

for the parts x that a vector y is the sum of (Ferrando and Voita, arXiv 2403.00824). Only the
clean run counts: no metric, no ablated value. The importance of an edge takes y = the reader's
input stream and x = the senders' writes, as the MIB benchmark does, so that q, k and v of all heads
of a layer share one importance per sender. The importance of a node is local: its share of the
stream right behind it, whose parts are the stream before it and what its layer adds. Both are
means over positions, between 0 and 1.
"""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.edge_batch import (
    EdgeBatch,
    ExactBatches,
    Question,
    ask,
    nodes_of,
    run_batches,
)
from patchsweep.analyses.circuits.edges import edges, exact_edges
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.circuits.results import labels_of
from patchsweep.analyses.circuits.selection import Level
from patchsweep.analyses.stages import Computed, Stages
from patchsweep.arguments import one_of, true_or_false
from patchsweep.attribution import RULES, IntegratedInputs, Method, get_methods
from patchsweep.attribution.quadrature import Path, settings_of
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError
from patchsweep.models.running import runs_model
from patchsweep.spec.interventions import Intervention, ValueFn, get_intervention
from patchsweep.spec.reference import MeansFrom, with_reference
from patchsweep.spec.spec import MetricLike, SweepSpec
from patchsweep.sweeps.estimates import variable_name
from patchsweep.sweeps.identity import method_identity

Ablation = str | Intervention | float | Tensor | ValueFn

# steps of the EAP-IG path for method="eap_ig", as in its authors' code
IG_STEPS = 5
# method -> its name for edges
_OF_EDGES = {
    "atp": "eap",
    "eap": "eap",
    "ig_inputs": "eap_ig",
    "eap_ig": "eap_ig",
    "relp": "relp",
    "gim": "gim",
    "ifr": "ifr",
    "exact": "exact",
}


def method_name(level: Level, method: str | Method) -> str:
    """Return the name of the method in results.

    Raises:
        MethodError: nodes or edges do not support the method.
        PlanError: `level` is unknown.
    """
    one_of("level", level, get_args(Level), error=PlanError)
    if not isinstance(method, str | Method):
        raise MethodError(f"method={method!r} must be a method or its name, such as 'atp'")
    if level == "nodes":
        if method == "screen":
            raise MethodError(
                "method=screen leaves most nodes without an exact effect; use method=exact or "
                "method=atp"
            )
        return method if isinstance(method, str) else method.name
    if isinstance(method, IntegratedInputs):
        return "eap_ig"
    name = method if isinstance(method, str) else method.name
    if name not in _OF_EDGES:
        raise MethodError(
            f"method={name} does not score edges; use eap, eap_ig, relp, gim, ifr or exact, or "
            "level=nodes"
        )
    return _OF_EDGES[name]


def method_settings(level: Level, method: str | Method) -> dict[str, Any]:
    """Return the method and its settings for the results' identity.

    Raises:
        MethodError: nodes or edges do not support the method.
    """
    name = method_name(level, method)
    if name == "eap_ig":
        path = settings_of(_path(method))
        return {name: {"n_steps": path.pop("steps"), **path}}
    if level == "edges" or name in ("exact", "ifr"):
        return {name: {}}
    return {name: method_identity(get_methods([method])[0])}


def _path(method: str | Method) -> Path:
    """Return the path of EAP-IG; its authors' number of steps for `eap_ig`."""
    if method == "eap_ig":
        return Path(IG_STEPS)
    return (method if isinstance(method, IntegratedInputs) else IntegratedInputs()).path


@runs_model
def circuit_scores(
    model: TransformerBridge,
    pairs: PromptPairs,
    metric: MetricLike = "logit_diff",
    *,
    level: Level = "edges",
    method: str | Method = "atp",
    ablation: Ablation = "resample",
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    by_pair: bool = False,
    stages: Stages | None = None,
) -> xr.DataArray:
    """Return scores [node] or [sender, reader], signed, in the metric's unit.

    A score is the mean effect over `pairs` on the metric of ablating the node or edge in the
    clean run, estimated or exact; NaN where there is no edge. With `by_pair` there is a first dim
    `pair`, which `bootstrap_circuit` and `cross_validate_circuit` take. Other arguments are those
    of `circuit`.
    """
    true_or_false("by_pair", by_pair)
    stages = Stages.of(stages)
    name = method_name(level, method)
    ablation = with_reference(get_intervention(ablation), means_from, model)
    of_all: dict[str, Any] = {"direction": "noising", "intervention": ablation, "read": read}
    if name == "ifr":
        values = flow_scores(ask(model, pairs, metric, "noising", "zero", read), level, stages)
    elif level == "nodes":
        ds = stages.sweep(
            "scores", model, pairs, ["z", "mlp_out"], metric,
            positions="all", method=method, **of_all,
        )  # fmt: skip
        stages.wait()
        values = _node_values(ds, name)
    elif name == "exact":
        ds = exact_edges(model, pairs, "all", metric, stages=stages, **of_all)
        values = (ds["edge"] - ds["base_metric"]).values[0]
    else:
        if name == "eap_ig":
            path = _path(method)
            of_all |= {"steps": path.steps, "rule": path.rule, "rtol": path.rtol}
        elif name in RULES:
            of_all["rules"] = name
        ds = edges(model, pairs, metric, stages=stages, **of_all)
        values = ds[f"edge_{name}"].values[0]
    labels = labels_of(nodes_of(model), level)
    scores = xr.DataArray(values, labels, ("pair", *labels), attrs={"method": name})
    return scores if by_pair else scores.mean("pair", skipna=False, keep_attrs=True)


def score_values(scores: xr.DataArray, nodes: Nodes, level: Level) -> NDArray[np.float32]:
    """Return `scores` in the order of the model's nodes or edges, NaN where there is no edge.

    Scores by pair are averaged.

    Raises:
        PlanError: the scores belong to another level or model, or one is missing.
    """
    labels = {dim: names.tolist() for dim, names in labels_of(nodes, level).items()}
    if not isinstance(scores, xr.DataArray):
        raise PlanError(f"scores={scores!r} must be what circuit_scores gives, a DataArray")
    if "pair" in scores.dims:
        scores = scores.mean("pair", skipna=False)
    if set(scores.dims) != set(labels):
        raise PlanError(
            f"scores have the dims {', '.join(map(str, scores.dims))}, and circuits of {level} "
            f"want {', '.join(labels)}; take them from circuit_scores"
        )
    for dim, names in labels.items():
        if sorted(map(str, scores[dim].values)) != sorted(names):
            raise PlanError(
                f"scores name other {dim}s than this model has; take them from circuit_scores "
                "with the same model"
            )
    values = scores.sel(labels).transpose(*labels).values.astype(np.float32)
    if level == "edges":
        values = np.where(nodes.possible, values, np.float32(np.nan))
    missing = int(np.isnan(values).sum() - (level == "edges") * (~nodes.possible).sum())
    if missing:
        raise PlanError(f"{missing} of the scores of {level} are NaN; give each a number")
    return values


def described_scores(scores: xr.DataArray) -> dict[str, Any]:
    """Return what identifies given scores."""
    labels = {str(dim): list(map(str, scores[dim].values)) for dim in scores.dims}
    return {"values": scores.values, "labels": labels}


def _node_values(ds: xr.Dataset, method: str) -> NDArray[np.float32]:
    """Return the effects [pair, node] of a sweep of all heads and MLPs."""
    effects = {}
    for site in ("z", "mlp_out"):
        effect = ds[site] - ds["base_metric"] if site in ds else ds[variable_name(site, method)]
        effects[site] = effect.isel(metric=0).transpose("pair", ...).values
    by_layer = np.concatenate([effects["z"], effects["mlp_out"][..., None]], axis=-1)
    values: NDArray[np.float32] = by_layer.reshape(len(by_layer), -1)
    return values


def importance(
    parts: Float[Tensor, "pair part pos d"], whole: Float[Tensor, "pair pos d"]
) -> Float[Tensor, "pair part pos"]:
    """Return the importance of each part for `whole`; 0 where no part is near it."""
    whole = whole.unsqueeze(1)
    size = whole.abs().sum(dim=-1)
    near = torch.stack(
        [size[:, 0] - (whole[:, 0] - part).abs().sum(dim=-1) for part in parts.unbind(1)], dim=1
    ).clamp_min(0)
    total = near.sum(dim=1, keepdim=True)
    return torch.where(total > 0, near / total.clamp_min(torch.finfo(near.dtype).tiny), 0.0)


@torch.no_grad()
def flow_of_edges(removed: EdgeBatch) -> Float[Tensor, "pair sender reader"]:
    """Return the importance of every edge; 0 where there is none.

    `removed` holds the clean run, and zeros for all senders.
    """
    nodes, base = removed.nodes, removed.base
    written = -removed.writes()
    found = written.new_zeros(len(written), len(nodes.senders), len(nodes.readers))
    for layer in range(nodes.n_layers + 1):
        readers = nodes.of_layer(layer)
        stream = base.resid[layer].float()
        n_seen = nodes.n_seen(nodes.readers[readers.start])
        each = importance(written[:, :n_seen], stream).mean(dim=-1).unsqueeze(-1)
        found[:, :n_seen, readers] = each
        if layer < nodes.n_layers and not nodes.parallel[layer]:
            mlp = readers.stop - 1
            n_seen = nodes.n_seen(nodes.readers[mlp])
            between = base.resid[layer + 1].float() - written[:, n_seen]
            found[:, :n_seen, mlp] = importance(written[:, :n_seen], between).mean(dim=-1)
    return found


@torch.no_grad()
def flow_of_nodes(removed: EdgeBatch) -> Float[Tensor, "pair node"]:
    """Return the importance of every node, the senders without embed; see `flow_of_edges`."""
    nodes, base = removed.nodes, removed.base
    written = -removed.writes()
    parts = []
    for layer in range(nodes.n_layers):
        heads, mlp = written[:, nodes.heads(layer)], written[:, nodes.heads(layer).stop]
        before, after = (base.resid[i].float() for i in (layer, layer + 1))
        own = [heads]
        if nodes.parallel[layer]:
            own = [torch.cat([heads, mlp.unsqueeze(1)], dim=1)]
        between = after if nodes.parallel[layer] else after - mlp
        all_parts = torch.cat([*own, before.unsqueeze(1)], dim=1)
        parts.append(importance(all_parts, between)[:, :-1].mean(dim=-1))
        if not nodes.parallel[layer]:
            both = torch.stack([mlp, between], dim=1)
            parts.append(importance(both, after)[:, :1].mean(dim=-1))
    return torch.cat(parts, dim=1)


def flow_scores(question: Question, level: str, stages: Stages) -> NDArray[np.float32]:
    """Return minus the importance [pair, node] or [pair, sender, reader] on the clean prompts.

    The sign is that of other scores: the lowest is what the metric needs most.
    `question` has the intervention zero.
    """
    nodes = nodes_of(question.bridge)
    dims = {"node": len(nodes.senders) - 1}
    if level == "edges":
        dims = {"sender": len(nodes.senders), "reader": len(nodes.readers)}
    flow = flow_of_nodes if level == "nodes" else flow_of_edges

    def compute(removed: EdgeBatch) -> Computed:
        values = -flow(removed)
        if level == "edges":
            possible = torch.from_numpy(removed.nodes.possible).to(values.device)
            values = values.masked_fill(~possible, float("nan"))
        n_metrics = len(question.metrics)
        return removed.computed("scores", values.expand(n_metrics, *values.shape).cpu().numpy())

    batches = ExactBatches(question)
    found = run_batches(stages, "scores", batches, {"scores": dims}, compute, {"method": "ifr"})
    stages.wait()
    values: NDArray[np.float32] = found["scores"].values[0]
    return values
