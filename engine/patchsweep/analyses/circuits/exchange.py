"""Circuit files of other tools: the layouts of MIB, EAP-IG and auto-circuit, read and written.

| suffix | layout |
|---|---|
| `.json` | the MIB benchmark's circuit track (arXiv 2504.13151) and EAP-IG's `Graph.to_json` |
| `.pt` | EAP-IG's `Graph.to_pt` |
| `.pkl` | auto-circuit's prune scores: module name -> tensor, pickled |

MIB and EAP-IG score a loss, which is minus the metric, so their scores have the opposite sign of
those here. auto-circuit has no convention; its scores count as theirs do: high is important.
All three give every query head keys and values of its own; `patchsweep.ungrouped` gives a model
with grouped heads the same.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.edge_batch import blocks_and_nodes, nodes_of
from patchsweep.analyses.circuits.nodes import Nodes, Reader
from patchsweep.analyses.circuits.results import labels_of
from patchsweep.analyses.circuits.scores import score_values
from patchsweep.analyses.circuits.selection import rank_top
from patchsweep.arguments import check_bridge, user_path, whole_number
from patchsweep.errors import ConfigError, ModelError, PlanError
from patchsweep.forward.grad import frozen
from patchsweep.models.running import runs_model

SUFFIXES = (".json", ".pt", ".pkl")


@dataclass(frozen=True)
class _File:
    """A circuit file in this package's order of senders and readers."""

    score: NDArray[np.float32]  # [sender, reader] effect of ablation; NaN: no such edge
    member: NDArray[np.bool_]  # [sender, reader]
    node_score: NDArray[np.float32] | None = None  # [node], senders without embed; NaN: not scored
    node_member: NDArray[np.bool_] | None = None  # [node]


def read_circuit(model: TransformerBridge, path: str | Path) -> xr.Dataset:
    """Return the scores and the circuit of a file as a Dataset; see the module for the layouts.

    `score` [sender, reader] is the effect on the metric of ablating an edge (the sign of the file
    turned round), `member` [sender, reader] whether the file's circuit holds it; edges that the
    file leaves out score 0. Files with scores of nodes also give `node_score` and `node_member`
    [node], NaN for a node without a score. `circuit(scores=ds["score"])` takes the scores;
    `circuit(scores=-ds["member"].astype(float), sizes=[n])` runs the file's n edges.

    Raises:
        PlanError: the file names a component or an edge that the model does not have, or its
            configuration is another model's.
        ModelError: heads of the model share keys and values.
        ConfigError: the file cannot be read, or has another layout.
    """
    nodes = _nodes(model)
    file = _checked(path, exists=True)
    if file.suffix == ".json":
        found = _from_mib(_json(file), nodes, int(model.cfg.d_model), file.name)
    elif file.suffix == ".pt":
        found = _from_eap_ig(_tensors(file), nodes, int(model.cfg.d_model), file.name)
    else:
        found = _from_auto_circuit(_tensors(file), nodes, file.name)
    values: dict[str, Any] = {
        "score": (("sender", "reader"), found.score, {"long_name": "effect of ablation"}),
        "member": (("sender", "reader"), found.member),
    }
    coords = labels_of(nodes, "edges")
    if found.node_score is not None:
        values["node_score"] = ("node", found.node_score)
        values["node_member"] = ("node", found.node_member)
        coords |= labels_of(nodes, "nodes")
    return xr.Dataset(values, coords=coords, attrs={"kind": "circuit file", "file": file.name})


