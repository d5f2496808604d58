"""Rows of joint patches in packed batches, and the place of each of their tokens, block by block.

Pure, like the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from patchsweep.runners.packed.packing import Packing
from patchsweep.runners.packed.schedule import PackedBatch, equal_parts
from patchsweep.spec.joint import JointPlan
from patchsweep.spec.plan import Bools, Ints


@dataclass(frozen=True)
class JointBatch(PackedBatch):
    """Some rows of a plan that run through the blocks together, sorted by base run and start.

    `patch` holds the rows, `pair` the base runs that they continue.
    """

    plan: JointPlan

    @classmethod
    def of(cls, plan: JointPlan, rows: Ints) -> JointBatch:
        """Return the batch of `rows`."""
        return cls(
            sets=(),
            length=plan.length,
            place=rows,
            which=np.zeros_like(rows),
            patch=rows,
            pair=plan.base[rows],
            entry=plan.entry[rows],
            token_entry=plan.entry_stop[rows] < plan.length,
            start=plan.first[rows, -1],
            stop=np.full_like(rows, plan.length),
            plan=plan,
        )

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.plan.n_layers

    @property
    def n_pairs(self) -> int:
        """Base runs that rows may continue."""
        return self.plan.n_bases

    @property
    def reads(self) -> Bools:
        """[base run, pos] whether a metric reads the logits there."""
        return np.broadcast_to(self.plan.reads, (self.plan.n_bases, self.length))

    @cached_property
    def write_layers(self) -> Bools:
        """[row, layer] whether the row writes something there."""
        table = np.zeros((self.plan.n_rows, self.n_layers + 1), bool)
        table[self.plan.writes.row, self.plan.write_layer] = True
        return table[self.patch]

    @cached_property
    def writes_of(self) -> Ints:
        """[write] index of each write of the batch's rows in the plan's writes."""
        return np.flatnonzero(np.isin(self.plan.writes.row, self.patch))

    def final_tokens(self) -> tuple[Ints, Ints]:
        """Return row of the batch and position of each token behind the last block."""
        return _tokens(self.start, self.length - self.start)

    def packings(self) -> Iterator[Packing]:
        """Yield the packings from the first block to the final residual."""
        plan, rows, base = self.plan, self.patch, self.pair
        before = np.zeros(len(rows), np.int64)
        first_before = plan.first[rows, 0]
        offset_before = np.zeros(len(rows), np.int64)
        none = np.empty(0, np.int64)
        for layer in range(int(self.entry.min()), plan.n_layers + 1):
            first, counts = plan.first[rows, layer], plan.counts(rows, layer)
            offsets = np.concatenate([[0], np.cumsum(counts)])
            row, pos = _tokens(first, counts)
            within = pos - first_before[row]
            carried = (within >= 0) & (within < before[row])
            active = np.flatnonzero(counts)
            yield Packing(
                layer=layer,
                rows=active,
                offsets=np.concatenate([offsets[active], offsets[-1:]]),
                start=first[active],
                pair=base[active],
                token_pair=base[row],
                token_pos=pos,
                carried_from=(offset_before[row] + within)[carried],
                carried_to=np.flatnonzero(carried),
                write_token=none,
                write_row=none,
                same=bool(np.array_equal(before, counts) and np.array_equal(first, first_before)),
            )
            before, first_before, offset_before = counts, first, offsets[:-1]


def joint_batches(
    plan: JointPlan, max_tokens: int, rows: Ints | None = None
) -> Iterator[JointBatch]:
    """Yield batches of `rows` (None: all) of about `max_tokens` tokens and of equal size."""
    if rows is None:
        rows = np.arange(plan.n_rows)
    first = plan.first[:, -1]
    rows = rows[np.lexsort((first[rows], plan.base[rows], plan.entry[rows]))]
    for part in equal_parts(rows, plan.length - first[rows], max_tokens):
        order = np.lexsort((plan.entry[part], first[part], plan.base[part]))
        yield JointBatch.of(plan, part[order])


def _tokens(first: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """Return row and position of each token, `counts[row]` from `first[row]` on."""
    row = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, first[row] + within
