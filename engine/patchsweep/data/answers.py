"""Token ids of a pair's prompts and answers, checked against the context and each other."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.tokenize import context_size, token_ids, token_strings
from patchsweep.errors import PromptError


class UnfitPair(PromptError):
    """Raised for a pair that this model's tokenizer or context does not allow."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason  # the broken rule, in the same words for each pair that breaks it


def prompt_ids(
    model: TransformerBridge, text: str, where: str, prepend_bos: bool | None
) -> tuple[int, ...]:
    """Return the tokens of a prompt.

    Raises:
        UnfitPair: it is longer than the context.
    """
    ids = token_ids(model, text, prepend_bos=prepend_bos)
    n_ctx = context_size(model)
    if len(ids) > n_ctx:
        raise UnfitPair(
            f"{where}: a prompt may have {n_ctx} tokens with this model, this one has "
            f"{len(ids)}: {text[:60]!r}...; shorten it",
            reason="a prompt is longer than the context",
        )
    return ids


def answer_ids(
    model: TransformerBridge,
    prompt: str,
    before: tuple[int, ...],
    name: str,
    answer: str,
    where: str,
    multi_token: bool,
    prepend_bos: bool | None,
) -> tuple[int, ...]:
    """Return the tokens of `answer` after those of the prompt, `before`, from the joined text.

    Raises:
        UnfitPair: it is not one token, or does not follow the prompt token by token.
    """
    joined = token_ids(model, prompt + answer, prepend_bos=prepend_bos)
    n_prompt = len(before)
    follows = joined[:n_prompt] == before and len(joined) > n_prompt
    ids = joined[n_prompt:]
    if follows and (multi_token or len(ids) == 1):
        return ids
    # the answer with a leading space, if the prompt's tokens stay the same before it
    spaced = f" {answer}" if not (answer[0].isspace() or prompt[-1].isspace()) else ""
    if spaced and token_ids(model, prompt + spaced, prepend_bos=prepend_bos)[:-1] != before:
        spaced = ""
    if follows:
        remedy = (
            "choose an answer of one token, or allow more with multi_token=True (on the command "
            "line: task.multi_token=true)"
        )
        if spaced:
            remedy = f"{spaced!r}, with a leading space, is one token: write that"
        raise UnfitPair(
            f"{where}: {name} must be one token, {answer!r} is {len(ids)}: "
            f"{list(token_strings(model, ids))}; {remedy}",
            reason="an answer is not one token",
        )
    fed = _end_of(model, (*before, *token_ids(model, answer, alone=True)))
    kept, rest = _cut_at(model, joined, prompt + answer, len(answer))
    raise UnfitPair(
        f"{where}: {name} {answer!r} must follow the prompt token by token, but prompt and answer "
        f"one by one are {fed}, and as one text {_end_of(model, joined)}, so the model never reads "
        f"the first; end the prompt at {kept[-40:]!r} and give the answer {rest!r}"
        + (f", or give the answer {spaced!r}" if spaced else ""),
        reason="an answer does not follow the prompt",
    )


def _cut_at(
    model: TransformerBridge, ids: tuple[int, ...], text: str, n_chars: int
) -> tuple[str, str]:
    """Cut `text` (tokens `ids`) between two tokens, at least `n_chars` before its end."""
    ends = (model.tokenizer.decode(ids[i:]) for i in range(len(ids) - 1, -1, -1))
    rest = next((end for end in ends if len(end) >= n_chars), text)
    return text.removesuffix(rest), rest


def _end_of(model: TransformerBridge, ids: tuple[int, ...]) -> str:
    """Show the last tokens of `ids`, such as `[..., ' is', ' happy']`."""
    shown = ", ".join(map(repr, token_strings(model, ids[-4:])))
    return f"[{'..., ' if len(ids) > 4 else ''}{shown}]"
