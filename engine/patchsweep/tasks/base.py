"""Tasks: seeded streams of prompt records, each from the literature or close to it."""

from __future__ import annotations

import inspect
import random
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge, whole_number
from patchsweep.data.pairs import PromptPair, PromptPairs, UnfitPair, tokenise_pair
from patchsweep.data.records import CharSpan, PromptRecord
from patchsweep.data.tokenize import token_ids
from patchsweep.errors import PromptError

Draw = Callable[[random.Random], PromptRecord]  # one record from one random state


@dataclass(frozen=True)
class Task:
    """A behaviour, and how to draw prompt pairs that show it."""

    name: str  # as the command line takes it
    description: str  # what the prompts ask, and how clean and corrupted differ
    source: str  # the work it comes from, cited; what differs from it, where something does
    labels: tuple[str, ...]  # the spans that every record names
    prepare: Callable[..., Draw]  # (model, **options) -> how to draw one record
    needs_model: bool = False  # the texts depend on the tokenizer
    n_pairs: int = 32  # how many `load_task` takes unless told

    def options(self) -> dict[str, Any]:
        """Each option's name and default."""
        parameters = list(inspect.signature(self.prepare).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def records(
        self, n: int, seed: int = 0, *, model: TransformerBridge | None = None, **options: Any
    ) -> list[PromptRecord]:
        """The first `n` distinct records of the stream that `seed` and `options` fix.

        Raises:
            PromptError: `n` is not positive, an option or its value is unknown, the task
                needs a model and has none, or it has fewer records.
        """
        distinct: dict[PromptRecord, None] = {}
        for record in self.draws(n, seed, model, options):
            distinct[record] = None
            if len(distinct) == n:
                return list(distinct)
        raise PromptError(
            f"task {self.name!r} has fewer than n={n} distinct records: {len(distinct)} came in "
            f"{draw_limit(n)} draws; ask for at most {len(distinct)}"
        )

    def draws(
        self, n: int, seed: int, model: TransformerBridge | None, options: Mapping[str, Any]
    ) -> Iterator[PromptRecord]:
        """Records in draw order, repeats included, at most `draw_limit(n)` of them.

        Each draw has a random state of its own, so the first draws do not depend on `n`.

        Raises:
            PromptError: as `records`, at the call.
        """
        whole_number("n_pairs", n, least=1, error=PromptError)
        whole_number("seed", seed, error=PromptError)
        known = self.options()
        for option in options:
            if option not in known:
                raise PromptError(
                    f"task {self.name!r} has no option {option!r}; "
                    f"use {', '.join(known) or 'none, it has no options'}"
                )
        if self.needs_model and model is None:
            raise PromptError(
                f"task {self.name!r} writes its texts for one tokenizer and got model=None; "
                "give model=load_model(...)"
            )
        draw = self.prepare(model, **options)
        return (
            draw(random.Random(f"{self.name}/{seed}/{index}")) for index in range(draw_limit(n))
        )


def draw_limit(n: int) -> int:
    """Draws after which `n` records are given up: most draws may be unfit, not nearly all."""
    return 200 + 100 * n


def load_pairs(
    model: TransformerBridge,
    task: Task,
    n_pairs: int | None = None,
    seed: int = 0,
    **options: Any,
) -> PromptPairs:
    """The first `n_pairs` pairs of `task` that fit the tokenizer of `model`.

    Deterministic for a seed, and independent of `n_pairs`: fewer pairs are a prefix of more.

    Raises:
        PromptError: as `Task.records`, or too few records fit; says the commonest reason.
    """
    check_bridge(model)
    n = task.n_pairs if n_pairs is None else n_pairs
    fitting: list[PromptPair] = []
    seen: set[PromptRecord] = set()
    reasons: Counter[str] = Counter()
    for record in task.draws(n, seed, model, options):
        if record in seen:
            reasons["it repeats an earlier pair"] += 1
            continue
        seen.add(record)
        try:
            fitting.append(tokenise_pair(model, record, where=f"task {task.name!r}"))
        except UnfitPair as error:
            reasons[error.reason] += 1
        if len(fitting) == n:
            return PromptPairs(tuple(fitting))
    reason, count = reasons.most_common(1)[0]
    raise PromptError(
        f"task {task.name!r} must give n_pairs={n} for this tokenizer, got {len(fitting)} in "
        f"{draw_limit(n)} draws; the commonest reason against a draw ({count} times): {reason}; "
        f"ask for at most {len(fitting)} pairs or use another model"
        if fitting
        else f"task {task.name!r} gives no pair for this tokenizer in {draw_limit(n)} draws; the "
        f"commonest reason against a draw ({count} times): {reason}; use another task or model"
    )


def compose(template: str, fields: Mapping[str, str]) -> tuple[str, dict[str, CharSpan]]:
    """The template with its fields filled in, and where each field went."""
    text = ""
    spans: dict[str, CharSpan] = {}
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            spans[name] = CharSpan(len(text), len(text) + len(fields[name]))
            text += fields[name]
    return text, spans


def words(text: str) -> tuple[str, ...]:
    """The words of a text."""
    return tuple(text.split())


def end_of(text: str) -> CharSpan:
    """The last character, hence the last token."""
    return CharSpan(len(text) - 1, len(text))


def after(text: str, span: CharSpan) -> CharSpan:
    """Characters of the token that follows `span`: a punctuation mark, or a space and a letter."""
    return CharSpan(span.stop, span.stop + (2 if text[span.stop] == " " else 1))


def one_of(task: str, option: str, value: str, allowed: Collection[str]) -> str:
    """`value`, when it is allowed.

    Raises:
        PromptError: it is not.
    """
    if value not in allowed:
        raise PromptError(
            f"task {task!r} has no {option}={value!r}; use one of {', '.join(sorted(allowed))}"
        )
    return value


def number_digits(model: TransformerBridge, before: str = "") -> int:
    """Digits of a two-digit number that the tokenizer reads at once after the text `before`.

    2, or 1 where it splits some of them.
    """
    numbers = (f"{before}{n}" for n in range(10, 100))
    return 2 if all(len(token_ids(model, number, alone=True)) == 1 for number in numbers) else 1
