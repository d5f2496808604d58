"""Tokens of a text for one model: ids, strings, and the characters of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import PromptError


def start_token(model: TransformerBridge) -> int | None:
    """Return the id of the start token of this model's prompts; None if its tokenizer has none.

    For a tokenizer that declares no start token, TransformerLens uses the end token. This
    function returns None there: a model that was trained without a start token has never seen an
    end token before its text.
    """
    tokenizer = model.tokenizer
    if declares_start(tokenizer):
        return int(tokenizer.bos_token_id)
    return None


def declares_start(tokenizer: Any) -> bool:
    """Whether the tokenizer declares a start token, rather than reusing its end token."""
    if tokenizer.bos_token_id is None:
        return False
    return (
        tokenizer.bos_token_id != tokenizer.eos_token_id
        or tokenizer.init_kwargs.get("bos_token") is not None
    )


def context_size(model: TransformerBridge) -> int:
    """Return the most tokens that a prompt may have: the lower limit of bridge and HF model."""
    config = model.original_model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = getattr(text, "max_position_embeddings", None)
    return min(int(model.cfg.n_ctx), int(own or model.cfg.n_ctx))


def token_ids(
    model: TransformerBridge, text: str, *, alone: bool = False, prepend_bos: bool | None = None
) -> tuple[int, ...]:
    """Return the ids of `text`, never cut to the context.

    A start token goes first if the model's rule (`cfg.default_prepend_bos`) wants one and the
    text does not begin with it (as the output of a chat template does). `prepend_bos` overrides
    the rule: True puts a start token before every text, False before none. `alone` is for an
    answer or a single word, which gets none.

    Raises:
        PromptError: `prepend_bos=True`, and the tokenizer has no start token.
    """
    ids = list(model.tokenizer(text, verbose=False)["input_ids"])
    # remove the special tokens that the tokenizer adds by itself
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
    """Return the text of each id, decoded separately."""
    # one id per row, or the tokenizer would join them into one string
    rows = [[token] for token in ids]
    return tuple(model.tokenizer.batch_decode(rows, clean_up_tokenization_spaces=False))


def token_table(model: TransformerBridge, runs: Sequence[Sequence[int]]) -> NDArray[Any]:
    """Return the text of each id, `[run, position]`; "" beyond a run's end."""
    table = np.full((len(runs), max(map(len, runs))), "", dtype=object)
    for row, ids in zip(table, runs, strict=True):
        row[: len(ids)] = [model.tokenizer.decode([i]) for i in ids]
    return table


def char_ranges(model: TransformerBridge, text: str, ids: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return the characters `[start, stop)` of `text` for each token; empty for added tokens."""
    if model.tokenizer.is_fast:
        plain = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        n_plain = len(plain["input_ids"])
        # the bridge may add a start token, an end token, both or neither
        for shift in range(len(ids) - n_plain + 1):
            if list(ids[shift : shift + n_plain]) == list(plain["input_ids"]):
                ranges = [(0, 0)] * len(ids)
                ranges[shift : shift + n_plain] = [tuple(r) for r in plain["offset_mapping"]]
                return ranges
    return char_ranges_by_prefix(model, text, ids)


def char_ranges_by_prefix(
    model: TransformerBridge, text: str, ids: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Return what `char_ranges` does, for tokenizers without offsets.

    A token ends at the end of the shortest prefix of the text whose tokens include it.
    """
    ranges: list[tuple[int, int]] = []
    start = 0
    for stop in range(len(text) + 1):
        prefix = token_ids(model, text[:stop])
        n_same = 0
        while n_same < min(len(prefix), len(ids)) and prefix[n_same] == ids[n_same]:
            n_same += 1
        if n_same > len(ranges):
            ranges += [(start, stop)] * (n_same - len(ranges))
            start = stop
    return ranges
