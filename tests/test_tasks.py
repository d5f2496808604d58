"""Tasks: deterministic, prefix-stable, and fit for the embedded model's tokenizer."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import token_ids
from patchsweep.errors import PromptError
from patchsweep.tasks import DEMO_PAIR, TASKS, check_task, load_task
from patchsweep.tasks.base import draw_limit
from patchsweep.tasks.check import last_logits
from patchsweep.tasks.facts import RELATIONS
from patchsweep.tasks.ioi import NAMES, TEMPLATES
from transformer_lens.model_bridge import TransformerBridge

MANY = sorted(set(TASKS) - {"ioi_demo"})


class TwoDigitTokens:
    """Stands in for a model whose tokenizer keeps numbers of two digits whole, as GPT-2's does."""

    cfg = SimpleNamespace(tokenizer_prepends_bos=False)
    bos_token_id = None

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.vocabulary: dict[str, int] = {}
        self.tokenizer = self

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        pieces = re.findall(self.pattern, text)
        ids = [self.vocabulary.setdefault(piece, len(self.vocabulary)) for piece in pieces]
        return {"input_ids": ids}


def numbers(line: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", line)]


def label_text(pairs: PromptPairs, index: int, name: str) -> str:
    first, past_last = pairs[index].labels[name]
    return "".join(pairs[index].clean_tokens[first:past_last])


@pytest.mark.parametrize("name", MANY)
def test_task_fits_the_embedded_tokenizer(smollm2: TransformerBridge, name: str) -> None:
    pairs = load_task(smollm2, name, 64)
    assert len(pairs) == len({(pair.clean, pair.corrupted) for pair in pairs}) == 64
    for pair in pairs:
        assert len(pair.clean) == len(pair.corrupted)
        assert pair.clean != pair.corrupted
        assert len(pair.answer) == len(pair.wrong_answer) == 1
        assert pair.answer != pair.wrong_answer
        assert set(pair.labels) == set(TASKS[name].labels)
        assert pair.labels["end"] == (len(pair) - 1, len(pair))


@pytest.mark.parametrize("name", MANY)
def test_fewer_pairs_are_a_prefix_of_more(smollm2: TransformerBridge, name: str) -> None:
    more = load_task(smollm2, name, 64, seed=5)
    assert load_task(smollm2, name, 16, seed=5) == more[:16]
    assert load_task(smollm2, name, 16, seed=6) != more[:16]


@pytest.mark.parametrize("name", MANY)
def test_records_do_not_depend_on_global_state(smollm2: TransformerBridge, name: str) -> None:
    random.seed(1)
    first = TASKS[name].records(8, seed=2, model=smollm2)
    random.seed(2)
    assert TASKS[name].records(8, seed=2, model=smollm2) == first
    assert TASKS[name].records(24, seed=2, model=smollm2)[:8] == first


@pytest.mark.parametrize("name", sorted(TASKS))
def test_task_says_what_it_is(name: str) -> None:
    task = TASKS[name]
    assert task.name == name
    assert len(task.description) > 20
    assert re.search(r"\b20\d\d\b", task.source)
    assert "end" in task.labels


def test_pairs_of_a_seed_stay_the_same_between_releases(smollm2: TransformerBridge) -> None:
    pair = load_task(smollm2, "ioi", 1)[0]
    assert "".join(pair.clean_tokens[1:]) == (
        "Last week Max and Kate came back from the hospital, and Kate brought a hat to"
    )


def test_demo_pair_is_the_task_ioi_demo(smollm2: TransformerBridge) -> None:
    pairs = load_task(smollm2, "ioi_demo")
    assert pairs == PromptPairs.from_records(smollm2, [DEMO_PAIR])
    assert DEMO_PAIR.clean == "When John and Mary went to the shops, John gave a bottle of milk to"
    assert (
        DEMO_PAIR.corrupted == "When John and Mary went to the shops, Mary gave a bottle of milk to"
    )
    assert (DEMO_PAIR.answer, DEMO_PAIR.wrong_answer) == (" Mary", " John")
    assert pairs[0].labels == {
        "S1": (2, 3),
        "S1+1": (3, 4),
        "IO": (4, 5),
        "S2": (10, 11),
        "end": (16, 17),
    }
    with pytest.raises(PromptError, match=r"n_pairs=2.*got 1.*repeats an earlier pair"):
        load_task(smollm2, "ioi_demo", 2)


def test_ioi_has_the_variety_it_promises() -> None:
    assert len(TEMPLATES) == len(set(TEMPLATES)) >= 15
    assert len(NAMES) == len(set(NAMES)) >= 60


@pytest.mark.parametrize("order", ["abba", "baba", "mixed"])
def test_ioi_order_puts_the_names_where_it_says(smollm2: TransformerBridge, order: str) -> None:
    pairs = load_task(smollm2, "ioi", 40, order=order)
    io_first = [pair.labels["IO"] < pair.labels["S1"] for pair in pairs]
    assert all(io_first) == (order == "abba")
    assert any(io_first) == (order != "baba")


def test_ioi_labels_name_their_roles(smollm2: TransformerBridge) -> None:
    pairs = load_task(smollm2, "ioi", 40)
    for index, pair in enumerate(pairs):
        assert label_text(pairs, index, "IO") == pair.answer_text
        assert label_text(pairs, index, "S1") == label_text(pairs, index, "S2")
        assert label_text(pairs, index, "S2") == pair.wrong_answer_text
        assert pair.labels["S1+1"][0] == pair.labels["S1"][1]
        assert pair.labels["S1+1"][1] == pair.labels["S1"][1] + 1
        differing = [p for p in range(len(pair)) if pair.clean[p] != pair.corrupted[p]]
        assert differing == [pair.labels["S2"][0]]
        assert pair.corrupted_tokens[differing[0]] == pair.answer_text


def test_ioi_swap_names_exchanges_them_everywhere(smollm2: TransformerBridge) -> None:
    for pair in load_task(smollm2, "ioi", 20, corruption="swap_names"):
        swap = {pair.answer_text: pair.wrong_answer_text, pair.wrong_answer_text: pair.answer_text}
        assert pair.corrupted_tokens == tuple(swap.get(t, t) for t in pair.clean_tokens)


def test_facts_ask_about_two_subjects_of_one_relation(smollm2: TransformerBridge) -> None:
    pairs = load_task(smollm2, "facts", 30, relation="capital")
    capitals = dict(RELATIONS["capital"].facts)
    for index, pair in enumerate(pairs):
        assert f" {capitals[label_text(pairs, index, 'subject').strip()]}" == pair.answer_text
        first, past_last = pair.labels["subject"]
        other = "".join(pair.corrupted_tokens[first:past_last]).strip()
        assert f" {capitals[other]}" == pair.wrong_answer_text
        assert pair.clean[past_last:] == pair.corrupted[past_last:]


def test_greater_than_labels_and_years(smollm2: TransformerBridge) -> None:
    pairs = load_task(smollm2, "greater_than", 30)
    for index, pair in enumerate(pairs):
        start = int(label_text(pairs, index, "start"))
        first, past_last = pair.labels["start"]
        other = int("".join(pair.corrupted_tokens[first:past_last]))
        # this tokenizer splits digits, so answers are decades
        answer, wrong_answer = int(pair.answer_text), int(pair.wrong_answer_text)
        assert answer > start // 10
        assert wrong_answer > other // 10
        late, too_soon = (start, wrong_answer) if start > other else (other, answer)
        assert too_soon < late // 10
        assert label_text(pairs, index, "prefix") == "".join(pair.clean_tokens)[-2:]


def test_years_are_two_digits_where_the_tokenizer_reads_them_whole() -> None:
    model: Any = TwoDigitTokens(r"\d\d| ?[a-z]+|.")
    for record in TASKS["greater_than"].records(100, model=model):
        years = [int(re.findall(r"\d\d(\d\d)", p)[0]) for p in (record.clean, record.corrupted)]
        answers = [int(record.answer), int(record.wrong_answer)]
        assert len(record.answer) == len(record.wrong_answer) == 2
        assert all(answer > year for answer, year in zip(answers, years, strict=True))
        assert min(answers) < max(years)


@pytest.mark.parametrize(
    ("pattern", "form"),
    [
        (r" \d\d|\d\d|\D", r"= \d\d"),  # " 46" is one token
        (r"\d\d|\D", r"= \d\d"),  # "46" is one token, its space another
        (r"\d|\D", r"= \d"),  # digits are split
    ],
)
def test_addition_asks_for_what_the_tokenizer_reads_at_once(pattern: str, form: str) -> None:
    model: Any = TwoDigitTokens(pattern)
    for record in TASKS["addition"].records(400, model=model):
        line = (record.clean + record.answer).splitlines()[-1]
        assert re.fullmatch(rf"\d\d \+ \d\d {form}", line)
        assert len(token_ids(model, record.answer)) == 1
        for prompt, answer in (
            (record.clean, record.answer),
            (record.corrupted, record.wrong_answer),
        ):
            *shots, question = prompt.splitlines()
            assert all(a + b == c for a, b, c in map(numbers, shots))
            assert str(sum(numbers(question))).startswith(answer.strip())
        assert record.answer != record.wrong_answer


def test_docstring_answer_is_the_third_argument(smollm2: TransformerBridge) -> None:
    pairs = load_task(smollm2, "docstring", 20)
    for index, pair in enumerate(pairs):
        assert label_text(pairs, index, "C_def") == pair.answer_text
        for role in "AB":
            assert label_text(pairs, index, f"{role}_def") == label_text(
                pairs, index, f"{role}_doc"
            )


def test_pronouns_follow_the_name(smollm2: TransformerBridge) -> None:
    pairs = load_task(smollm2, "pronouns", 40)
    assert {pair.answer_text for pair in pairs} == {" he", " she"}
    names: dict[str, set[str]] = {}
    for index, pair in enumerate(pairs):
        names.setdefault(label_text(pairs, index, "name").strip(), set()).add(pair.answer_text)
    assert all(len(genders) == 1 for genders in names.values())


def test_verb_agrees_with_the_subject_and_not_always_with_the_attractor(
    smollm2: TransformerBridge,
) -> None:
    pairs = load_task(smollm2, "sva", 60)
    numbers = set()
    for index, pair in enumerate(pairs):
        plural = label_text(pairs, index, "subject").endswith("s")
        assert (pair.answer_text in (" are", " were", " have")) == plural
        attractor = label_text(pairs, index, "attractor").strip()
        numbers.add((plural, attractor.endswith("s") or attractor == "children"))
        assert pair.labels["subject"][1] <= pair.labels["attractor"][0]
    assert len(numbers) == 4


@pytest.mark.parametrize("name", ["smollm2", "llama"])
def test_induction_repeats_and_asks_for_the_successor(
    request: pytest.FixtureRequest, name: str
) -> None:
    pairs = load_task(request.getfixturevalue(name), "induction", 20, length=8)
    for index, pair in enumerate(pairs):
        words = "".join(pair.clean_tokens[1:]).split()
        assert words[8:] == words[: len(words) - 8]
        assert label_text(pairs, index, "end").strip() in words[-1]
        assert label_text(pairs, index, "previous").strip() == words[-1]
        assert label_text(pairs, index, "copied") == pair.answer_text
        assert pair.labels["copied"][0] == pair.labels["previous"][1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (("iio", 4, {}), "task 'iio' is not known; use one of addition, docstring, facts"),
        (("ioi", 0, {}), "n_pairs=0 must be a whole number of at least 1"),
        (("ioi", 4, {"ordr": "abba"}), "no option 'ordr'; use order, corruption"),
        (("sva", 4, {"order": "abba"}), "no option 'order'; use none"),
        (("ioi", 4, {"order": "aabb"}), "no order='aabb'; use one of abba, baba, mixed"),
        (("ioi", 4, {"corruption": "noise"}), "no corruption='noise'"),
        (("facts", 4, {"relation": "colour"}), "no relation='colour'; use one of all, capital"),
        (("induction", 4, {"length": 2}), "length=2 must be a whole number of at least 3"),
        (("induction", 4, {"length": 9999}), "needs 39996 words of one token"),
    ],
)
def test_bad_task_call_is_refused(
    smollm2: TransformerBridge, call: tuple[str, int, dict[str, Any]], words: str
) -> None:
    name, n_pairs, options = call
    with pytest.raises(PromptError, match=words):
        load_task(smollm2, name, n_pairs, **options)


