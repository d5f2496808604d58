"""Plain texts as pairs, for what reads one run: the lens, and attention patterns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge
from patchsweep.data.answers import answer_ids, prompt_ids
from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.data.tokenize import token_strings
from patchsweep.errors import PromptError
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model


def text_pairs(
    model: TransformerBridge,
    texts: str | Sequence[str],
    answers: Sequence[tuple[str, str]] | None = None,
    *,
    prepend_bos: bool | None = None,
) -> PromptPairs:
    """Return each text as a pair whose two prompts are that text.

    `answers` holds (answer, other answer) of each text, one token each. Default: the two tokens
    that the model finds most probable after it, for which it runs once.

    Raises:
        PromptError: a text is empty or too long, or an answer is not one token after it.
    """
    check_bridge(model)
    if not is_text(texts):
        raise PromptError(f"texts={texts!r} must be a text, or a list of them")
    named = [texts] if isinstance(texts, str) else list(texts)
    if answers is not None and len(answers) != len(named):
        raise PromptError(
            f"there are {len(named)} texts and {len(answers)} answers; give one of each"
        )
    pairs = []
    for index, text in enumerate(named):
        where = f"text {index}"
        ids = prompt_ids(model, text, where, prepend_bos)
        if answers is None:
            right, wrong = _first_two(model, ids)
        else:
            right, wrong = (
                answer_ids(model, text, ids, "an answer", one, where, False, prepend_bos)
                for one in answers[index]
            )
        tokens = token_strings(model, ids)
        right_text, wrong_text = (token_strings(model, one)[0] for one in (right, wrong))
        pairs.append(
            PromptPair(ids, ids, right, wrong, tokens, tokens, right_text, wrong_text, labels={})
        )
    return PromptPairs(tuple(pairs))


@runs_model
@torch.no_grad()
def _first_two(
    model: TransformerBridge, ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the two most probable tokens after `ids`."""
    logits = model(torch.tensor([ids], device=device_of(model)), return_type="logits")
    first, second = logits[0, -1].float().topk(2).indices.tolist()
    return (first,), (second,)


def is_text(given: object) -> bool:
    """Whether `given` is a plain text, or a list of some."""
    if isinstance(given, list | tuple):
        return bool(given) and all(isinstance(one, str) and one for one in given)
    return isinstance(given, str) and bool(given)


def pairs_of(model: TransformerBridge, given: PromptPairs | str | Sequence[str]) -> PromptPairs:
    """Return `given`, or the `text_pairs` of plain texts.

    Raises:
        PromptError: as `text_pairs`.
    """
    # what is neither is refused where it is used
    return text_pairs(model, given) if is_text(given) else given  # type: ignore[arg-type,return-value]
