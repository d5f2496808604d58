"""Chat prompts: messages rendered by the tokenizer's own chat template, with roles as labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import CharSpan, Label, Prompt, PromptRecord
from patchsweep.errors import PromptError

CHAT = "chat"  # the one template there is


def render(model: TransformerBridge, record: PromptRecord, where: str) -> PromptRecord:
    """Return `record` with both prompts as texts, up to where the assistant begins to answer.

    The content of each message of the clean prompt becomes a label of its role: `system`, `user`,
    and `user_2` for a second one. A label of the record goes before a role's of the same name; a
    `CharSpan` counts in the last message.

    Raises:
        PromptError: the tokenizer has no chat template, or it refuses the messages; `where` opens
            the message.
    """
    clean, places = _rendered(model, record.clean, f"{where}: clean")
    corrupted, _ = _rendered(model, record.corrupted, f"{where}: corrupted")
    last = [*places.values()][-1].start if places else 0
    own: dict[str, Label] = {
        name: CharSpan(last + place.start, last + place.stop)
        if isinstance(place, CharSpan)
        else place
        for name, place in record.labels.items()
    }
    labels: dict[str, Label] = {**places, **own}
    return replace(record, clean=clean, corrupted=corrupted, labels=labels)


def _rendered(
    model: TransformerBridge, prompt: Prompt, where: str
) -> tuple[str, dict[str, CharSpan]]:
    """Return the text of `prompt`, and the characters of each message's content."""
    tokenizer: Any = model.tokenizer
    if getattr(tokenizer, "chat_template", None) is None:
        raise PromptError(
            f"{where}: template='chat', and the tokenizer of {model.cfg.model_name} has no chat "
            "template; leave template out, or use an instruct model"
        )
    if not isinstance(prompt, str | Sequence):
        raise PromptError(f"{where} must be a text or a list of messages, got {prompt!r}")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    for message in messages:
        if not isinstance(message, Mapping) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise PromptError(
                f"{where}: a message must be a mapping of role and content, got {message!r}; write "
                '{"role": "user", "content": "..."}'
            )
    try:
        text = str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # jinja2's, from the template itself
        raise PromptError(
            f"{where}: the chat template refuses these messages: {error}; change their roles or "
            "order"
        ) from None
    places: dict[str, CharSpan] = {}
    times: Counter[str] = Counter()
    start = 0
    for message in messages:
        content, role = message["content"].strip(), message["role"]  # templates may trim
        found = text.find(content, start) if content else -1
        times[role] += 1
        if found >= 0:
            name = role if times[role] == 1 else f"{role}_{times[role]}"
            start = found + len(content)
            places[name] = CharSpan(found, start)
    return text, places
