"""Compiled programs: the models answer as Tracr's do, and methods are graded by their circuits."""

from __future__ import annotations

from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import torch

from tools.known_circuits.grade import (
    EDGE_METHODS,
    auroc,
    grade,
    model_of,
    outputs_of,
    pairs_of,
)
from tools.known_circuits.load import EPS, names, read, true_edges

TEN = (
    "shift_1", "shift_1_1", "next_letter", "fraction_a", "balance",
    "same_as_previous", "count_a", "bigram", "is_repeated", "copies_or",
)  # fmt: skip


def test_there_are_forty_and_more() -> None:
    assert len(names()) >= 40
    assert set(TEN) <= set(names())


def test_true_edges_of_small_programs_are_those_one_reads_off() -> None:
    # the token one back, by one head
    heads = {reader.partition(".v")[0] for _, reader in true_edges(read("shift_1"))} - {"logits"}
    assert len(heads) == 1
    (head,) = heads
    assert true_edges(read("shift_1")) == {("embed", f"{head}.v"), (head, "logits")}
    # each token's image, by one MLP
    (mlp,) = {reader for _, reader in true_edges(read("next_letter"))} - {"logits"}
    assert true_edges(read("next_letter")) == {("embed", mlp), (mlp, "logits")}


@pytest.mark.parametrize("name", TEN)
def test_models_answer_as_compiled_and_methods_find_the_circuit(name: str) -> None:
    of = read(name)
    model = model_of(of)
    answers = outputs_of(of, model, of.about["prompts"])
    wanted = np.array(of.about["answers"])
    np.testing.assert_allclose(answers[:, 1:], wanted[:, 1:], atol=1e-5)
    assert np.ptp(wanted[:, 1:], axis=(0, 1)).max() > 0.1
    found = grade(of, model, node_methods=(), n_pairs=8)
    assert found.truth_faithfulness == pytest.approx(1, abs=2e-3)
    assert set(found.edges) == set(EDGE_METHODS)
    if not found.unseen:
        assert found.edges["exact"][0] == 1
        assert found.edges["exact"][1] == pytest.approx(1, abs=2e-3)
    assert max(score for score, _ in found.edges.values()) >= 0.99
    assert found.edges["ifr"][0] < 0.9  # it knows neither the metric nor q, k and v apart


def test_copies_hide_from_single_edges_and_not_from_joint_ones() -> None:
    """Two heads carry the same token to an "or": where it is true, one of them is enough."""
    of = read("copies_or")
    model = model_of(of)
    pairs = pairs_of(of, model)
    pairs = ps.PromptPairs(tuple(pair for pair in pairs if pair.answer_text == " =True"))
    exact = ps.circuit_scores(model, pairs, method="exact")
    heads = sorted(edge for edge in true_edges(of) if edge[0].startswith("a"))
    assert len(heads) == 2
    alone = [abs(float(exact.sel(sender=s, reader=r))) for s, r in heads]
    assert max(alone) < 1e-4
    assert abs(joint(model, pairs, heads) - joint(model, pairs, [])) > 0.5


def joint(model: Any, pairs: ps.PromptPairs, removed: list[tuple[str, str]]) -> float:
    """The mean metric with these edges ablated together, and all others kept."""
    scores = ps.circuit_scores(model, pairs, method="eap")
    keep = -scores.where(scores.isnull(), 1.0)
    for sender, reader in removed:
        keep.loc[{"sender": sender, "reader": reader}] = 0
    n = int(scores.notnull().sum())
    size = (n - len(removed)) / n
    ds = ps.circuit(model, pairs, scores=keep, sizes=[size])
    return float(ds["circuit_metric"].values[0, :, 0].mean())


def test_auroc_counts_pairs() -> None:
    rng = np.random.default_rng(0)
    size, truth = rng.integers(0, 4, 40).astype(float), rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in size[truth] for b in size[~truth]]
    assert auroc(size, truth.astype(float)) == pytest.approx(np.mean(pairs))


def test_norms_are_harmless() -> None:
    model = model_of(read("balance"))
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([read_ids("balance")]))
    stream = cache["blocks.0.hook_resid_pre"]
    normed = cache["blocks.0.ln1.hook_normalized"] * EPS**0.5  # before the norm's weight
    torch.testing.assert_close(normed, stream, atol=1e-4, rtol=1e-4)


def read_ids(name: str) -> list[int]:
    about = read(name).about
    return [about["inputs"][token] for token in ("BOS", *about["prompts"][0])]