@runs_model
def write_circuit(
    model: TransformerBridge,
    scores: xr.DataArray | xr.Dataset,
    path: str | Path,
    *,
    count: int | None = None,
) -> None:
    """Write scores, and the circuit of `count` nodes or edges, in the layout of `path`'s suffix.

    Args:
        scores: what `circuit_scores` or `circuit` returns, of nodes or edges. The circuit holds
            the first `count` by `rank` of a `circuit`, else by |score|.
        count: default: no node or edge is marked as a member.

    Raises:
        PlanError: the scores are of another model, or `count` is more than there are.
        ModelError: heads of the model share keys and values.
        ConfigError: the suffix has no layout, or it holds no scores of nodes.
    """
    _nodes(model)
    file = _checked(path)
    given = scores["score"] if isinstance(scores, xr.Dataset) else scores
    level = "edges" if isinstance(given, xr.DataArray) and "sender" in given.dims else "nodes"
    if level == "nodes" and file.suffix == ".pkl":
        raise ConfigError(f"{file.name}: auto-circuit's files hold edges alone; write .json or .pt")
    with frozen(model):
        _, nodes = blocks_and_nodes(model)
    values = score_values(given, nodes, level)  # type: ignore[arg-type]
    ranks = rank_top(np.abs(values))
    if isinstance(scores, xr.Dataset) and "rank" in scores:
        order = {dim: names.tolist() for dim, names in labels_of(nodes, level).items()}
        ranks = scores["rank"].sel(order).transpose(*order).values
    n = int((ranks >= 0).sum())
    if count is not None:
        whole_number("count", count, least=1, most=n)
    member = (ranks >= 0) & (ranks < (count or 0))
    if level == "edges":
        made = _File(values, member)
    else:
        edges, _ = _nothing(nodes)
        kept = np.concatenate([[True], member])[:, None] & nodes.possible
        made = _File(edges, kept & (count is not None), values, member)
    d_model = int(model.cfg.d_model)
    if file.suffix == ".json":
        file.write_text(json.dumps(_to_mib(made, nodes, d_model)), encoding="utf-8")
    elif file.suffix == ".pt":
        torch.save(_to_eap_ig(made, nodes, d_model), file)
    else:
        file.write_bytes(pickle.dumps(_to_auto_circuit(made, nodes)))


def _nodes(model: TransformerBridge) -> Nodes:
    check_bridge(model)
    nodes = nodes_of(model)
    if nodes.n_heads != nodes.n_kv_heads:
        raise ModelError(
            f"{nodes.n_heads} heads of {model.cfg.model_name} share {nodes.n_kv_heads} keys and "
            "values, and circuit files name those of each query head; score and read with "
            "patchsweep.ungrouped(model)"
        )
    return nodes


def _checked(path: str | Path, *, exists: bool = False) -> Path:
    if not isinstance(path, str | Path):
        raise ConfigError(f"path={path!r} must be the path of a circuit file")
    file = user_path(path)
    if file.suffix not in SUFFIXES:
        raise ConfigError(f"{file.name}: circuit files end with {', '.join(SUFFIXES)}")
    if exists and not file.is_file():
        raise ConfigError(f"circuit file {file} does not exist")
    if not exists and not file.parent.is_dir():
        raise ConfigError(f"folder {file.parent} does not exist; make it first")
    return file


def _name_of(reader: Reader) -> str:
    """Return MIB's name: `a3.h2<q>`, `m5` or `logits`."""
    if reader.head is None:
        return str(reader)
    return f"a{reader.layer}.h{reader.head}<{reader.kind}>"


def _senders(nodes: Nodes) -> dict[str, int]:
    """Return MIB's names of senders; embed is its input."""
    return {"input" if i == 0 else str(x): i for i, x in enumerate(nodes.senders)}


