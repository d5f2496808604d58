"""Datasets of edges: the coordinates and attributes that all of them share."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from patchsweep.analyses.circuits.edge_batch import Question
from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.data.tokenize import token_table
from patchsweep.spec.batch import base_and_source
from patchsweep.spec.spec import model_shape
from patchsweep.store.attributes import flat_attributes
from patchsweep.sweeps.layout import strings


def edge_dataset(
    question: Question,
    name: str,
    found: xr.Dataset,
    stage: str,
    coords: dict[str, Any],
    words: dict[str, str],
    attrs: dict[str, Any],
) -> xr.Dataset:
    """Return the values of a stage as the variable `name`, with the coordinates of the results."""
    return xr.Dataset(
        {
            name: (found[stage].dims, found[stage].values, words),
            "base_metric": (("metric", "pair"), found["base_metric"].values),
            "source_metric": (("metric", "pair"), found["source_metric"].values),
        },
        coords={
            "metric": strings([metric.name for metric in question.metrics]),
            "metric_unit": ("metric", strings([metric.unit for metric in question.metrics])),
            "pair": np.arange(len(question.pairs)),
            "answer": ("pair", strings([pair.answer_text for pair in question.pairs])),
            "wrong_answer": ("pair", strings([pair.wrong_answer_text for pair in question.pairs])),
            **_tokens(question),
            **coords,
        },
        attrs=flat_attributes(
            {
                **attrs,
                "direction": question.direction,
                "intervention": question.intervention.name,
                **question.means_attrs(),
                "read": question.read,
                "n_heads": model_shape(question.bridge).n_heads,
                "n_kv_heads": model_shape(question.bridge).n_kv_heads,
            }
        ),
    )


def _tokens(question: Question) -> dict[str, Any]:
    """Return the tokens of both runs by position; "" beyond a prompt's end."""
    runs = [base_and_source(pair, question.direction) for pair in question.pairs]
    base, source = (token_table(question.bridge, side) for side in zip(*runs, strict=True))
    return {
        "pos": np.arange(base.shape[1]),
        "base_token": (("pair", "pos"), base),
        "source_token": (("pair", "pos"), source),
    }


def node_coords(nodes: Nodes) -> dict[str, Any]:
    """Return the coordinates of the axes `sender` and `reader`."""
    return {
        "sender": strings([str(sender) for sender in nodes.senders]),
        "reader": strings([str(reader) for reader in nodes.readers]),
        "sender_layer": ("sender", [sender.layer for sender in nodes.senders]),
        "reader_layer": ("reader", [reader.layer for reader in nodes.readers]),
    }


def length_of(question: Question) -> int:
    """Return the number of positions of the longest pair, including forced answer tokens."""
    return max(len(base_and_source(pair, question.direction)[0]) for pair in question.pairs)
