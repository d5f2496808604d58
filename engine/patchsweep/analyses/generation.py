"""`continuations`: what patches of a prompt do to the text that the model writes after it.

The reference is the greedy continuation of the source run. Up to the first token that differs from
it, a patched run's own greedy continuation has read the reference's tokens; so one pass over prompt
and reference, with the patch at the prompt alone, gives its probability, the first divergence and
whether all of it is matched. No token is written one at a time but the reference's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import one_of, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import context_size
from patchsweep.errors import PromptError
from patchsweep.forward.casting import cast_while
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.spec.metrics import METRICS, Logits, Metric
from patchsweep.spec.spec import SweepSpec, check_pairs, make_experiment
from patchsweep.sweeps.api import sweep

PROMPT = "prompt"  # label of the whole prompt, for patches over all its positions
Reference = Literal["source", "base"]


def _first_divergence(x: Logits) -> Tensor:
    """Return how many of the first tokens are all the most probable ones."""
    assert x.full is not None
    same = ~(x.full > x.answer.unsqueeze(-1)).any(dim=-1)
    return same.cumprod(dim=1).sum(dim=1).float()


def _exact_match(x: Logits) -> Tensor:
    """Return 1 where every token is the most probable one, else 0."""
    return (_first_divergence(x) == x.answer.shape[1]).float()


FIRST_DIVERGENCE = Metric(
    "first_divergence", "tokens", "vocab", _first_divergence, smooth=False, version="1"
)
EXACT_MATCH = Metric("exact_match", "", "vocab", _exact_match, smooth=False, version="1")


@runs_model
def continuations(
    model: TransformerBridge,
    pairs: PromptPairs,
    sites: str | Sequence[str] = SweepSpec.sites,
    *,
    n_tokens: int = 8,
    reference: Reference = "source",
    positions: Any = SweepSpec.positions,
    store: str | Path | None = None,
    **settings: Any,
) -> xr.Dataset:
    """Return what every patch of a prompt does to a continuation of `n_tokens` tokens.

    The Dataset is that of `sweep` with three metrics. `log_prob` is the log-probability of the
    reference continuation in nats, `first_divergence` the number of tokens that the patched run's
    greedy continuation shares with it before the first other one (`n_tokens` if all), and
    `exact_match` 1 where all are shared. The coordinate `continuation` [pair] is the reference's
    text. A patch is held at the prompt: tokens of the continuation are never patched.

    Args:
        n_tokens: length of the continuation. End tokens count as tokens.
        reference: the run whose greedy continuation is the reference: `source`, which a patch
            brings back, or `base`, which it takes away.
        positions: as in `sweep`; `"all"` and the default cover the prompt alone.
        settings: other arguments of `sweep` but metrics, method and read.

    Raises:
        PatchsweepError: an argument breaks a rule, or prompt and continuation are longer than the
            context; raised before any patch runs.
    """
    whole_number("n_tokens", n_tokens, least=1)
    one_of("reference", reference, get_args(Reference))
    check_pairs(model, pairs)
    longest = max(len(pair) for pair in pairs)
    if longest + n_tokens - 1 > context_size(model):
        raise PromptError(
            f"n_tokens={n_tokens} after a prompt of {longest} tokens does not fit the context of "
            f"{context_size(model)} tokens; use at most {context_size(model) - longest + 1}"
        )
    names = ("direction", "intervention", "means_from")
    asked = {name: settings[name] for name in names if name in settings}
    experiment = make_experiment(model, pairs, SweepSpec(sites, **asked), ())
    of_clean = (experiment.direction == "noising") == (reference == "base")
    ids = _greedy(model, pairs, "clean" if of_clean else "corrupted", n_tokens)
    tokenizer: Any = model.tokenizer
    texts = [tokenizer.decode(list(one)) for one in ids]
    continued = PromptPairs(
        tuple(
            replace(
                pair,
                answer=one,
                wrong_answer=one,
                answer_text=text,
                labels={**pair.labels, PROMPT: (0, len(pair))},
            )
            for pair, one, text in zip(pairs, ids, texts, strict=True)
        )
    )
    equal = all(len(pair) == longest for pair in pairs)
    if positions is None:
        positions = range(longest) if equal else range(-longest, 0)
    ds = sweep(
        model,
        continued,
        sites,
        [METRICS["log_prob"], FIRST_DIVERGENCE, EXACT_MATCH],
        positions=[PROMPT] if positions == "all" else positions,
        store=store,
        **settings,
    )
    if positions == "all":
        ds = ds.isel(pos=0, drop=True)
    return ds.assign_coords(continuation=("pair", ds["answer"].values)).drop_vars(
        ["answer", "wrong_answer"]
    )


@torch.no_grad()
def _greedy(
    model: TransformerBridge, pairs: PromptPairs, side: str, n_tokens: int
) -> list[tuple[int, ...]]:
    """Return the most probable continuation of each pair's `side`, token by token."""
    found: list[list[int]] = [[] for _ in pairs]
    for group in pairs.by_length().values():
        tokens = torch.tensor([getattr(pairs[i], side) for i in group], device=device_of(model))
        for _ in range(n_tokens):
            with cast_while(model, compute_dtype_of(model)):
                logits = model(tokens, return_type="logits")[:, -1]
            following = logits.argmax(dim=-1, keepdim=True)
            tokens = torch.cat([tokens, following.to(tokens.device)], dim=1)
            for index, token in zip(group, following.flatten().tolist(), strict=True):
                found[index].append(token)
    return [tuple(ids) for ids in found]