def test_texts_that_depend_on_the_tokenizer_need_a_model() -> None:
    with pytest.raises(PromptError, match=r"'addition'.*model=None"):
        TASKS["addition"].records(4)


def test_records_run_out_with_their_number() -> None:
    with pytest.raises(PromptError, match="fewer than n=2 distinct records: 1 came"):
        TASKS["ioi_demo"].records(2)


def test_unfit_records_are_given_up_with_the_commonest_reason(llama: TransformerBridge) -> None:
    # the tiny tokenizer has none of the arguments' names as a token
    with pytest.raises(PromptError, match=f"{draw_limit(4)} draws.*commonest reason.*differ in"):
        load_task(llama, "docstring", 4)


def test_small_batches_of_equal_length_equal_single_runs(llama: TransformerBridge) -> None:
    pairs = load_task(llama, "ioi", 20)
    assert len(pairs.by_length()) > 1
    together = last_logits(llama, pairs, "clean")
    with torch.no_grad():
        alone = [llama(torch.tensor([pair.clean]), return_type="logits")[0, -1] for pair in pairs]
    # fp32 logits of size one from products of other batch shapes
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=0)


def test_check_counts_what_the_logits_say(llama: TransformerBridge) -> None:
    pairs = load_task(llama, "ioi", 12, seed=3)
    check = check_task(llama, "ioi", 12, seed=3)
    clean, corrupted = (last_logits(llama, pairs, side) for side in ("clean", "corrupted"))
    diffs = [
        [
            (logits[index, pair.answer[0]] - logits[index, pair.wrong_answer[0]]).item()
            for index, pair in enumerate(pairs)
        ]
        for logits in (clean, corrupted)
    ]
    assert (check.task, check.n_pairs, check.seed) == ("ioi", 12, 3)
    assert check.clean_accuracy == pytest.approx(sum(d > 0 for d in diffs[0]) / 12)
    assert check.corrupted_accuracy == pytest.approx(sum(d < 0 for d in diffs[1]) / 12)
    assert check.clean_logit_diff == pytest.approx(sum(diffs[0]) / 12, abs=1e-5)
    assert check.corrupted_logit_diff == pytest.approx(sum(diffs[1]) / 12, abs=1e-5)
    top = clean.argmax(dim=1).tolist()
    hits = sum(token == pair.answer[0] for token, pair in zip(top, pairs, strict=True))
    assert check.clean_top1 == pytest.approx(hits / 12)


def test_embedded_model_does_the_demo_and_induction(smollm2: TransformerBridge) -> None:
    demo = check_task(smollm2, "ioi_demo")
    assert demo.clean_logit_diff > 2
    assert demo.corrupted_logit_diff < -2
    assert demo.clean_top1 == demo.corrupted_top1 == 1
    induction = check_task(smollm2, "induction", 8)
    assert induction.clean_accuracy == induction.corrupted_accuracy == 1
