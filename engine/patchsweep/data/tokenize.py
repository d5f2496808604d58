"""Texts as tokens of one model: ids, strings, and the characters behind each token."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import PromptError


def start_token(model: TransformerBridge) -> int | None:
    """Id of the token that prompts of this model begin with; None if its tokenizer has none.

    TransformerLens names the end token as the start token of a tokenizer that declares no start
    token. That one does not count: a model that was trained without a start token has never seen
    an end token in front of its text.
    """
    tokenizer = model.tokenizer
    if declares_start(tokenizer):
        return int(tokenizer.bos_token_id)
    return None


def declares_start(tokenizer: Any) -> bool:
    """Whether the tokenizer has a start token of its own."""
    if tokenizer.bos_token_id is None:
        return False
    return (
        tokenizer.bos_token_id != tokenizer.eos_token_id
        or tokenizer.init_kwargs.get("bos_token") is not None
    )


def context_size(model: TransformerBridge) -> int:
    """The most tokens that a prompt may have, by the bridge and by the model behind it."""
    config = model.original_model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(text, "max_position_embeddings", None)
    return min(int(model.cfg.n_ctx), int(own or model.cfg.n_ctx))


def token_ids(
    model: TransformerBridge, text: str, *, alone: bool = False, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """Ids of `text`, never cut to the context.

    The start token comes first where the model's own rule (`cfg.default_prepend_bos`) asks for
    one, and once: a text that begins with it, such as what a chat template gives, gets no second.
    `prepend_bos` overrides the rule: True puts a start token before any text, False before none.
    A text that stands `alone` (an answer, a word) gets none.

    Raises:
        PromptError: `prepend_bos=True`, and the tokenizer has no start token.
    """
    ids = list(model.tokenizer(text, verbose=False)["input_ids"])
    # what the tokenizer adds by itself
    if getattr(model.cfg, "tokenizer_prepends_bos", True):
        ids = ids[1:]
    if getattr(model.cfg, "tokenizer_appends_eos", False):
        ids = ids[:-1]
    start = start_token(model)
    if prepend_bos and start is None:
        raise PromptError(
            f"prepend_bos=True: the tokenizer of {model.cfg.model_name} has no start token; leave "
            "prepend_bos out"
        )
    if prepend_bos is None:
        wanted = getattr(model.cfg, "default_prepend_bos", True) and ids[:1] != [start]
    else:
        wanted = prepend_bos
    if wanted and start is not None and not alone:
        ids = [start, *ids]
    return tuple(map(int, ids))


def token_strings(model: TransformerBridge, ids: tuple[int, ...]) -> tuple[str, ...]:
    """The text of each id, one by one."""
    # one id a row, or the tokenizer would join them into one string
    rows = [[token] for token in ids]
    return tuple(model.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False))


def char_ranges(model: TransformerBridge, text: str, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """Characters `[start, stop)` of `text` behind each token; empty for added tokens."""
    if model.tokenizer.is_fast:
        plain = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        n_plain = len(plain["input_ids"])
        # the bridge adds a start token, an end token, both or neither
        for shift in range(len(ids) - n_plain + 1):
            if list(ids[shift : shift + n_plain]) == list(plain["input_ids"]):
                ranges = [(0, 0)] * len(ids)
                ranges[shift : shift + n_plain] = [tuple(r) for r in plain["offset_mapping"]]
                return ranges
    return char_ranges_by_prefix(model, text, ids)


def char_ranges_by_prefix(
    model: TransformerBridge, text: str, ids: tuple[int, ...]
) -> list[tuple[int, int]]:
    """As `char_ranges`, for tokenizers without offsets.

    A token ends where the shortest prefix of the text ends whose tokens include it.
    """
    ranges: list[tuple[int, int]] = []
    start = 0
    for stop in range(len(text) + 1):
        prefix = token_ids(model, text[:stop])
        known = 0
        while known < min(len(prefix), len(ids)) and prefix[known] == ids[known]:
            known += 1
        if known > len(ranges):
            ranges += [(start, stop)] * (known - len(ranges))
            start = stop
    return ranges
