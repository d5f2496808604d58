"""Scores of a model on a task without patches; a sweep of a failed task explains nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import true_or_false, whole_number
from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.data.show import count, number, table_html, token_html
from patchsweep.errors import PromptError
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model

ANSWER_COLUMNS = (
    "pair", "prompt", "right answer", "probability", "rank", "of the wrong", "rank",
)  # fmt: skip
_ROWS = 8  # prompts per batch: their logits over the whole vocabulary must fit in memory


@dataclass(frozen=True)
class AnswerCheck:
    """Both answers after one prompt of a pair; of answers of several tokens, their first tokens."""

    pair: int
    prompt: str  # clean or corrupted
    right: str  # text of the answer that is right after this prompt
    right_prob: float  # probability of its token
    right_rank: int  # number of more probable tokens; 0: the model's first guess
    wrong_prob: float  # of the answer that is right after the other prompt
    wrong_rank: int

    def row(self, token: Callable[[str], str]) -> list[str]:
        """Return the cells of `ANSWER_COLUMNS`; `token` writes the right answer."""
        right = [number(self.right_prob), count(self.right_rank)]
        wrong = [number(self.wrong_prob), count(self.wrong_rank)]
        return [str(self.pair), self.prompt, token(self.right), *right, *wrong]


@dataclass(frozen=True)
class TaskCheck:
    """A model's score on prompt pairs, without any patch."""

    task: str  # name of the task, or "pairs"
    n_pairs: int  # pairs measured
    seed: int  # of the pairs; 0 for pairs of the user's own
    clean_accuracy: float  # share of clean prompts where `answer` outscores `wrong_answer`
    corrupted_accuracy: float  # share of corrupted prompts where `wrong_answer` outscores `answer`
    clean_logit_diff: float  # mean logit of `answer` minus that of `wrong_answer`, clean prompts
    corrupted_logit_diff: float  # the same on corrupted prompts; below zero when right
    clean_top1: float  # share of clean prompts whose likeliest token is `answer`
    corrupted_top1: float  # share of corrupted prompts whose likeliest token is `wrong_answer`
    answers: tuple[AnswerCheck, ...] = ()  # two for each pair: after its clean prompt and the other

    def _repr_html_(self) -> str:
        """Return a table of both answers after each prompt."""
        return table_html(ANSWER_COLUMNS, [answer.row(token_html) for answer in self.answers])


def check_pairs(model: TransformerBridge, pairs: PromptPairs) -> TaskCheck:
    """Score `model` on pairs, at the last position of each prompt, without any patch.

    A sweep of pairs that the model fails explains nothing. Probabilities are over the whole
    vocabulary; ranks count the tokens that are more probable.

    Raises:
        PromptError: `pairs` are no PromptPairs.
    """
    if not isinstance(pairs, PromptPairs):
        raise PromptError(f"pairs must be PromptPairs, got a {type(pairs).__name__}")
    clean = last_logits(model, pairs, "clean")
    corrupted = last_logits(model, pairs, "corrupted")
    rows = torch.arange(len(pairs), device=clean.device)
    answer = clean.new_tensor([pair.answer[0] for pair in pairs], dtype=torch.long)
    wrong_answer = clean.new_tensor([pair.wrong_answer[0] for pair in pairs], dtype=torch.long)
    clean_diff = clean[rows, answer] - clean[rows, wrong_answer]
    corrupted_diff = corrupted[rows, answer] - corrupted[rows, wrong_answer]
    return TaskCheck(
        task="pairs",
        n_pairs=len(pairs),
        seed=0,
        clean_accuracy=_mean(clean_diff > 0),
        corrupted_accuracy=_mean(corrupted_diff < 0),
        clean_logit_diff=_mean(clean_diff),
        corrupted_logit_diff=_mean(corrupted_diff),
        clean_top1=_mean(clean.argmax(dim=1) == answer),
        corrupted_top1=_mean(corrupted.argmax(dim=1) == wrong_answer),
        answers=tuple(
            one
            for index, pair in enumerate(pairs)
            for one in (
                _answers(index, "clean", pair.answer_text, clean, answer, wrong_answer),
                _answers(
                    index, "corrupted", pair.wrong_answer_text, corrupted, wrong_answer, answer
                ),
            )
        ),
    )


def keep_answered(
    model: TransformerBridge, pairs: PromptPairs, *, rank: int = 0, both: bool = True
) -> PromptPairs:
    """Return the pairs whose right answer is among the model's first guesses.

    What was kept is said in `origin`, which stores record.

    Args:
        rank: how many tokens may be more probable than the right answer's first token; 0: none.
        both: look at both prompts; False: at the clean one alone.

    Raises:
        PromptError: no pair is left, or an argument breaks a rule.
    """
    whole_number("rank", rank, least=0, error=PromptError)
    true_or_false("both", both, error=PromptError)
    failed = {
        one.pair
        for one in check_pairs(model, pairs).answers
        if one.right_rank > rank and (both or one.prompt == "clean")
    }
    kept = tuple(pair for i, pair in enumerate(pairs) if i not in failed)
    prompts = "both prompts" if both else "the clean prompt"
    what = f"rank {rank} or better of the right answer after {prompts}"
    if not kept:
        raise PromptError(
            f"none of {len(pairs)} pairs has {what} in {model.cfg.model_name}; allow a larger "
            "rank, or take other pairs"
        )
    return PromptPairs(kept, (*pairs.origin, f"{len(kept)} of {len(pairs)} pairs kept: {what}"))


def _answers(
    pair: int, prompt: str, text: str, logits: Tensor, right: Tensor, wrong: Tensor
) -> AnswerCheck:
    """Return the numbers of one prompt from its `logits[pair]`."""
    row = logits[pair]
    probs = row.double().softmax(dim=0)
    (right_prob, right_rank), (wrong_prob, wrong_rank) = (
        (float(probs[token]), int((row > row[token]).sum())) for token in (right[pair], wrong[pair])
    )
    return AnswerCheck(pair, prompt, text, right_prob, right_rank, wrong_prob, wrong_rank)


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
    groups: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(len(getattr(pair, side)), []).append(index)
    for group in groups.values():
        for begin in range(0, len(group), _ROWS):
            chunk = group[begin : begin + _ROWS]
            prompts: list[PromptPair] = [pairs[index] for index in chunk]
            tokens = torch.tensor([getattr(pair, side) for pair in prompts], device=device)
            last = model(tokens, return_type="logits")[:, -1]
            logits.update(zip(chunk, last.float().cpu(), strict=True))
    return torch.stack([logits[index] for index in range(len(pairs))])


def _mean(values: Tensor) -> float:
    return values.float().mean().item()
