"""Two hundred bad inputs and more: each is told in words, before anything runs or is written."""

from __future__ import annotations

import pytest
from bad_inputs import COMMAND, PAGE, Bad, World, read_cases, row
from patchsweep import errors

CASES = read_cases()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world").resolve())


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: bad.call)
def test_bad_input_is_told(
    world: World, bad: Bad, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PATCHSWEEP_DEBUG", raising=False)
    answer = world.answer(bad)
    assert answer.error == bad.error, answer.message
    for words in bad.words:
        assert words in answer.message
    assert answer.n_forwards == 0, "a part of the model ran"
    assert answer.changed == ()
    if bad.error == COMMAND:
        assert "\n" not in answer.message
    assert row(bad, answer) in PAGE.read_text(encoding="utf-8"), "run: python tests/bad_inputs.py"


def test_bad_inputs_are_many_and_each_is_one() -> None:
    assert len(CASES) > 200
    assert len({bad.call for bad in CASES}) == len(CASES)
    known = {name for name in vars(errors) if name.endswith("Error")} | {COMMAND, "UnfitPair"}
    assert {bad.error for bad in CASES} <= known
    assert all(bad.words for bad in CASES)
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("\n| `") == len(CASES)


def test_words_are_no_trivial_part_of_a_message() -> None:
    assert not [bad.call for bad in CASES if sum(map(len, bad.words)) < 12]
