"""Batches: prompt pairs of one length as tensors, with their base and source runs.

Where a pair's prompts have unequal lengths, `Batch.partner` says which position of the source
prompt corresponds to each position of the base prompt, and `Batch.at_base` puts what a runner has
captured of the source run where the base run has it. From then on the two have one length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from patchsweep.data.alignment import NONE, partners
from patchsweep.data.pairs import PromptPair
from patchsweep.errors import PlanError, PromptError
from patchsweep.models.moves import move_together
from patchsweep.spec.interventions import Direction, Intervention, Prompts, Spans, shuffles
from patchsweep.spec.plan import PairShape

Reads = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Pairs whose prompts have the same lengths, and whose answers have, in tokens.

    An answer of several tokens is teacher-forced: all its tokens but the last follow the prompt.
    """

    pairs: tuple[int, ...]  # numbers of the pairs in the sweep
    base: Int[Tensor, "pair pos"]
    source: Int[Tensor, "pair source_pos"]
    reads: Reads  # positions whose logits the metrics read, ascending
    source_reads: Reads  # those of the source run
    answer: Int[Tensor, "pair read"]  # right answer after the clean prompt
    wrong: Int[Tensor, "pair read"]  # right answer after the corrupted prompt
    spans: tuple[Spans, ...]  # label spans in the base prompt, one entry a pair
    # position of the source prompt that corresponds to each of the base prompt's, or `NONE`;
    # None: the same position
    partner: Int[Tensor, "pair pos"] | None = None

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
            partner=None if self.partner is None else self.partner[rows],
        )

    @property
    def differs(self) -> Bool[Tensor, "pair pos"]:
        """Whether the source run may differ from the base run at a position for its token alone."""
        if self.partner is None:
            return self.base != self.source
        return self.partner != torch.arange(self.length, device=self.partner.device)

    def first_difference(self) -> int:
        """Return the first position at which a base and a source prompt differ, or one is read."""
        return min([*self.differs.any(dim=0).nonzero().flatten().tolist(), *self.reads])

    def at_base(self, x: Tensor, start: int = 0, dim: int = 1) -> Tensor:
        """Return the source run's `x` `[pair, ...]` at the positions of the base run, from `start`.

        `dim` is its axis of positions, which begins at `start` too. Where a position has no
        partner there is NaN.
        """
        if self.partner is None:
            return x
        shape = [1] * x.ndim
        shape[0], shape[dim] = len(x), self.length - start
        partner = self.partner[:, start:].to(x.device).view(shape)
        at = (partner - start).clamp(min=0).expand(*x.shape[:dim], -1, *x.shape[dim + 1 :])
        return x.gather(dim, at).masked_fill(partner == NONE, torch.nan)

    @property
    def local(self) -> dict[int, int]:
        """Pair number -> row of the batch."""
        return {pair: row for row, pair in enumerate(self.pairs)}


def base_and_source(pair: PromptPair, direction: Direction) -> tuple[list[int], list[int]]:
    """Return token ids of the base run, which is patched, and of the source run of the values."""
    forced = list(pair.answer[:-1])
    clean, corrupted = [*pair.clean, *forced], [*pair.corrupted, *forced]
    return (corrupted, clean) if direction == "denoising" else (clean, corrupted)


def reads_of(pair: PromptPair, direction: Direction, read: int) -> tuple[Reads, Reads]:
    """Return the positions whose logits are read in the base and in the source run.

    They are one per answer token, from `read` on, a position of the base prompt; a negative one
    counts from the end of each prompt.

    Raises:
        PlanError: `read` lies outside a prompt, or has no partner in the source prompt.
    """
    base, source = base_and_source(pair, direction)
    forced = len(pair.answer) - 1
    reads = []
    for length in (len(base) - forced, len(source) - forced):
        first = read if read >= 0 else length + read
        if not 0 <= first < length:
            raise PlanError(
                f"read={read} lies outside a prompt of {length} tokens; use {-length}..{length - 1}"
            )
        reads.append(first)
    if read >= 0:
        reads[1] = int(partners(base, source)[read])
        if reads[1] == NONE:
            raise PlanError(
                f"read={read} is a position of the base prompt that no position of the source "
                "prompt corresponds to; count from the end, such as read=-1"
            )
    of_base, of_source = (tuple(range(first, first + len(pair.answer))) for first in reads)
    return of_base, of_source


def pair_shape(pair: PromptPair, direction: Direction, read: int) -> PairShape:
    """Return the facts about `pair` that the planner needs."""
    base, source = base_and_source(pair, direction)
    partner = partners(base, source)
    if pair.aligned:
        differs = partner != np.arange(len(base))
    else:
        differs = np.array(base) != np.array(source)
    return PairShape(
        differs=tuple(differs.tolist()),
        reads=reads_of(pair, direction, read)[0],
        spans=spans_of(pair, direction),
        n_forced=len(pair.answer) - 1,
        alone=tuple(np.flatnonzero(partner == NONE).tolist()),
    )


def spans_of(pair: PromptPair, direction: Direction) -> Spans:
    """Return the spans of the pair's labels, which are places of the clean prompt, in the base one.

    Raises:
        PromptError: a label has no token in the base prompt.
    """
    if not pair.aligned or direction == "noising":
        return pair.labels
    partner = partners(*base_and_source(pair, direction))
    spans = {}
    for name, (first, past) in pair.labels.items():
        (inside,) = np.nonzero((first <= partner) & (partner < past))
        if not len(inside):
            raise PromptError(
                f"no token of the corrupted prompt corresponds to the label {name!r}, the tokens "
                f"{list(pair.clean_tokens[first:past])} of the clean one; leave the label out, or "
                "use direction='noising'"
            )
        spans[name] = (int(inside[0]), int(inside[-1]) + 1)
    return spans


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
    groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for number in numbers:
        pair = pairs[number]
        if len(pair.answer) != len(pair.wrong_answer):
            raise PromptError(
                f"pair {number}: the answers {pair.answer_text!r} and {pair.wrong_answer_text!r} "
                f"have {len(pair.answer)} and {len(pair.wrong_answer)} tokens; "
                "use answers of the same number of tokens"
            )
        groups[len(pair.clean), len(pair.corrupted), len(pair.answer)].append(number)
    batches = []
    for members in groups.values():
        members_pairs = [pairs[number] for number in members]
        source_pairs = [pairs[n if source_of is None else source_of[n]] for n in members]
        base = [base_and_source(pair, direction)[0] for pair in members_pairs]
        source = [base_and_source(pair, direction)[1] for pair in source_pairs]
        answers = ([p.answer for p in members_pairs], [p.wrong_answer for p in members_pairs])
        tokens = [torch.tensor(rows, device="cpu") for rows in (base, source, *answers)]
        if members_pairs[0].aligned:
            aligned = [partners(b, s) for b, s in zip(base, source, strict=True)]
            tokens.append(torch.from_numpy(np.stack(aligned)))
        base_there, source_there, answer, wrong, *partner = move_together(tokens, device)
        reads, source_reads = reads_of(members_pairs[0], direction, read)
        batches.append(
            Batch(
                pairs=tuple(members),
                base=base_there,
                source=source_there,
                reads=reads,
                source_reads=source_reads,
                answer=answer,
                wrong=wrong,
                spans=tuple(spans_of(p, direction) for p in members_pairs),
                partner=partner[0] if partner else None,
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
