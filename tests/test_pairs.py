"""Prompt pairs: what is refused, with which words, and where labels land."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from patchsweep.data.pairs import CharSpan, PromptPairs, PromptRecord, UnfitPair
from patchsweep.data.tokenize import char_ranges, char_ranges_by_prefix, token_ids
from patchsweep.errors import PromptError
from transformer_lens.model_bridge import TransformerBridge

CLEAN = "When John and Mary went to the shops, John gave the bag to"
CORRUPTED = "When John and Mary went to the shops, Mary gave the bag to"
DEMO = PromptRecord(CLEAN, CORRUPTED, " Mary", " John")


class SpaceBefore:
    """Stands in for a model with a slow tokenizer that puts a space before every text."""

    cfg = SimpleNamespace(n_ctx=64, tokenizer_prepends_bos=True)
    original_model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64))
    is_fast = False
    bos_token_id, eos_token_id = 0, None

    def __init__(self) -> None:
        self.vocabulary = ["<s>"]
        self.tokenizer = self

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        ids = [0]
        for piece in re.findall(r" ?\w+|\W", f" {text}"):
            if piece not in self.vocabulary:
                self.vocabulary.append(piece)
            ids.append(self.vocabulary.index(piece))
        return {"input_ids": ids}

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return ["".join(self.vocabulary[token] for token in row) for row in rows]


def one_pair(model: TransformerBridge, **changes: Any) -> PromptPairs:
    entry = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answer": " Mary",
        "wrong_answer": " John",
        **changes,
    }
    return PromptPairs.from_records(model, [PromptRecord(**entry)])


def write_jsonl(path: Path, *lines: Any) -> Path:
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answer": " Mary",
        "wrong_answer": " John",
    } | changes


def test_ids_and_strings_are_those_of_the_bridge(smollm2: TransformerBridge) -> None:
    pair = one_pair(smollm2)[0]
    assert list(pair.clean) == smollm2.to_tokens(CLEAN)[0].tolist()
    assert list(pair.corrupted) == smollm2.to_tokens(CORRUPTED)[0].tolist()
    assert list(pair.clean_tokens) == smollm2.to_str_tokens(CLEAN)
    assert list(pair.corrupted_tokens) == smollm2.to_str_tokens(CORRUPTED)
    assert pair.answer == (smollm2.to_single_token(" Mary"),)
    assert pair.wrong_answer == (smollm2.to_single_token(" John"),)
    assert (pair.answer_text, pair.wrong_answer_text) == (" Mary", " John")
    assert len(pair) == 15


def test_strings_records_and_jsonl_give_equal_pairs(
    smollm2: TransformerBridge, tmp_path: Path
) -> None:
    from_strings = PromptPairs.from_strings(
        smollm2,
        clean=[CLEAN],
        corrupted=[CORRUPTED],
        answers=[(" Mary", " John")],
        labels=[{"io": "Mary"}],
    )
    from_records = one_pair(smollm2, labels={"io": CharSpan(14, 18)})
    path = write_jsonl(tmp_path / "pairs.jsonl", entry(labels={"io": [4, 5]}), "", "  ")
    assert from_strings == from_records == PromptPairs.from_jsonl(smollm2, path)
    assert from_strings[0].labels == {"io": (4, 5)}


def test_pairs_are_a_sequence_grouped_by_length(smollm2: TransformerBridge) -> None:
    short = PromptRecord("John went to", "Mary went to", " school", " church")
    pairs = PromptPairs.from_records(smollm2, [DEMO, short, DEMO])
    assert len(pairs) == 3
    assert [len(pair) for pair in pairs] == [15, 4, 15]
    assert pairs.n_pos == 15
    assert list(pairs.by_length().items()) == [(4, (1,)), (15, (0, 2))]
    assert pairs[1:] == PromptPairs(pairs.pairs[1:])
    assert pairs[-1] is pairs.pairs[2]
    assert pickle.loads(pickle.dumps(pairs)) == pairs


def test_content_hash_changes_with_ids_answers_and_labels_only(
    smollm2: TransformerBridge,
) -> None:
    base = one_pair(smollm2).content_hash()
    assert base == one_pair(smollm2).content_hash()
    assert len(base) == 64
    changed = [
        one_pair(smollm2, clean=CLEAN.replace("bag", "book")),
        one_pair(smollm2, corrupted=CORRUPTED.replace("bag", "book")),
        one_pair(smollm2, answer=" Anna"),
        one_pair(smollm2, wrong_answer=" Anna"),
        one_pair(smollm2, labels={"io": "Mary"}),
        PromptPairs.from_records(smollm2, [DEMO, DEMO]),
    ]
    assert len({base, *(pairs.content_hash() for pairs in changed)}) == 7
    # this very text must not change between releases: stores are compared by it
    assert base == "702eaf3df8f02ad0608b2b3257ed558780a68a18b5bd2a84f2102dde9551c134"


@pytest.mark.parametrize(
    ("label", "tokens"),
    [
        ("Mary", [" Mary"]),
        (" Mary", [" Mary"]),
        ("Mary ", [" Mary"]),  # the space after it belongs to the next token
        ("John and Mary", [" John", " and", " Mary"]),
        ("shops,", [" shops", ","]),
        ("ary we", [" Mary", " went"]),
        ("When", ["When"]),
        (CharSpan(57, 58), [" to"]),
        (CharSpan(0, 58), None),
        ((0, 1), ["<|im_start|>"]),
        ((14, 15), [" to"]),
    ],
)
def test_label_lands_on_its_tokens(
    smollm2: TransformerBridge, label: Any, tokens: list[str] | None
) -> None:
    pair = one_pair(smollm2, labels={"here": label})[0]
    first, past_last = pair.labels["here"]
    expected = tuple(tokens) if tokens is not None else pair.clean_tokens[1:]
    assert pair.clean_tokens[first:past_last] == expected


@pytest.mark.parametrize("name", ["smollm2", "llama"])
@pytest.mark.parametrize(
    "text", [CLEAN, "In 1732, 12 + 34 =", "Zoë's café costs 5 €, naïve 日本!", "a\n\n  b  c"]
)
def test_character_ranges_without_offsets_equal_those_with(
    request: pytest.FixtureRequest, name: str, text: str
) -> None:
    model = request.getfixturevalue(name)
    ids = token_ids(model, text)
    by_offset, by_prefix = char_ranges(model, text, ids), char_ranges_by_prefix(model, text, ids)
    assert len(by_prefix) == len(ids)
    for (start, stop), (prefix_start, prefix_stop) in zip(by_offset, by_prefix, strict=True):
        # tokens that are bytes of one character: the first to the last of them span it
        assert prefix_stop == stop
        assert prefix_start == start or text[start:stop].strip().isascii() is False


def test_different_numbers_of_tokens_are_refused_with_both_lists(
    smollm2: TransformerBridge,
) -> None:
    with pytest.raises(PromptError) as caught:
        one_pair(smollm2, corrupted=CORRUPTED.replace("Mary gave", "Mary Ann gave"))
    message = str(caught.value)
    assert "same number of tokens" in message
    assert "clean has 15: ['<|im_start|>', 'When', ' John'" in message
    assert "corrupted has 16" in message
    assert "' Ann'" in message


def test_answer_of_several_tokens_is_refused_with_its_tokens(smollm2: TransformerBridge) -> None:
    with pytest.raises(PromptError, match=r"wrong_answer must be one token.*'thumb'.*multi_token"):
        one_pair(smollm2, wrong_answer=" Tomthumb")


def test_missing_leading_space_is_named(smollm2: TransformerBridge) -> None:
    answer = "Helsinki"  # one token only with its space
    assert len(token_ids(smollm2, answer, alone=True)) > 1
    with pytest.raises(PromptError, match="' Helsinki', with a leading space, is one token"):
        one_pair(smollm2, answer=answer)


def test_tokenizer_that_adds_a_space_and_has_no_offsets() -> None:
    model: Any = SpaceBefore()
    assert len(token_ids(model, " Mary", alone=True)) == 2  # " ", " Mary"
    pair = one_pair(model, labels={"io": "Mary", "end": CharSpan(57, 58)})[0]
    assert model.vocabulary[pair.answer[0]] == " Mary"
    assert len(pair.answer) == 1
    assert {name: pair.clean_tokens[a:b] for name, (a, b) in pair.labels.items()} == {
        "io": (" Mary",),
        "end": (" to",),
    }


def test_multi_token_answers_are_kept_whole_when_allowed(smollm2: TransformerBridge) -> None:
    record = PromptRecord(CLEAN, CORRUPTED, " Mary Ann Smith", " John")
    pair = PromptPairs.from_records(smollm2, [record], multi_token=True)[0]
    assert list(pair.answer) == smollm2.to_tokens(" Mary Ann Smith", prepend_bos=False)[0].tolist()
    assert len(pair.answer) == 3
    assert len(pair.wrong_answer) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"corrupted": CLEAN}, "clean and the corrupted prompt must differ"),
        ({"wrong_answer": " Mary"}, "answer and wrong_answer must differ"),
        ({"clean": ""}, "clean must be a text, got ''"),
        ({"answer": 3}, "answer must be a text, got 3"),
        ({"clean": "word " * 9000}, "may have 8192 tokens"),
        ({"labels": {"x": "Peter"}}, "'x' must be a substring.*'Peter' is not in"),
        ({"labels": {"x": ""}}, "'x' must be a substring"),
        ({"labels": {"x": "John"}}, "must occur once.*characters 5 and 38"),
        ({"labels": {"x": (3, 16)}}, r"first < past_last <= 15.*got \[3, 16\].*the tokens are"),
        ({"labels": {"x": (3, 3)}}, r"first < past_last <= 15.*got \[3, 3\]"),
        ({"labels": {"x": (-1, 3)}}, r"0 <= first.*got \[-1, 3\]"),
        ({"labels": {"x": CharSpan(50, 59)}}, "start < stop <= 58"),
        ({"labels": {"x": (1, True)}}, "'x' must be a substring.*or .first, past_last."),
        ({"labels": {"x": 4}}, "'x' must be a substring.*got 4"),
    ],
)
def test_bad_record_is_refused(
    smollm2: TransformerBridge, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PromptError, match=words) as caught:
        one_pair(smollm2, **changes)
    assert str(caught.value).startswith("pair 0: ")


def test_error_names_the_pair(smollm2: TransformerBridge) -> None:
    with pytest.raises(PromptError, match=r"^pair 1: "):
        PromptPairs.from_records(smollm2, [DEMO, PromptRecord("a", "a", " b", " c")])


def test_no_pair_is_refused(smollm2: TransformerBridge, tmp_path: Path) -> None:
    empty = write_jsonl(tmp_path / "empty.jsonl", "")
    for make in (
        lambda: PromptPairs(()),
        lambda: PromptPairs.from_records(smollm2, []),
        lambda: PromptPairs.from_strings(smollm2, [], [], []),
        lambda: PromptPairs.from_jsonl(smollm2, empty),
    ):
        with pytest.raises(PromptError, match="at least one prompt pair, got 0"):
            make()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clean": [CLEAN, CLEAN]}, "clean has 2, corrupted has 1, answers has 1"),
        ({"labels": []}, "answers has 1, labels has 0"),
        ({"clean": CLEAN}, "clean must be a list.*clean="),
        ({"answers": {" Mary": " John"}}, "answers must be a list"),
        ({"answers": [" Mary"]}, "right for clean, right for corrupted.*got ' Mary'"),
        ({"answers": [(" Mary", " John", " Anna")]}, "right for clean, right for corrupted"),
        ({"labels": ["John"]}, "labels must map names to places, got 'John'"),
    ],
)
def test_bad_lists_are_refused(
    smollm2: TransformerBridge, changes: dict[str, Any], words: str
) -> None:
    lists: dict[str, Any] = {
        "clean": [CLEAN],
        "corrupted": [CORRUPTED],
        "answers": [(" Mary", " John")],
        **changes,
    }
    with pytest.raises(PromptError, match=words):
        PromptPairs.from_strings(smollm2, **lists)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"clean": "a",', "must be JSON"),
        ("[1, 2]", "must be a JSON object"),
        ("{}", "key 'clean' is required, got none"),
        ({k: v for k, v in entry().items() if k != "answer"}, "key 'answer' is required"),
        (entry(wrong="x"), "key 'wrong' is not known"),
        (entry(answer=[" Mary"]), r"answer must be a text, got \[' Mary'\]"),
        (entry(labels=["John"]), "labels must be an object"),
        (entry(labels={"x": [1, 99]}), "first < past_last <= 15"),
        (entry(labels={"x": [1, "2"]}), "must be a substring"),
        (entry(corrupted=CLEAN), "must differ"),
    ],
)
def test_bad_jsonl_is_refused_with_file_and_line(
    smollm2: TransformerBridge, tmp_path: Path, line: Any, words: str
) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", entry(), "", line)
    with pytest.raises(PromptError, match=words) as caught:
        PromptPairs.from_jsonl(smollm2, path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_missing_or_binary_file_is_refused(smollm2: TransformerBridge, tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="could not be read"):
        PromptPairs.from_jsonl(smollm2, tmp_path / "none.jsonl")
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="could not be read"):
        PromptPairs.from_jsonl(smollm2, binary)


def test_unfit_pair_survives_pickling() -> None:
    error = UnfitPair("a message", reason="a rule")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason) == ("a message", "a rule")