def _nothing(nodes: Nodes) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return scores of 0, NaN where there is no edge, and no members."""
    score = np.where(nodes.possible, np.float32(0), np.float32(np.nan))
    return score, np.zeros(score.shape, dtype=bool)


def _check_config(cfg: Any, nodes: Nodes, d_model: int, name: str) -> None:
    own = {"n_layers": nodes.n_layers, "n_heads": nodes.n_heads, "d_model": d_model}
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{name} has no cfg, so it is no circuit file of MIB or EAP-IG")
    for key, value in own.items():
        if key in cfg and cfg[key] != value:
            raise PlanError(
                f"{name} is of a model with {key}={cfg[key]!r}, and this one has {value}; give "
                "the file's own model"
            )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"circuit file {file.name} is no JSON: {error}") from error


def _from_mib(data: Any, nodes: Nodes, d_model: int, name: str) -> _File:
    if not (isinstance(data, Mapping) and all(key in data for key in ("cfg", "nodes", "edges"))):
        raise ConfigError(f"{name} lacks cfg, nodes or edges, so it is no circuit file of MIB")
    _check_config(data["cfg"], nodes, d_model, name)
    senders = _senders(nodes)
    readers = {_name_of(reader): i for i, reader in enumerate(nodes.readers)}
    score, member = _nothing(nodes)
    for edge, entry in data["edges"].items():
        sender, _, reader = edge.partition("->")
        for part, known in ((sender, senders), (reader, readers)):
            if part not in known:
                raise PlanError(
                    f"{name}: edge {edge!r} names {part!r}, which this model does not have"
                )
        at = senders[sender], readers[reader]
        if not nodes.possible[at]:
            raise PlanError(f"{name}: edge {edge!r} goes backwards: {reader} reads before {sender}")
        score[at] = -_score(entry, edge, name, default=0.0)
        member[at] = _in_graph(entry)
    node_score = np.full(len(nodes.senders) - 1, np.nan, np.float32)
    node_member = np.zeros(len(node_score), dtype=bool)
    for node, entry in data["nodes"].items():
        if node not in senders and node != "logits":
            raise PlanError(f"{name}: node {node!r} is none of this model")
        if node in ("input", "logits"):
            continue
        i = senders[node] - 1
        node_score[i] = -_score(entry, node, name, default=float("nan"))
        node_member[i] = _in_graph(entry)
    if np.isnan(node_score).all():
        return _File(score, member)
    return _File(score, member, node_score, node_member)


def _score(entry: Any, what: str, name: str, *, default: float) -> float:
    value = entry.get("score", default) if isinstance(entry, Mapping) else default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}: score of {what} is {value!r}, and must be a number")
    return float(value)


def _in_graph(entry: Any) -> bool:
    return bool(entry.get("in_graph", False) if isinstance(entry, Mapping) else entry)


def _config(nodes: Nodes, d_model: int) -> dict[str, Any]:
    return {
        "n_layers": nodes.n_layers,
        "n_heads": nodes.n_heads,
        "parallel_attn_mlp": any(nodes.parallel),
        "d_model": d_model,
    }


def _nodes_in_graph(made: _File, nodes: Nodes) -> NDArray[np.bool_]:
    """Return per sender whether the circuit has it: an edge comes in and one goes out."""
    if made.node_member is not None:
        return np.concatenate([[bool(made.member.any())], made.node_member])
    into = nodes.entered(made.member)
    into[0] = True
    return into & np.asarray(made.member.any(axis=1))


def _to_mib(made: _File, nodes: Nodes, d_model: int) -> dict[str, Any]:
    kept = _nodes_in_graph(made, nodes)
    names = list(_senders(nodes))
    found: dict[str, dict[str, Any]] = {
        name: {"in_graph": bool(inside)} for name, inside in zip(names, kept, strict=True)
    }
    if made.node_score is not None:
        for name, score in zip(names[1:], made.node_score, strict=True):
            found[name]["score"] = -float(score)
    found["logits"] = {"in_graph": True}
    edges = {
        f"{names[i]}->{_name_of(nodes.readers[j])}": {
            "score": 0.0 - float(made.score[i, j]),
            "in_graph": bool(made.member[i, j]),
        }
        for i, j in np.argwhere(nodes.possible)
    }
    return {"cfg": _config(nodes, d_model), "nodes": found, "edges": edges}


def _tensors(file: Path) -> Any:
    """Return the object in a file of `torch.save` or of pickle, of tensors and plain data alone."""
    own_format = zipfile.is_zipfile(file)  # of torch.save; pickle.dump writes no archive
    try:
        if own_format or file.suffix == ".pt":
            return torch.load(file, map_location="cpu", weights_only=True)
        with file.open("rb") as opened:
            return _Plain(opened).load()
    except Exception as error:  # unpicklers raise anything
        raise ConfigError(f"circuit file {file.name} is no pickle of tensors: {error}") from error


class _Plain(pickle.Unpickler):
    """Unpickles tensors, numbers, texts and containers; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return what rebuilds a tensor."""
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return torch._utils._rebuild_tensor_v2
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, *_: data
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no tensor")


def _from_eap_ig(data: Any, nodes: Nodes, d_model: int, name: str) -> _File:
    keys = ("cfg", "src_nodes", "dst_nodes", "edges_scores", "edges_in_graph")
    if not (isinstance(data, Mapping) and all(key in data for key in keys)):
        raise ConfigError(f"{name} lacks one of {', '.join(keys)}, so it is no file of EAP-IG")
    _check_config(data["cfg"], nodes, d_model, name)
    senders = _senders(nodes)
    readers = {_name_of(reader): i for i, reader in enumerate(nodes.readers)}
    rows, columns = (
        _indices(data[key], known, name)
        for key, known in (("src_nodes", senders), ("dst_nodes", readers))
    )
    score, member = _nothing(nodes)
    given = np.asarray(data["edges_scores"], dtype=np.float32)
    if given.shape != (len(rows), len(columns)):
        raise ConfigError(
            f"{name}: edges_scores has the shape {given.shape}, and its names are "
            f"{len(rows)} by {len(columns)}"
        )
    score[np.ix_(rows, columns)] = -given + 0.0
    member[np.ix_(rows, columns)] = np.asarray(data["edges_in_graph"], dtype=bool)
    score = np.where(nodes.possible, score, np.float32(np.nan))
    member &= nodes.possible
    if data.get("nodes_scores") is None:
        return _File(score, member)
    node_score = np.full(len(senders), np.nan, np.float32)
    node_member = np.zeros(len(senders), dtype=bool)
    node_score[rows] = -np.asarray(data["nodes_scores"], dtype=np.float32)
    node_member[rows] = np.asarray(data["nodes_in_graph"], dtype=bool)
    return _File(score, member, node_score[1:], node_member[1:])


def _indices(given: Any, known: Mapping[str, int], name: str) -> list[int]:
    for component in given:
        if component not in known:
            raise PlanError(f"{name} names {component!r}, which this model does not have")
    return [known[component] for component in given]


def _to_eap_ig(made: _File, nodes: Nodes, d_model: int) -> dict[str, Any]:
    data = {
        "cfg": _config(nodes, d_model),
        "src_nodes": list(_senders(nodes)),
        "dst_nodes": [_name_of(reader) for reader in nodes.readers],
        "edges_scores": torch.from_numpy(np.nan_to_num(-made.score)),
        "edges_in_graph": torch.from_numpy(made.member),
        "nodes_in_graph": torch.from_numpy(_nodes_in_graph(made, nodes)),
    }
    if made.node_score is not None:
        scores = np.concatenate([[np.float32(np.nan)], -made.node_score])
        data["nodes_scores"] = torch.from_numpy(scores.astype(np.float32))
    return data


def _modules(nodes: Nodes) -> dict[str, list[int]]:
    """Return auto-circuit's module -> its readers, in order of heads."""
    found: dict[str, list[int]] = {}
    for i, reader in enumerate(nodes.readers):
        module = (
            f"blocks.{reader.layer}.hook_{reader.kind}_{'in' if reader.kind == 'mlp' else 'input'}"
        )
        if reader.kind == "logits":
            module = f"blocks.{nodes.n_layers - 1}.hook_resid_post"
        found.setdefault(module, []).append(i)
    return found


