"""The `Task` class: a seeded stream of prompt records, from the literature or close to it."""

from __future__ import annotations

import inspect
import random
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import whole_number
from patchsweep.data.records import CharSpan, PromptRecord
from patchsweep.data.tokenize import token_ids
from patchsweep.errors import PromptError

Draw = Callable[[random.Random], PromptRecord]  # one record from one random state


@dataclass(frozen=True)
class Task:
    """A behaviour, and a generator of prompt pairs that show it."""

    name: str  # on the command line too
    description: str  # what the prompts ask, and how clean and corrupted differ
    source: str  # citation of the work it comes from, and any difference from that work
    labels: tuple[str, ...]  # the spans that each record labels
    prepare: Callable[..., Draw]  # (model, **options) -> function that draws one record
    needs_model: bool = False  # the texts depend on the tokenizer
    n_pairs: int = 32  # default number of pairs of `load_task`

    def options(self) -> dict[str, Any]:
        """Return the name and default of each option."""
        parameters = list(inspect.signature(self.prepare).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in parameters}

    def records(
        self, n: int, seed: int = 0, *, model: TransformerBridge | None = None, **options: Any
    ) -> list[PromptRecord]:
        """Return the first `n` distinct records of the stream that `seed` and `options` fix.

        Raises:
            PromptError: `n` is not positive, an option or its value is unknown, the task needs a
                model and `model` is None, or the stream has fewer than `n` distinct records.
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
        """Return an iterator over at most `draw_limit(n)` records in draw order, with repeats.

        Each draw has its own random state, so the first draws do not depend on `n`.

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
    """Return how many draws to try for `n` records: most draws may be unfit, not nearly all."""
    return 200 + 100 * n


def compose(
    template: str, fields: Mapping[str, str], *, numbered: bool = False
) -> tuple[str, dict[str, CharSpan]]:
    """Return the template with its fields filled in, and the character span of each field.

    Of a field that occurs again the last span, or with `numbered` all, as `A`, `A_2`, and so on.
    """
    text = ""
    spans: dict[str, CharSpan] = {}
    seen: Counter[str] = Counter()
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is not None:
            seen[name] += 1
            label = f"{name}_{seen[name]}" if numbered and seen[name] > 1 else name
            spans[label] = CharSpan(len(text), len(text) + len(fields[name]))
            text += fields[name]
    return text, spans


def swap(
    template: str,
    fields: Mapping[str, str],
    swapped: Mapping[str, str],
    answers: tuple[str, str],
    labels: Collection[str],
) -> PromptRecord:
    """Return the pair of the template filled with `fields`, and with `swapped` in their place.

    `answers` are the right ones after the first and the second. `labels` are fields, and `end`.
    """
    clean, spans = compose(template, fields)
    corrupted, _ = compose(template, {**fields, **swapped})
    kept = {label: spans[label] for label in labels if label != "end"}
    return PromptRecord(clean, corrupted, *answers, {**kept, "end": end_of(clean)})


def words(text: str) -> tuple[str, ...]:
    """Split a text at white space."""
    return tuple(text.split())


def end_of(text: str) -> CharSpan:
    """Return the span of the last character, which lies in the last token."""
    return CharSpan(len(text) - 1, len(text))


def after(text: str, span: CharSpan) -> CharSpan:
    """Return a span inside the token after `span`: a punctuation mark, or a space and a letter."""
    return CharSpan(span.stop, span.stop + (2 if text[span.stop] == " " else 1))


def one_of(task: str, option: str, value: str, allowed: Collection[str]) -> str:
    """Return `value` if it is in `allowed`.

    Raises:
        PromptError: it is not.
    """
    if value not in allowed:
        raise PromptError(
            f"task {task!r} has no {option}={value!r}; use one of {', '.join(sorted(allowed))}"
        )
    return value


def number_digits(model: TransformerBridge, before: str = "") -> int:
    """Return how many digits of a two-digit number form one token after the text `before`.

    2 if each number from 10 to 99 is one token; 1 if the tokenizer splits any of them.
    """
    numbers = (f"{before}{n}" for n in range(10, 100))
    return 2 if all(len(token_ids(model, number, alone=True)) == 1 for number in numbers) else 1
