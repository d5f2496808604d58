"""`template_task`: a task of the user's own, made of templates whose slots are filled by lists."""

from __future__ import annotations

import random
import string
from collections.abc import Mapping, Sequence
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import PromptRecord
from patchsweep.errors import PromptError
from patchsweep.tasks.base import Draw, Task, compose

# a slot, or several that are filled by one row -> texts, or rows of texts
Slots = Mapping[str | tuple[str, ...], Sequence[Any]]
_PARTS = ("clean", "corrupted", "answer", "wrong_answer")


def template_task(
    name: str,
    *,
    clean: str,
    corrupted: str,
    answer: str,
    wrong_answer: str,
    slots: Slots,
    n_pairs: int = 32,
) -> Task:
    """Return a task for `load_task`, whose pairs fill slots such as `{A}` in four templates.

    The corrupted prompt swaps what its template swaps: where the clean one says `{A} gave`, it may
    say `{B} gave`. Slots with the same list are filled by different entries of it, others
    independently:

        template_task(
            "drinks",
            clean="When {A} and {B} went to the {place}, {A} gave a drink to",
            corrupted="When {A} and {B} went to the {place}, {B} gave a drink to",
            answer=" {B}",
            wrong_answer=" {A}",
            slots={"A": names, "B": names, "place": ["store", "park"]},
        )

    A tuple of slots is filled by one row: `{("country", "capital"): rows, ("other",
    "other_capital"): rows}` draws two different countries with their capitals. Each slot of the
    clean prompt is a label; one that occurs again has the labels `A`, `A_2`, and so on.

    Raises:
        PromptError: a template names a slot that is not given, a slot is not used, or a list is too
            short or holds something other than texts.
    """
    templates = dict(zip(_PARTS, (clean, corrupted, answer, wrong_answer), strict=True))
    groups = [_group(name, key, entries) for key, entries in _checked(name, slots).items()]
    known = [slot for members, _ in groups for slot in members]
    used = {part: _fields(name, part, text) for part, text in templates.items()}
    for part, fields in used.items():
        if missing := [field for field in fields if field not in known]:
            raise PromptError(
                f"task {name!r}: {part}={templates[part]!r} names the slot {missing[0]!r}, which "
                f"slots does not fill; the slots are {', '.join(known)}"
            )
    if idle := [slot for slot in known if not any(slot in fields for fields in used.values())]:
        raise PromptError(f"task {name!r}: no template uses the slot {idle[0]!r}; leave it out")
    # groups that share a list are filled without repetition
    shared: dict[tuple[tuple[str, ...], ...], list[tuple[str, ...]]] = {}
    for members, rows in groups:
        shared.setdefault(rows, []).append(members)
    for rows, sharing in shared.items():
        if len(set(rows)) < len(sharing):
            raise PromptError(
                f"task {name!r}: the slots {' and '.join(map(str, sharing))} share a list of "
                f"{len(set(rows))} entries; they need as many different ones as there are slots"
            )

    def prepare(model: TransformerBridge | None) -> Draw:
        """Return a function that draws one pair."""

        def draw(rng: random.Random) -> PromptRecord:
            filled: dict[str, str] = {}
            for rows, sharing in shared.items():
                drawn = rng.sample(sorted(set(rows)), len(sharing))
                for members, row in zip(sharing, drawn, strict=True):
                    filled.update(zip(members, row, strict=True))
            text, spans = compose(clean, filled, numbered=True)
            return PromptRecord(
                text,
                compose(corrupted, filled)[0],
                compose(answer, filled)[0],
                compose(wrong_answer, filled)[0],
                labels=spans,
            )

        return draw

    return Task(
        name=name,
        description=f"{clean!r}, corrupted {corrupted!r}, answers {answer!r} and {wrong_answer!r}",
        source="a template of the user's own",
        labels=tuple(compose(clean, dict.fromkeys(known, "x"), numbered=True)[1]),
        prepare=prepare,
        n_pairs=n_pairs,
    )


def _checked(name: str, slots: Any) -> Slots:
    if not isinstance(slots, Mapping) or not slots:
        raise PromptError(
            f"task {name!r}: slots={slots!r} must map slots to lists of texts, such as "
            "{'A': ['John', 'Mary']}"
        )
    return slots


def _group(
    name: str, key: Any, entries: Any
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the slots of one key, and the rows that fill them."""
    members = (key,) if isinstance(key, str) else tuple(key)
    if isinstance(entries, str) or not isinstance(entries, Sequence) or not entries:
        raise PromptError(f"task {name!r}: slot {key!r} must have a list of texts, got {entries!r}")
    rows = tuple((x,) if isinstance(key, str) else tuple(x) for x in entries)
    for row in rows:
        if len(row) != len(members) or not all(isinstance(x, str) and x for x in row):
            wanted = "a text" if isinstance(key, str) else f"a row of {len(members)} texts"
            shown = row[0] if isinstance(key, str) else row
            raise PromptError(
                f"task {name!r}: each entry of slot {key!r} must be {wanted}, got {shown!r}"
            )
    return members, rows


def _fields(name: str, part: str, text: Any) -> list[str]:
    if not isinstance(text, str) or not text:
        raise PromptError(f"task {name!r}: {part} must be a text with slots, got {text!r}")
    try:
        return [field for _, field, _, _ in string.Formatter().parse(text) if field is not None]
    except ValueError as error:
        raise PromptError(
            f"task {name!r}: {part}={text!r} is no template ({error}); write a brace that is no "
            "slot twice"
        ) from None
