"""Scores of a model on a task without patches; a sweep of a failed task explains nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.tasks.base import Task, load_pairs

_ROWS = 8  # prompts per batch: their logits over the whole vocabulary must fit in memory


@dataclass(frozen=True)
class TaskCheck:
    """A model's score on the pairs of a task, without any patch."""

    task: str  # name of the task
    n_pairs: int  # pairs measured
    seed: int  # of the pairs
    clean_accuracy: float  # share of clean prompts where `answer` outscores `wrong_answer`
    corrupted_accuracy: float  # share of corrupted prompts where `wrong_answer` outscores `answer`
    clean_logit_diff: float  # mean logit of `answer` minus that of `wrong_answer`, clean prompts
    corrupted_logit_diff: float  # the same on corrupted prompts; below zero when right
    clean_top1: float  # share of clean prompts whose likeliest token is `answer`
    corrupted_top1: float  # share of corrupted prompts whose likeliest token is `wrong_answer`


def check_pairs(
    model: TransformerBridge, task: Task, n_pairs: int | None, seed: int, **options: Any
) -> TaskCheck:
    """Score `model` on pairs of `task`, at the last position of each prompt.

    Raises:
        PromptError: as `load_pairs`.
    """
    pairs = load_pairs(model, task, n_pairs, seed, **options)
    clean = last_logits(model, pairs, "clean")
    corrupted = last_logits(model, pairs, "corrupted")
    rows = torch.arange(len(pairs), device=clean.device)
    answer = clean.new_tensor([pair.answer[0] for pair in pairs], dtype=torch.long)
    wrong_answer = clean.new_tensor([pair.wrong_answer[0] for pair in pairs], dtype=torch.long)
    clean_diff = clean[rows, answer] - clean[rows, wrong_answer]
    corrupted_diff = corrupted[rows, answer] - corrupted[rows, wrong_answer]
    return TaskCheck(
        task=task.name,
        n_pairs=len(pairs),
        seed=seed,
        clean_accuracy=_mean(clean_diff > 0),
        corrupted_accuracy=_mean(corrupted_diff < 0),
        clean_logit_diff=_mean(clean_diff),
        corrupted_logit_diff=_mean(corrupted_diff),
        clean_top1=_mean(clean.argmax(dim=1) == answer),
        corrupted_top1=_mean(corrupted.argmax(dim=1) == wrong_answer),
    )


@runs_model
@torch.no_grad()
def last_logits(
    model: TransformerBridge, pairs: PromptPairs, side: str
) -> Float[Tensor, "pair d_vocab"]:
    """Return fp32 logits on the CPU after the clean or corrupted (`side`) prompt of each pair.

    Runs small batches of prompts of equal length, since padding changes some models' outputs.
    """
    logits: dict[int, Tensor] = {}
    device = device_of(model)
    for group in pairs.by_length().values():
        for begin in range(0, len(group), _ROWS):
            chunk = group[begin : begin + _ROWS]
            prompts: list[PromptPair] = [pairs[index] for index in chunk]
            tokens = torch.tensor([getattr(pair, side) for pair in prompts], device=device)
            last = model(tokens, return_type="logits")[:, -1]
            logits.update(zip(chunk, last.float().cpu(), strict=True))
    return torch.stack([logits[index] for index in range(len(pairs))])


def _mean(values: Tensor) -> float:
    return values.float().mean().item()
