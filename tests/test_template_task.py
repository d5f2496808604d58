"""Tasks from the user's templates, and pairs that the model answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import patchsweep as ps
import pytest
from patchsweep.errors import PromptError
from patchsweep.store.attributes import attributes
from patchsweep.tasks import check_pairs, keep_answered, load_task, template_task
from patchsweep.tasks.base import Task
from subjects import model

NAMES = ["John", "Mary", "Anna", "Paul"]
DRINKS: dict[str, Any] = {
    "clean": "When {A} and {B} went to the {place}, {A} gave a drink to",
    "corrupted": "When {A} and {B} went to the {place}, {B} gave a drink to",
    "answer": " {B}",
    "wrong_answer": " {A}",
    "slots": {"A": NAMES, "B": NAMES, "place": ["store", "park"]},
}


def drinks(**other: Any) -> Task:
    return template_task("drinks", **{**DRINKS, **other})


def test_slots_are_filled_swapped_and_labelled() -> None:
    records = drinks().records(24, seed=1)
    assert len(set(records)) == 24  # 4 * 3 * 2: every combination
    for record in records:
        assert isinstance(record.clean, str)
        words = record.clean.replace(",", "").split()
        a, b, place = words[1], words[3], words[7]
        assert a != b
        assert {a, b} <= {*NAMES}
        assert place in ("store", "park")
        assert record.corrupted == record.clean.replace(f", {a} gave", f", {b} gave")
        assert (record.answer, record.wrong_answer) == (f" {b}", f" {a}")
        spans = {name: record.clean[at.start : at.stop] for name, at in record.labels.items()}  # type: ignore[union-attr]
        assert spans == {"A": a, "B": b, "place": place, "A_2": a}
    assert drinks().records(5, seed=1) == records[:5]
    assert drinks().records(5, seed=2) != records[:5]


def test_rows_fill_several_slots_together() -> None:
    rows = [("France", "Paris"), ("Italy", "Rome"), ("Japan", "Tokyo")]
    task = template_task(
        "capitals",
        clean="The capital of {country} is",
        corrupted="The capital of {other} is",
        answer=" {capital}",
        wrong_answer=" {other_capital}",
        slots={("country", "capital"): rows, ("other", "other_capital"): rows},
    )
    assert task.labels == ("country",)
    known = dict(rows)
    for record in task.records(6):
        country, other = (str(x).split()[3] for x in (record.clean, record.corrupted))
        assert country != other
        assert record.answer == f" {known[country]}"
        assert record.wrong_answer == f" {known[other]}"


def test_pairs_sweep_at_their_labels_and_the_store_says_how_they_were_made() -> None:
    bridge = model("tiny:llama")
    pairs = load_task(bridge, drinks(), n_pairs=3, seed=4)
    ds = ps.sweep(bridge, pairs, "resid_pre", positions=["A", "A_2", "end"])
    assert np.isfinite(ds["resid_pre"]).all()
    (origin,) = attributes(ds)["pairs_origin"]
    assert origin.startswith("task drinks: 'When {A} and {B} went")
    assert origin.endswith("; seed 4")
    lens = ps.lens(bridge, pairs[:1])
    assert attributes(lens)["pairs_origin"] == [origin]


def test_origin_does_not_part_runs(tmp_path: Any) -> None:
    bridge = model("tiny:llama")
    pairs = load_task(bridge, drinks(), n_pairs=2)
    first = ps.sweep(bridge, pairs, "resid_pre", store=str(tmp_path / "a.zarr"))
    same = ps.PromptPairs(pairs.pairs)
    assert same == pairs
    again = ps.sweep(bridge, same, "resid_pre", store=str(tmp_path / "a.zarr"))
    np.testing.assert_array_equal(first["resid_pre"], again["resid_pre"])


def test_pairs_that_the_model_fails_are_dropped_and_counted() -> None:
    bridge = model("tiny:llama")
    pairs = load_task(bridge, drinks(), n_pairs=8)
    answers = check_pairs(bridge, pairs).answers
    ranks = np.array([one.right_rank for one in answers]).reshape(-1, 2)  # clean, corrupted
    for both in (True, False):
        worst = ranks.max(axis=1) if both else ranks[:, 0]
        limit = int(np.median(worst))
        kept = keep_answered(bridge, pairs, rank=limit, both=both)
        assert [*kept] == [pair for pair, rank in zip(pairs, worst, strict=True) if rank <= limit]
        assert 0 < len(kept) < len(pairs)
        assert kept.origin[0] == pairs.origin[0]
        assert kept.origin[1].startswith(f"{len(kept)} of 8 pairs kept: rank {limit} or better")
    with pytest.raises(PromptError, match=r"none of 8 pairs .*; allow a larger rank"):
        keep_answered(bridge, pairs, rank=0)
    with pytest.raises(PromptError, match="rank=-1"):
        keep_answered(bridge, pairs, rank=-1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"answer": " {C}"}, r"answer=' \{C\}' names the slot 'C'.*the slots are A, B, place"),
        ({"slots": {**DRINKS["slots"], "C": NAMES}}, "no template uses the slot 'C'"),
        ({"slots": {**DRINKS["slots"], "A": ["John"], "B": ["John"]}}, "share a list of 1 entries"),
        ({"slots": {**DRINKS["slots"], "place": "store"}}, "slot 'place' must have a list"),
        (
            {"slots": {**DRINKS["slots"], "place": [3]}},
            "of slot 'place' must be a text, got 3",
        ),
        ({"slots": []}, r"slots=\[\] must map slots to lists"),
        ({"clean": "When {A and"}, "is no template"),
        ({"clean": ""}, "clean must be a text"),
    ],
)
def test_bad_templates_are_refused_before_a_draw(other: dict[str, Any], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        drinks(**other)
