"""Rows of joint patches in packed batches, and the place of each of their tokens, block by block.

Pure, like the planner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

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

    def tokens_at(self, layer: int) -> tuple[Ints, Ints]:
        """See `PackedBatch`."""
        return self.plan.first[self.patch, layer], self.plan.counts(self.patch, layer)


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
