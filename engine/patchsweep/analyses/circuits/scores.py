"""Scores by which circuits rank nodes and edges."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.edge_batch import ask, nodes_of
from patchsweep.analyses.circuits.edges import edges, exact_edges
from patchsweep.analyses.circuits.flow import flow_scores
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.stages import Stages
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
from patchsweep.sweeps.layout import strings

Level = Literal["nodes", "edges"]
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
    if name == "ifr":
        spec = SweepSpec(metrics=metric, direction="noising", intervention="zero", read=read)
        scores = flow_scores(ask(model, pairs, spec), level, stages)
        scores = scores.assign_coords(_labels(nodes_of(model), level))
    elif level == "nodes":
        scores = _node_scores(model, pairs, metric, method, ablation, read, stages)
    else:
        scores = _edge_scores(model, pairs, metric, method, name, ablation, read, stages)
    scores = scores.assign_attrs(method=name)
    return scores if by_pair else scores.mean("pair", skipna=False, keep_attrs=True)


def _edge_scores(
    model: TransformerBridge,
    pairs: PromptPairs,
    metric: MetricLike,
    method: str | Method,
    name: str,
    ablation: Ablation,
    read: int,
    stages: Stages,
) -> xr.DataArray:
    if name == "exact":
        return _exact_scores(model, pairs, metric, ablation, read, stages)
    along: dict[str, Any] = {}
    if name == "eap_ig":
        path = _path(method)
        along = {"steps": path.steps, "rule": path.rule, "rtol": path.rtol}
    elif name in RULES:
        along = {"rules": name}
    ds = edges(
        model, pairs, metric, direction="noising", intervention=ablation, read=read,
        stages=stages, **along,
    )  # fmt: skip
    return _edge_array(ds["sender"].values, ds["reader"].values, ds[f"edge_{name}"].values[0])


def score_values(scores: xr.DataArray, nodes: Nodes, level: Level) -> NDArray[np.float32]:
    """Return `scores` in the order of the model's nodes or edges, NaN where there is no edge.

    Scores by pair are averaged.

    Raises:
        PlanError: the scores belong to another level or model, or one is missing.
    """
    labels = {dim: names.tolist() for dim, names in _labels(nodes, level).items()}
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


def _node_scores(
    model: TransformerBridge,
    pairs: PromptPairs,
    metric: MetricLike,
    method: str | Method,
    ablation: Ablation,
    read: int,
    stages: Stages,
) -> xr.DataArray:
    ds = stages.sweep(
        "scores",
        model,
        pairs,
        ["z", "mlp_out"],
        metric,
        direction="noising",
        intervention=ablation,
        positions="all",
        read=read,
        method=method,
    )
    stages.wait()
    effects = {}
    for site in ("z", "mlp_out"):
        if site in ds:
            effect = ds[site] - ds["base_metric"]
        else:
            effect = ds[variable_name(site, method_name("nodes", method))]
        effects[site] = effect.isel(metric=0).transpose("pair", ...).values
    by_layer = np.concatenate([effects["z"], effects["mlp_out"][..., None]], axis=-1)
    values = by_layer.reshape(len(by_layer), -1)
    return xr.DataArray(values, dims=("pair", "node"), coords=_labels(nodes_of(model), "nodes"))


def _exact_scores(
    model: TransformerBridge,
    pairs: PromptPairs,
    metric: MetricLike,
    ablation: Ablation,
    read: int,
    stages: Stages,
) -> xr.DataArray:
    ds = exact_edges(
        model, pairs, "all", metric, direction="noising", intervention=ablation, read=read,
        stages=stages,
    )  # fmt: skip
    values = (ds["edge"] - ds["base_metric"]).values[0]
    return _edge_array(ds["sender"].values, ds["reader"].values, values)


def _edge_array(senders: Any, readers: Any, values: Any) -> xr.DataArray:
    return xr.DataArray(
        values,
        dims=("pair", "sender", "reader"),
        coords={"sender": strings(senders), "reader": strings(readers)},
    )


def _labels(nodes: Nodes, level: Level) -> dict[str, NDArray[Any]]:
    """Return the names of all nodes, or of senders and readers."""
    senders = strings([str(sender) for sender in nodes.senders])
    if level == "nodes":
        return {"node": senders[1:]}
    return {"sender": senders, "reader": strings([str(reader) for reader in nodes.readers])}
