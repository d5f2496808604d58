"""Scores of heads by their attention on repeated words, which exist for every model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge
from patchsweep.data.answers import prompt_ids
from patchsweep.errors import ModelError, PromptError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.running import runs_model
from patchsweep.tasks.ioi import NAMES, OBJECTS, PLACES
from patchsweep.tasks.plain import is_text

# class -> the name of its pattern in TransformerLens
DETECTED = {
    "induction": "induction_head",
    "previous_token": "previous_token_head",
    "duplicate_token": "duplicate_token_head",
}
N_TEXTS = 4
N_WORDS = (16, 8, 4)  # words of a text before repetition: the first number that fits the context
Scores = NDArray[np.float32]


def texts(model: TransformerBridge) -> list[str]:
    """Return texts of random words, each repeated once; equal for all models with enough context.

    Raises:
        ModelError: the context is too short.
    """
    words = (*NAMES, *PLACES, *OBJECTS)
    for n in N_WORDS:
        samples = [random.Random(f"heads/{i}").sample(words, n) for i in range(N_TEXTS)]
        repeated = ["".join(f" {word}" for word in (*sample, *sample)) for sample in samples]
        # the model would silently truncate tokens past its context
        if max(model.to_tokens(text).shape[1] for text in repeated) < int(model.cfg.n_ctx):
            return repeated
    raise ModelError(
        f"heads are classed on {N_WORDS[-1]} words said twice, which do not fit the context of "
        f"{model.cfg.model_name}, {model.cfg.n_ctx} tokens; use a model with a longer one"
    )


@runs_model
@torch.no_grad()
def detect_heads(model: TransformerBridge, text: str | Sequence[str] | None = None) -> xr.DataArray:
    """Return the scores [pattern, layer, head] of TransformerLens's `detect_head` on texts.

    `text` is one text or several, over which scores are averaged; default: four texts of random
    words, each said twice. Patterns are `induction`, `previous_token` and `duplicate_token`. A
    score is the mean share of a head's attention to the tokens that an induction,
    previous-token or duplicate-token head attends to, without the first position, where heads
    rest. Only the second half of a text has targets for induction and duplicate-token heads.

    Raises:
        ModelError: the model shows no attention patterns, or its context is too short.
        PromptError: `text` is none, or longer than the context.
    """
    check_bridge(model)
    given = texts(model) if text is None else [text] if isinstance(text, str) else text
    if not is_text(given):
        raise PromptError(f"text={text!r} must be a text, or a list of them")
    for number, one in enumerate(given):
        prompt_ids(model, one, f"text {number}", None)
    scores_of: dict[str, list[Scores]] = {name: [] for name in DETECTED}
    for one in given:
        with cast_while(model, compute_dtype_of(model)):
            scores = _detect(model, one)
        for name in DETECTED:
            scores_of[name].append(scores[name])
    values = np.stack([np.mean(scores, axis=0) for scores in scores_of.values()])
    names: Any = np.array(list(DETECTED), dtype=object)
    return xr.DataArray(values, dims=("pattern", "layer", "head"), coords={"pattern": names})


def _detect(model: TransformerBridge, text: str) -> dict[str, Scores]:
    """Return per pattern the scores [layer, head] on one text."""
    _, cache = model.run_with_cache(
        model.to_tokens(text),
        remove_batch_dim=True,
        names_filter=lambda name: name.endswith("hook_pattern"),
    )
    try:
        scores = {
            name: detect_head(model, text, pattern, cache=cache, exclude_bos=True)
            for name, pattern in DETECTED.items()
        }
    except KeyError as error:
        raise ModelError(
            f"{model.cfg.model_name} shows no attention pattern at {error}, by which "
            "heads are classed; use a model whose blocks all have hook_pattern"
        ) from error
    return {name: values.float().cpu().numpy() for name, values in scores.items()}
