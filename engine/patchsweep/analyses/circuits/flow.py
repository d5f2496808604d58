"""Information flow routes: how much of what is read at a place each component wrote there.

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

import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from patchsweep.analyses.circuits.edge_batch import (
    EdgeBatch,
    ExactBatches,
    Question,
    nodes_of,
    run_batches,
)
from patchsweep.analyses.stages import Computed, Stages


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
        first = 1 + layer * (nodes.n_heads + 1)
        heads, mlp = written[:, first : first + nodes.n_heads], written[:, first + nodes.n_heads]
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


def flow_scores(question: Question, level: str, stages: Stages) -> xr.DataArray:
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
    return xr.DataArray(found["scores"].values[0], dims=("pair", *dims))
