"""Texts as tokens of one model: ids, strings, and the characters behind each token."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge


def token_ids(model: TransformerBridge, text: str, *, alone: bool = False) -> tuple[int, ...]:
    """Ids of `text`, never cut to the context.

    With the start token where the model's own rule asks for one, and without it when the
    text stands `alone` (an answer, a word).
    """
    prepend_bos = False if alone else None
    ids = model.to_tokens(text, prepend_bos=prepend_bos, truncate=False)[0].tolist()
    return tuple(int(token) for token in ids)


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
