"""Batches: prompt pairs of one length as tensors, with their base and source runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from patchsweep.data.pairs import PromptPair
from patchsweep.errors import PlanError, PromptError
from patchsweep.models.moves import move_together
from patchsweep.spec.interventions import Direction, Intervention, Prompts, Spans, shuffles
from patchsweep.spec.plan import PairShape


@dataclass(frozen=True)
class Batch:
    """Pairs whose prompts have one length and whose answers have one length, in tokens.

    An answer of several tokens is teacher-forced: all its tokens but the last follow the prompt.
    """

    pairs: tuple[int, ...]  # numbers of the pairs in the sweep
    base: Int[Tensor, "pair pos"]
    source: Int[Tensor, "pair pos"]
    reads: tuple[int, ...]  # positions whose logits the metrics read, ascending
    answer: Int[Tensor, "pair read"]  # right answer after the clean prompt
    wrong: Int[Tensor, "pair read"]  # right answer after the corrupted prompt
    spans: tuple[Spans, ...]  # label spans, one entry a pair

    @property
    def length(self) -> int:
        return self.base.shape[1]

    @property
    def differ(self) -> Int[Tensor, " pair"]:
        """Index of the first token in which the right and the wrong answer differ."""
        return (self.answer != self.wrong).int().argmax(dim=1)

    def rows(self, rows: Sequence[int]) -> Batch:
        """Return the batch of some of the pairs."""
        return replace(
            self,
            pairs=tuple(self.pairs[row] for row in rows),
            base=self.base[rows],
            source=self.source[rows],
            answer=self.answer[rows],
            wrong=self.wrong[rows],
            spans=tuple(self.spans[row] for row in rows),
        )

    def first_difference(self) -> int:
        """Return the first position at which a base and a source prompt differ, or one is read."""
        differs = (self.base != self.source).any(dim=0).nonzero()
        return min([*differs.flatten().tolist(), *self.reads])

    @property
    def local(self) -> dict[int, int]:
        """Pair number -> row of the batch."""
        return {pair: row for row, pair in enumerate(self.pairs)}


def base_and_source(pair: PromptPair, direction: Direction) -> tuple[list[int], list[int]]:
    """Return token ids of the base run, which is patched, and of the source run of the values."""
    forced = list(pair.answer[:-1])
    clean, corrupted = [*pair.clean, *forced], [*pair.corrupted, *forced]
    return (corrupted, clean) if direction == "denoising" else (clean, corrupted)


def reads_of(pair: PromptPair, read: int) -> tuple[int, ...]:
    """Return the positions whose logits are read: one per answer token, from `read` on.

    `read` is a prompt position; a negative one counts from the end.

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
    """Return the facts about `pair` that the planner needs."""
    base, source = base_and_source(pair, direction)
    return PairShape(
        differs=tuple(b != s for b, s in zip(base, source, strict=True)),
        reads=reads_of(pair, read),
        spans=pair.labels,
        n_forced=len(base) - len(pair),
    )


def make_batches(
    pairs: Sequence[PromptPair],
    numbers: Sequence[int],
    direction: Direction,
    read: int,
    device: torch.device,
    source_of: Mapping[int, int] | None = None,
) -> list[Batch]:
    """Return the pairs `numbers` as batches, one per length of prompt and answer.

    `source_of` maps a pair to the pair whose source prompt it uses; None: each pair its own.

    Raises:
        PromptError: the two answers of a pair differ in length.
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
        members_pairs = [pairs[number] for number in members]
        source_pairs = [pairs[n if source_of is None else source_of[n]] for n in members]
        base = [base_and_source(pair, direction)[0] for pair in members_pairs]
        source = [base_and_source(pair, direction)[1] for pair in source_pairs]
        answers = ([p.answer for p in members_pairs], [p.wrong_answer for p in members_pairs])
        tokens = (torch.tensor(rows, device="cpu") for rows in (base, source, *answers))
        there = move_together(tokens, device)
        batches.append(
            Batch(
                pairs=tuple(members),
                base=there[0],
                source=there[1],
                reads=reads_of(members_pairs[0], read),
                answer=there[2],
                wrong=there[3],
                spans=tuple(p.labels for p in members_pairs),
            )
        )
    return batches


def sources_of(
    pairs: Sequence[PromptPair], interventions: Sequence[Intervention]
) -> dict[int, int] | None:
    """Map each pair to the one whose source run a shuffling intervention takes; None: its own.

    It is the next pair whose prompts and answers have the same number of tokens.

    Raises:
        PromptError: no other pair has the same number of tokens.
    """
    shuffling = [x.name for x in interventions if shuffles(x)]
    return _next_of_length(pairs, shuffling[0]) if shuffling else None


def _next_of_length(pairs: Sequence[PromptPair], name: str) -> dict[int, int]:
    """Map each pair to the next of its length; `name` is the intervention's, for the error."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, pair in enumerate(pairs):
        groups[len(pair.clean), len(pair.answer)].append(number)
    for (length, _), members in groups.items():
        if len(members) < 2:
            raise PromptError(
                f"intervention={name} takes values from another pair of the same length, but only "
                f"pair {members[0]} has {length} tokens; add pairs or use resample"
            )
    return {
        number: members[(i + 1) % len(members)]
        for members in groups.values()
        for i, number in enumerate(members)
    }


def clean_prompts(batches: Sequence[Batch], direction: Direction) -> list[Prompts]:
    """Return the clean prompts of `batches`, as `Intervention.prepare` takes them."""
    denoising = direction == "denoising"
    return [Prompts(b.source if denoising else b.base, b.spans) for b in batches]
