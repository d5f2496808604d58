"""Batches: prompt pairs of one length as tensors, each run named by its part in the patch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from patchsweep.data.pairs import PromptPair
from patchsweep.errors import PlanError, PromptError
from patchsweep.spec.interventions import Direction, Prompts, Spans
from patchsweep.spec.plan import PairShape


@dataclass(frozen=True)
class Batch:
    """Pairs whose prompts, and whose answers, have the same number of tokens.

    An answer of several tokens is teacher-forced: its tokens but the last follow the prompt.
    """

    pairs: tuple[int, ...]  # their numbers in the sweep
    base: Int[Tensor, "pair pos"]
    source: Int[Tensor, "pair pos"]
    reads: tuple[int, ...]  # positions whose logits the metrics read, ascending
    answer: Int[Tensor, "pair read"]  # right answer after the clean prompt
    wrong: Int[Tensor, "pair read"]  # right answer after the corrupted prompt
    spans: tuple[Spans, ...]  # of each pair

    @property
    def length(self) -> int:
        return self.base.shape[1]

    @property
    def differ(self) -> Int[Tensor, " pair"]:
        """Which token of its two answers is the first that tells them apart."""
        return (self.answer != self.wrong).int().argmax(dim=1)

    @property
    def local(self) -> dict[int, int]:
        """Pair number to row of the batch."""
        return {pair: row for row, pair in enumerate(self.pairs)}


def base_and_source(pair: PromptPair, direction: Direction) -> tuple[list[int], list[int]]:
    """Token ids of the run that is patched into and of the run that values come from."""
    forced = list(pair.answer[:-1])
    clean, corrupted = [*pair.clean, *forced], [*pair.corrupted, *forced]
    return (corrupted, clean) if direction == "denoising" else (clean, corrupted)


def reads_of(pair: PromptPair, read: int) -> tuple[int, ...]:
    """The positions read: from prompt position `read` (negative: from the end) one per token.

    Raises:
        PlanError: `read` lies outside the prompt.
    """
    length = len(pair.clean)
    first = read if read >= 0 else length + read
    if not 0 <= first < length:
        raise PlanError(
            f"read={read} lies outside a prompt of {length} tokens; use {-length}..{length - 1}"
        )
    return tuple(range(first, first + len(pair.answer)))


def pair_shape(pair: PromptPair, direction: Direction, read: int) -> PairShape:
    """What the planner needs to know of `pair`."""
    base, source = base_and_source(pair, direction)
    return PairShape(
        differs=tuple(b != s for b, s in zip(base, source, strict=True)),
        reads=reads_of(pair, read),
        spans=pair.labels,
    )


def make_batches(
    pairs: Sequence[PromptPair],
    numbers: Sequence[int],
    direction: Direction,
    read: int,
    device: torch.device,
    source_of: Mapping[int, int] | None = None,
) -> list[Batch]:
    """The pairs `numbers`, grouped by length.

    `source_of` names the pair whose source prompt takes the place of each pair's own.

    Raises:
        PromptError: the two answers of a pair of several tokens differ in length.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number in numbers:
        pair = pairs[number]
        if len(pair.answer) != len(pair.wrong_answer):
            raise PromptError(
                f"pair {number}: the answers {pair.answer_text!r} and {pair.wrong_answer_text!r} "
                f"have {len(pair.answer)} and {len(pair.wrong_answer)} tokens; "
                "use answers of the same number of tokens"
            )
        groups[len(pair.clean), len(pair.answer)].append(number)
    batches = []
    for members in groups.values():
        chosen = [pairs[number] for number in members]
        donors = [pairs[n if source_of is None else source_of[n]] for n in members]
        base = [base_and_source(pair, direction)[0] for pair in chosen]
        source = [base_and_source(pair, direction)[1] for pair in donors]
        batches.append(
            Batch(
                pairs=tuple(members),
                base=torch.tensor(base, device=device),
                source=torch.tensor(source, device=device),
                reads=reads_of(chosen[0], read),
                answer=torch.tensor([p.answer for p in chosen], device=device),
                wrong=torch.tensor([p.wrong_answer for p in chosen], device=device),
                spans=tuple(p.labels for p in chosen),
            )
        )
    return batches


def next_of_length(pairs: Sequence[PromptPair]) -> dict[int, int]:
    """Pair -> the next pair whose prompts and answers have the same number of tokens.

    Raises:
        PromptError: a pair has no such other pair.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        groups[len(pair.clean), len(pair.answer)].append(number)
    for (length, _), members in groups.items():
        if len(members) < 2:
            raise PromptError(
                "intervention=shuffle takes values from another pair of the same length, but only "
                f"pair {members[0]} has {length} tokens; add pairs or use resample"
            )
    return {
        number: members[(i + 1) % len(members)]
        for members in groups.values()
        for i, number in enumerate(members)
    }


def clean_prompts(batches: Sequence[Batch], direction: Direction) -> list[Prompts]:
    """What `Intervention.prepare` takes."""
    denoising = direction == "denoising"
    return [Prompts(b.source if denoising else b.base, b.spans) for b in batches]
