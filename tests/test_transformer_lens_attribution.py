"""Attribution equals what TransformerLens's own attribution patching says of the same bridge."""

from __future__ import annotations

from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch
from subjects import demo_pairs, model
from torch import Tensor
from transformer_lens.tools.analysis.attribution_patching import (
    EdgeAttributionConfig,
    Node,
    attribution_patch,
)

READERS = {"q_input": "q", "k_input": "k", "v_input": "v"}


def by_transformer_lens(name: str, granularity: Any) -> Any:
    (pair,) = demo_pairs(name)

    def metric(logits: Tensor) -> Tensor:
        return logits[0, -1, pair.answer[0]] - logits[0, -1, pair.wrong_answer[0]]

    clean, corrupted = torch.tensor([pair.clean]), torch.tensor([pair.corrupted])
    config = EdgeAttributionConfig(granularity=granularity)
    return attribution_patch(model(name), clean, corrupted, metric, config)


def label(node: Node) -> str:
    """The name that edges have for one of TransformerLens's nodes."""
    if node.kind in READERS:
        return f"a{node.layer}.h{node.head}.{READERS[node.kind]}"
    if node.kind == "attn_head_out":
        return f"a{node.layer}.h{node.head}"
    return f"m{node.layer}" if node.kind.startswith("mlp") else node.kind


@pytest.mark.parametrize("name", ["tiny:gpt2", "tiny:llama", "smollm2-135m"])
def test_nodes_equal_transformer_lens(name: str) -> None:
    scores = by_transformer_lens(name, "node").node_scores
    ds = ps.sweep(model(name), demo_pairs(name), ["embed", "z", "mlp_out"], method="atp")
    variables = {"embed": "embed_atp", "attn_head_out": "z_atp", "mlp_out": "mlp_out_atp"}
    estimates = {name: ds[name].isel(metric=0, pair=0) for name in variables.values()}
    differences, sizes = [], []
    for node, expected in scores.items():
        at = {"pos": node.position, "layer": node.layer, "head": node.head}
        found = estimates[variables[node.kind]].sel({d: i for d, i in at.items() if i is not None})
        differences.append(float(found) - expected)
        sizes.append(abs(expected))
    assert len(sizes) == sum(one.size for one in estimates.values())
    assert max(sizes) > 1
    # scores of order 10; the two take gradients by passes of their own
    assert np.abs(differences).max() < 2e-5 * max(sizes)


def test_edges_by_position_equal_transformer_lens() -> None:
    name = "tiny:gpt2"  # it refuses grouped heads
    scores = by_transformer_lens(name, "edge").edge_scores
    found = ps.edges(model(name), demo_pairs(name), positions=True)["edge_eap"]
    found = found.isel(metric=0, pair=0)
    assert len(scores) == int(found.notnull().sum())
    largest = max(abs(score) for score in scores.values())
    assert largest > 0.5
    for (writer, reader), expected in scores.items():
        at = {"sender": label(writer), "reader": label(reader), "pos": reader.position}
        assert abs(float(found.sel(at)) - expected) < 2e-5 * largest, at
