"""Edges that the caller named, and their exact runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from patchsweep.analyses.circuits.edge_batch import EdgeBatch, ExactBatches, Question, run_batches
from patchsweep.analyses.circuits.edge_dataset import edge_dataset
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, EdgeLike, Nodes
from patchsweep.analyses.stages import Computed, Stages
from patchsweep.errors import PlanError
from patchsweep.sweeps.layout import strings

ENDS = ("edge_sender", "edge_reader")  # coordinates of the ends


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


def run_chosen(
    question: Question, chosen: Sequence[Edge], attrs: Mapping[str, Any], stages: Stages
) -> xr.Dataset:
    """Run `chosen` exactly: `edge` [metric, pair, chosen], in this order."""

    def run(edge_batch: EdgeBatch) -> Computed:
        checked = [edge_batch.nodes.edge(edge) for edge in chosen]  # parallel blocks have fewer
        return edge_batch.computed("exact", exact(edge_batch, checked).cpu().numpy())

    names = list(map(str, chosen))
    found = run_batches(
        stages,
        "exact",
        ExactBatches(question),
        {"exact": {"chosen": len(chosen)}},
        run,
        {**attrs, "chosen": names},
    )
    stages.wait()
    positions = chosen[0].pos is not None
    ends = ([getattr(edge, name) for edge in chosen] for name in ("sender", "reader"))
    coords: dict[str, Any] = {
        name: ("chosen", strings([str(end) for end in column]))
        for name, column in zip(ENDS, ends, strict=True)
    }
    if positions:
        coords["edge_pos"] = ("chosen", np.array([edge.pos for edge in chosen]))
    words = {"long_name": "metric with one edge patched"}
    more = {"method": "exact", "positions": positions}
    return edge_dataset(question, "edge", found, "exact", coords, words, more)
