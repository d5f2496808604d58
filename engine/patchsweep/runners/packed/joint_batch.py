"""Rows of joint patches in packed batches, and what they write at a block: whose values, where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from patchsweep_kernels.scatter import Targets, scatter_targets
from torch import Tensor

from patchsweep.models.moves import on_cpu, sent
from patchsweep.runners.packed.schedule import PackedBatch, equal_parts
from patchsweep.runners.packed.tables import PackedInput, n_units
from patchsweep.spec.directions import Live, Numbered
from patchsweep.spec.joint import WHOLE, JointPlan
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


# (site's name, intervention) -> per layer at which they are written, values [pair, pos, width]
Values = Mapping[tuple[str, int], Sequence[Tensor]]


@dataclass(frozen=True)
class JointLoaded:
    """A captured batch with the values of several interventions."""

    loaded: Any  # what the runner's `load` returned
    values: Values
    live: Mapping[int, Live]  # interventions that change what they meet; their values: the source's


@dataclass(frozen=True, eq=False)
class JointTargets:
    """Where the values of one intervention are written at one site and layer."""

    value: int  # the intervention
    to: Targets
    n_units: int = 0  # units of a vector; 0: whole vectors are written
    numbers: Ints | None = None  # of a `Numbered` intervention's vectors


class JointWrites:
    """What the rows of one joint batch write."""

    def __init__(self, batch: JointBatch, given: PackedInput, loaded: JointLoaded) -> None:
        self.batch, self.given, self.loaded = batch, given, loaded
        self._cells: dict[tuple[str, int], dict[int, Ints]] = {}  # site, layer -> value -> writes
        self._row_of = np.full(batch.plan.n_rows, -1, np.int64)
        self._row_of[batch.patch] = np.arange(len(batch.patch))
        names = [site.name for site in batch.plan.sites]
        writes, write_layer = batch.plan.writes, batch.plan.write_layer
        mine = batch.writes_of
        order = mine[np.lexsort((writes.value[mine], write_layer[mine], writes.site[mine]))]
        key = np.stack([writes.site, write_layer, writes.value])[:, order]
        cuts = np.flatnonzero((key[:, 1:] != key[:, :-1]).any(axis=0)) + 1
        for part in np.split(order, cuts) if len(order) else ():
            i = part[0]
            at = self._cells.setdefault((names[writes.site[i]], int(write_layer[i])), {})
            at[int(writes.value[i])] = part

    def at(self, layer: int, token: Callable[[Ints, Ints], Ints]) -> dict[str, list[JointTargets]]:
        """Return where values go at a block, by site, on the CPU.

        `token` returns the packed index of a row of the batch and a position; -1: it does not run.
        """
        names = [name for name, at in self._cells if at == layer]
        return {name: [*self._targets(name, layer, token)] for name in names}

    def _targets(
        self, name: str, layer: int, token: Callable[[Ints, Ints], Ints]
    ) -> Iterator[JointTargets]:
        """Yield where values go at one site: of each intervention, whole vectors first."""
        plan = self.batch.plan
        for value, cells in self._cells[name, layer].items():
            writes = plan.writes.at(cells)
            at = token(self._row_of[writes.row], writes.pos)
            runs = at >= 0
            writes, at = writes.at(runs), at[runs]
            if isinstance(self.loaded.live.get(value), Numbered):
                yield JointTargets(value, Targets.of(on_cpu(at)), numbers=writes.unit)
                continue
            length, width = self.loaded.values[name, value][layer].shape[-2:]
            source = plan.pair[writes.row] * length + writes.pos
            whole = writes.unit == WHOLE
            if whole.any():
                yield JointTargets(value, Targets.of(on_cpu(at[whole]), on_cpu(source[whole])))
            if not whole.all():
                site = next(site for site in plan.sites if site.name == name)
                n = n_units(self.given.base, site, layer, width)
                unit = writes.unit[~whole]
                to = Targets.of(on_cpu(at[~whole]), on_cpu(source[~whole] * n + unit), on_cpu(unit))
                yield JointTargets(value, to, n)

    def write(
        self,
        x: Tensor,
        layer: int,
        made: Mapping[str, Sequence[JointTargets]],
        sites: Sequence[str],
    ) -> None:
        """Write the values at `sites` into `x` `[.., token, width]`, in place; `made`: see `at`."""
        for name in sites:
            for targets in made.get(name, ()):
                self._write(x, name, layer, targets)

    def _write(self, x: Tensor, name: str, layer: int, targets: JointTargets) -> None:
        to = targets.to
        given = self.loaded.live.get(targets.value)
        if isinstance(given, Numbered):
            flat = x.view(-1, x.shape[-1])
            added = sent(given.vectors(on_cpu(targets.numbers)), x.device).to(x)
            scatter_targets(flat, flat[to.token] + added, to)
            return
        layer_values = self.loaded.values[name, targets.value][layer].to(x)
        flat, values = x.view(-1, x.shape[-1]), layer_values.reshape(-1, layer_values.shape[-1])
        if to.head is not None:
            flat = flat.view(len(flat), targets.n_units, -1)
            values = values.view(len(values) * targets.n_units, -1)
        live = given if name != "embed" else None
        if live is None:
            scatter_targets(flat, values, to)
            return
        site = next(site for site in self.batch.plan.sites if site.name == name)
        met = flat[to.token] if to.head is None else flat[to.token, to.head]
        new = live.applied(site, layer - site.shift, met, values[to.source])
        scatter_targets(flat, new, replace(to, source=None, n_cells=len(new)))