def _from_auto_circuit(data: Any, nodes: Nodes, name: str) -> _File:
    if not (isinstance(data, Mapping) and all(isinstance(x, torch.Tensor) for x in data.values())):
        raise ConfigError(
            f"{name} is no mapping of module names to tensors, as auto-circuit writes"
        )
    modules = _modules(nodes)
    score, member = _nothing(nodes)
    for module, tensor in data.items():
        if module not in modules:
            more = (
                "; its heads read q, k and v together: make the patchable model with "
                "separate_qkv=True"
                if str(module).endswith("hook_attn_in")
                else ""
            )
            raise PlanError(f"{name} names {module!r}, which this model does not have{more}")
        readers = modules[module]
        n_seen = nodes.n_seen(nodes.readers[readers[0]])
        wanted = (n_seen,) if len(readers) == 1 else (len(readers), n_seen)
        if tuple(tensor.shape) not in {wanted, (len(readers), n_seen)}:
            raise PlanError(
                f"{name}: {module} has scores of the shape {tuple(tensor.shape)}, and this model "
                f"wants {wanted}, heads by senders; scores by position have no place here"
            )
        score[:n_seen, readers] = -tensor.reshape(len(readers), n_seen).float().numpy().T + 0.0
    return _File(score, member)


def _to_auto_circuit(made: _File, nodes: Nodes) -> dict[str, torch.Tensor]:
    data = {}
    for module, readers in _modules(nodes).items():
        n_seen = nodes.n_seen(nodes.readers[readers[0]])
        values = torch.from_numpy(-made.score[:n_seen, readers].T)
        data[module] = values[0].clone() if len(readers) == 1 else values.clone()
    return data
