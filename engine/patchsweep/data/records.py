"""Prompt pairs as text, before tokenisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

REQUIRED = ("clean", "corrupted", "answer", "wrong_answer")  # text fields of each record


@dataclass(frozen=True)
class CharSpan:
    """Characters `[start, stop)` of the clean prompt."""

    start: int  # first character
    stop: int  # past the last character


# a substring or characters of the clean prompt, or token positions [first, past last)
Label = str | CharSpan | tuple[int, int]
# a text, or of a chat its messages {"role": ..., "content": ...}
Prompt = str | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class PromptRecord:
    """A prompt pair as text, before tokenisation."""

    clean: Prompt  # the prompt whose right answer is `answer`
    corrupted: Prompt  # the prompt whose right answer is `wrong_answer`
    answer: str  # with its leading space, unless the prompt ends in one
    wrong_answer: str  # likewise
    labels: Mapping[str, Label] = field(default_factory=dict, hash=False)  # name -> place
    template: str | None = None  # "chat": the prompts are messages, see `patchsweep.data.chat`
