"""How heads attend: on repeated words, where every model can be asked, and on a task's labels."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.head_detector import detect_head
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ModelError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.running import runs_model
from patchsweep.tasks.ioi import NAMES, OBJECTS, PLACES

# class -> the name of its pattern in TransformerLens
DETECTED = {
    "induction": "induction_head",
    "previous_token": "previous_token_head",
    "duplicate_token": "duplicate_token_head",
}
N_TEXTS = 4
N_WORDS = (16, 8, 4)  # of a text, which are then said again: as many as the context takes
Scores = NDArray[np.float32]


def texts(model: TransformerBridge) -> list[str]:
    """Random words, said twice: the same ones for every model whose context takes them.

    Raises:
        ModelError: the context is too short.
    """
    words = (*NAMES, *PLACES, *OBJECTS)
    for n in N_WORDS:
        chosen = [random.Random(f"heads/{i}").sample(words, n) for i in range(N_TEXTS)]
        found = ["".join(f" {word}" for word in (*some, *some)) for some in chosen]
        # tokens past the context are cut off without a word
        if max(model.to_tokens(text).shape[1] for text in found) < int(model.cfg.n_ctx):
            return found
    raise ModelError(
        f"heads are classed on {N_WORDS[-1]} words said twice, which do not fit the context of "
        f"{model.cfg.model_name}, {model.cfg.n_ctx} tokens; use a model with a longer one"
    )


@runs_model
@torch.no_grad()
def detect(model: TransformerBridge) -> xr.DataArray:
    """Scores [pattern, layer, head] of TransformerLens's `detect_head`, means over `texts`.

    A score is the share of a head's attention that lies where an induction, previous-token or
    duplicate-token head would look; attention to the first position, where heads rest, is left
    out. The second half of a text alone has something to be found by the first and the last.

    Raises:
        ModelError: the model shows no attention patterns, or its context is too short.
    """
    found: dict[str, list[Scores]] = {name: [] for name in DETECTED}
    for text in texts(model):
        with cast_while(model, compute_dtype_of(model)):
            scores = _detect(model, text)
        for name in DETECTED:
            found[name].append(scores[name])
    values = np.stack([np.mean(scores, axis=0) for scores in found.values()])
    names: Any = np.array(list(DETECTED), dtype=object)
    return xr.DataArray(values, dims=("pattern", "layer", "head"), coords={"pattern": names})


def _detect(model: TransformerBridge, text: str) -> dict[str, Scores]:
    """Per pattern the scores [layer, head] on one text."""
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
