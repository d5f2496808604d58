"""Labels: names for spans of the clean prompt, converted to token positions."""

from __future__ import annotations

from collections.abc import Mapping

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import is_whole
from patchsweep.data.records import CharSpan, Label
from patchsweep.data.tokenize import char_ranges, token_strings
from patchsweep.errors import PromptError


def place_labels(
    model: TransformerBridge,
    clean: str,
    labels: Mapping[str, Label],
    ids: tuple[int, ...],
    where: str,
) -> dict[str, tuple[int, int]]:
    """Map each label to its [first, past last) tokens of the prompt `clean`, which has the `ids`.

    Raises:
        PromptError: a label has no place in the prompt; `where` opens the message.
    """
    placed: dict[str, tuple[int, int]] = {}
    ranges: list[tuple[int, int]] | None = None
    for name, label in labels.items():
        here = f"{where}: label {name!r}"
        if isinstance(label, str | CharSpan):
            if ranges is None:
                ranges = char_ranges(model, clean, ids)
            placed[name] = _tokens_of(_char_span(clean, label, here), ranges, here)
            continue
        if not (isinstance(label, tuple | list) and len(label) == 2 and all(map(is_whole, label))):
            raise PromptError(
                f"{here} must be a substring of the clean prompt or [first, past_last] token "
                f"positions, got {label!r}; write one of these"
            )
        first, past_last = label
        if not 0 <= first < past_last <= len(ids):
            raise PromptError(
                f"{here} must satisfy 0 <= first < past_last <= {len(ids)}, the number of "
                f"tokens, got {[first, past_last]}; the tokens are "
                f"{list(token_strings(model, ids))}"
            )
        placed[name] = (int(first), int(past_last))
    return placed


def _char_span(text: str, label: str | CharSpan, here: str) -> CharSpan:
    if isinstance(label, CharSpan):
        if not 0 <= label.start < label.stop <= len(text):
            raise PromptError(
                f"{here} must satisfy 0 <= start < stop <= {len(text)}, the number of "
                f"characters, got {label}; count in the clean prompt"
            )
        return label
    start = text.find(label) if label else -1
    if start < 0:
        raise PromptError(
            f"{here} must be a substring of the clean prompt, {label!r} is not in {text!r}; "
            "copy it from the prompt"
        )
    second = text.find(label, start + 1)
    if second >= 0:
        raise PromptError(
            f"{here} must occur once in the clean prompt, {label!r} is at characters {start} "
            f"and {second} of {text!r}; give more of the text, or [first, past_last] positions"
        )
    # the space after a word belongs to the next token
    return CharSpan(start, start + len(label.rstrip() or label))


def _tokens_of(span: CharSpan, ranges: list[tuple[int, int]], here: str) -> tuple[int, int]:
    positions = [
        position
        for position, (start, stop) in enumerate(ranges)
        if start < span.stop and span.start < stop
    ]
    if not positions:
        raise PromptError(
            f"{here} covers no token, {span} holds only characters that the tokenizer drops; "
            "choose other characters"
        )
    return positions[0], positions[-1] + 1
