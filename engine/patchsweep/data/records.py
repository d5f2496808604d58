"""Prompt pairs as text, before tokenisation, and the reader of their JSONL files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from patchsweep.errors import PromptError

REQUIRED = ("clean", "corrupted", "answer", "wrong_answer")  # text fields of each record


@dataclass(frozen=True)
class CharSpan:
    """Characters `[start, stop)` of the clean prompt."""

    start: int  # first character
    stop: int  # past the last character


# a substring or characters of the clean prompt, or token positions [first, past last)
Label = str | CharSpan | tuple[int, int]


@dataclass(frozen=True)
class PromptRecord:
    """A prompt pair as text, before tokenisation."""

    clean: str  # the prompt whose right answer is `answer`
    corrupted: str  # the prompt whose right answer is `wrong_answer`
    answer: str  # with its leading space, unless the prompt ends in one
    wrong_answer: str  # likewise
    labels: Mapping[str, Label] = field(default_factory=dict, hash=False)  # name -> place


def read_jsonl(path: Path) -> Iterator[tuple[str, PromptRecord]]:
    """Yield ("file, line n", record) for each line of a file with one JSON object per line.

    Blank lines are skipped. Keys: `clean`, `corrupted`, `answer`, `wrong_answer`, and
    optionally `labels`, whose values are substrings of the clean prompt or
    `[first, past_last]` token positions.

    Raises:
        PromptError: the file cannot be read, or a line is not such an object.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(
            f"{path} could not be read: {error}; give a UTF-8 file with one JSON object per line"
        ) from None
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _record_from_json(line, where)


def _record_from_json(line: str, where: str) -> PromptRecord:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{where}: a line must be JSON, {error}: {line[:60]!r}; write one object per line"
        ) from None
    if not isinstance(entry, dict):
        raise PromptError(
            f"{where}: a line must be a JSON object, got {line[:60]!r}; "
            f"give the keys {', '.join(REQUIRED)}"
        )
    known = (*REQUIRED, "labels")
    for key in REQUIRED:
        if key not in entry:
            raise PromptError(
                f"{where}: key {key!r} is required, got {', '.join(map(repr, entry)) or 'none'}; "
                "add it"
            )
        if not isinstance(entry[key], str):
            raise PromptError(
                f"{where}: {key} must be a text, got {entry[key]!r}; put it in quotes"
            )
    for key in entry:
        if key not in known:
            raise PromptError(
                f"{where}: key {key!r} is not known; use {', '.join(known)}, or remove it"
            )
    labels = entry.get("labels", {})
    if not isinstance(labels, dict):
        raise PromptError(
            f"{where}: labels must be an object of names and places, got {labels!r}; "
            'write for example {"subject": "John"}'
        )
    return PromptRecord(
        clean=entry["clean"],
        corrupted=entry["corrupted"],
        answer=entry["answer"],
        wrong_answer=entry["wrong_answer"],
        labels=labels,
    )
