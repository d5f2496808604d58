"""Circuits that hold: bootstraps equal a plain loop, folds hold out what they score, BH too."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import patchsweep as ps
import pytest
import xarray as xr
from patchsweep.analyses.circuits.selection import rank_top, strength_of
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import PlanError
from subjects import model

NAME = "tiny:gpt2"


def pairs(n: int = 6) -> PromptPairs:
    names = ["John", "Mary", "Paul", "Anna", "Tom", "Lucy", "James", "Emma"]
    made = [(names[i], names[(i + 1 + i // 4) % 8]) for i in range(n)]
    return PromptPairs.from_strings(
        model(NAME),
        clean=[f"When {a} and {b} went to the shops {a} gave a bottle to" for a, b in made],
        corrupted=[f"When {a} and {b} went to the shops {b} gave a bottle to" for a, b in made],
        answers=[(f" {b}", f" {a}") for a, b in made],
    )


@pytest.fixture(scope="module")
def by_pair() -> xr.DataArray:
    return ps.circuit_scores(model(NAME), pairs(), method="eap", by_pair=True)


@pytest.mark.parametrize("level", ["nodes", "edges"])
@pytest.mark.parametrize("method", ["atp", "exact"])
def test_scores_by_pair_average_to_the_scores(level: Any, method: str) -> None:
    some = pairs(2)
    apart = ps.circuit_scores(model(NAME), some, level=level, method=method, by_pair=True)
    whole = ps.circuit_scores(model(NAME), some, level=level, method=method)
    assert apart.dims[0] == "pair"
    xr.testing.assert_allclose(apart.mean("pair", skipna=False), whole)
    one = ps.circuit_scores(model(NAME), some[1:2], level=level, method=method)
    np.testing.assert_allclose(apart.values[1], one.values, atol=1e-4)


@pytest.mark.parametrize("rank_by", ["size", "signed"])
def test_bootstraps_equal_a_plain_loop(by_pair: xr.DataArray, rank_by: Any) -> None:
    sizes = [0.01, 40, 0.5, 1.0]
    ds = ps.bootstrap_circuit(by_pair, sizes=sizes, rank_by=rank_by, n_resamples=70, seed=3)
    counts = ds["count"].values

    def circuits(weights: np.ndarray) -> list[np.ndarray]:
        means = np.einsum("p,psr->sr", weights / weights.sum(), by_pair.values)
        ranks = rank_top(strength_of(means, rank_by))
        return [(ranks >= 0) & (ranks < n) for n in counts]

    rng = np.random.default_rng(3)
    whole = circuits(np.ones(6))
    share, jaccard = np.zeros_like(ds["share"].values), []
    draws = [*rng.multinomial(6, [1 / 6] * 6, size=64), *rng.multinomial(6, [1 / 6] * 6, size=6)]
    for draw in draws:
        drawn = circuits(draw)
        share += np.array(drawn) / len(draws)
        jaccard.append([(a & b).sum() / (a | b).sum() for a, b in zip(drawn, whole, strict=True)])
    known = ~np.isnan(by_pair.values[0])
    np.testing.assert_allclose(ds["share"].values[:, known], share[:, known], atol=1e-6)
    assert np.isnan(ds["share"].values[:, ~known]).all()
    np.testing.assert_allclose(ds["jaccard"].values, np.array(jaccard).T, atol=1e-6)
    assert (ds["jaccard"].values[-1] == 1).all()
    assert 0.2 < ds["jaccard"].values[1].mean() < 0.99


def test_ties_go_to_the_earlier_edge() -> None:
    scores = xr.DataArray(np.ones((3, 5)), dims=("pair", "node"))
    ds = ps.bootstrap_circuit(scores, sizes=[2], n_resamples=4)
    assert ds["share"].values.tolist() == [[1, 1, 0, 0, 0]]


def test_resamples_cost_little_beside_seventy_thousand_edges() -> None:
    values = np.random.default_rng(0).normal(size=(16, 70_651)).astype(np.float32)
    scores = xr.DataArray(values, dims=("pair", "node"))
    ps.bootstrap_circuit(scores, n_resamples=2)
    began = time.process_time()
    ps.bootstrap_circuit(scores, n_resamples=100)
    took = time.process_time() - began
    began = time.process_time()
    for draw in values[:3]:
        rank_top(draw)
    assert took / 100 < (time.process_time() - began) / 3  # less than one sort each


def test_held_out_pairs_do_not_choose(by_pair: xr.DataArray) -> None:
    some, sizes = pairs(), [20, 0.2, 1.0]
    ds = ps.cross_validate_circuit(model(NAME), some, by_pair, folds=3, sizes=sizes)
    assert sorted(np.bincount(ds["fold"].values)) == [2, 2, 2]
    whole = ps.circuit(model(NAME), some, scores=by_pair.mean("pair"), sizes=sizes)
    np.testing.assert_allclose(ds["in_sample"].values, whole["faithfulness"].values[0], atol=1e-5)
    kept, base, empty = [], [], []
    for fold in range(3):
        inside = ds["fold"].values == fold
        for i in np.flatnonzero(inside):
            own = ps.circuit(
                model(NAME), some[i : i + 1], scores=by_pair[~inside].mean("pair"), sizes=sizes
            )
            kept.append(own["circuit_metric"].values[0, 0])
            base.append(own["base_metric"].item())
            empty.append(own["empty_metric"].item())
    wanted = (np.mean(kept, axis=0) - np.mean(empty)) / (np.mean(base) - np.mean(empty))
    np.testing.assert_allclose(ds["held_out"].values, wanted, atol=1e-4)
    assert ds["held_out"].values[-1] == pytest.approx(1, abs=1e-4)
    assert not np.allclose(ds["held_out"].values[:2], ds["in_sample"].values[:2], atol=1e-3)
    assert ds.attrs["chosen_size"] in ds["size"].values
    assert ds.attrs["held_out_cmd"] >= 0


def test_the_chosen_size_is_the_smallest_within_one_standard_error() -> None:
    scores = ps.circuit_scores(model(NAME), pairs(4), level="nodes", method="atp", by_pair=True)
    ds = ps.cross_validate_circuit(
        model(NAME), pairs(4), scores, folds=4, level="nodes", sizes=[2, 5, 10, 1.0],
        ablation="mean",
    )  # fmt: skip
    distance = np.abs(1 - ds["held_out_fold"].values[:, :-1])  # without the whole model
    best = distance.mean(0).argmin()
    limit = distance.mean(0)[best] + distance[:, best].std(ddof=1) / 2
    first = next(i for i in range(3) if distance.mean(0)[i] <= limit)
    assert ds.attrs["chosen_size"] == ds["size"].values[first]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: ps.bootstrap_circuit(s.mean("pair")), "by_pair=True"),
        (lambda s: ps.bootstrap_circuit(s[:1]), "scores are of 1 pair"),
        (lambda s: ps.bootstrap_circuit(s, n_resamples=0), "n_resamples=0"),
        (lambda s: ps.bootstrap_circuit(s, rank_by="best"), "rank_by='best'"),
        (lambda s: ps.bootstrap_circuit(s, sizes=[0]), "size 0 is neither"),
        (lambda s: ps.bootstrap_circuit(s.rename(sender="source")), "want node, or sender, reader"),
        (lambda s: ps.bootstrap_circuit(s.where(s.pair > 0)), "NaN for some of the pairs"),
        (lambda s: ps.cross_validate_circuit(model(NAME), pairs(3), s), "scores are of 6 pairs"),
        (lambda s: ps.cross_validate_circuit(model(NAME), pairs(), s, folds=7), "folds=7"),
    ],
)
def test_mistakes_end_before_anything_runs(by_pair: xr.DataArray, call: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        call(by_pair.assign_coords(pair=range(6)))
