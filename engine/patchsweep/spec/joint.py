"""Joint patches: which vectors each row writes, which of them are proven dead, where a row begins.

Pure, like the planner: plain data in, plain data out. A row is one set of patches on one pair. It
is described by its single writes, one vector each: a site, a layer, a position, and a head (or all
of them). A write whose value equals the base run's can still matter: downstream of another write
it restores the base run's value. So a write is dead only if nothing changed reaches it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np

from patchsweep.spec.plan import Bools, Ints
from patchsweep.spec.sites import Site

WHOLE = -1  # the unit of a write that covers all of them


@dataclass(frozen=True)
class Writes:
    """Vectors that rows replace; arrays `[write]`, sorted by row."""

    row: Ints
    site: Ints  # index into the plan's sites
    layer: Ints  # the site's own; 0 for a site without layers
    pos: Ints
    unit: Ints  # head, key head or neuron; WHOLE: all of them
    value: Ints  # index into the interventions that make the values

    def __len__(self) -> int:
        return len(self.row)

    def at(self, index: Ints | Bools) -> Writes:
        """Return the writes `index`."""
        return Writes(*(getattr(self, field.name)[index] for field in fields(self)))


@dataclass(frozen=True)
class JointPlan:
    """Rows that run together, each with several writes, on base runs of prompts of one length."""

    sites: tuple[Site, ...]
    n_layers: int
    reads: Bools  # [pos] whether a metric reads the logits there; ends at the last that is read
    pair: Ints  # [row] its pair's row in the batch, for values and metrics
    base: Ints  # [row] the run that it continues, an index into the caches
    n_bases: int
    writes: Writes  # the live ones

    @property
    def length(self) -> int:
        """Tokens up to the last position that is read."""
        return len(self.reads)

    @property
    def n_rows(self) -> int:
        return len(self.pair)

    @cached_property
    def write_layer(self) -> Ints:
        """[write] block at which it is written: at its input, or inside."""
        shift = np.array([site.shift for site in self.sites], np.int64)
        return self.writes.layer + shift[self.writes.site]

    @cached_property
    def first(self) -> Ints:
        """[row, layer] first token that runs through each block; `length` before the first write.

        Never rises with the layer: a later write at an earlier position adds tokens.
        """
        first = np.full((self.n_rows, self.n_layers + 1), self.length, np.int64)
        np.minimum.at(first, (self.writes.row, self.write_layer), self.writes.pos)
        return np.minimum.accumulate(first, axis=1)

    @cached_property
    def entry(self) -> Ints:
        """[row] first block that the row runs through; n_layers: the unembedding alone."""
        return np.where(self.live, (self.first < self.length).argmax(axis=1), self.n_layers)

    @cached_property
    def live(self) -> Bools:
        """[row] whether any of its writes can change a metric."""
        return np.bincount(self.writes.row, minlength=self.n_rows) > 0

    @cached_property
    def entry_stop(self) -> Ints:
        """[row] past the last token that runs through the entry block.

        If all writes there change their own token alone, no other token runs through it.
        """
        by_token = np.array([s.reach == "token" and not s.shift for s in self.sites], bool)
        here = self.write_layer == self.entry[self.writes.row]
        stop = np.where(by_token[self.writes.site], self.writes.pos + 1, self.length)
        most = np.zeros(self.n_rows, np.int64)
        np.maximum.at(most, self.writes.row[here], stop[here])
        return most

    def counts(self, rows: Ints, layer: int) -> Ints:
        """Return `[row]` tokens of each of `rows` at the input of block `layer`."""
        entry = self.entry[rows]
        stop = np.where(entry == layer, self.entry_stop[rows], self.length)
        counts = np.where(entry > layer, 0, stop - self.first[rows, layer])
        return counts if layer < self.n_layers else self.length - self.first[rows, layer]

    @property
    def token_layers(self) -> int:
        """Tokens times blocks of all rows."""
        rows = np.flatnonzero(self.live)
        return sum(int(self.counts(rows, layer).sum()) for layer in range(self.n_layers))

    @cached_property
    def n_write_layers(self) -> Ints:
        """[row] number of blocks at which something is written."""
        table = np.zeros((self.n_rows, self.n_layers + 1), bool)
        table[self.writes.row, self.write_layer] = True
        return table.sum(axis=1)

    @property
    def shared_token_layers(self) -> int:
        """Tokens times blocks of all rows, where those with equal lowest writes share them."""
        alone, stems = shared_stems(self)
        shared = sum(stem.plan.token_layers + stem.rest.token_layers for stem in stems)
        return self.part(alone).token_layers + shared

    def distinct(self) -> tuple[Ints, Ints]:
        """Return the first of each group of rows with the same live writes, and `[row]` which of
        these each row equals. Sets that differ in dead writes alone are such rows."""
        everything = np.ones(len(self.writes), bool)
        numbers: dict[tuple[int, bytes], int] = {}
        keys = _keys(self, everything, range(self.n_rows))
        of = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
        return np.unique(of, return_index=True)[1], of

    def part(self, rows: Ints) -> JointPlan:
        """Return the plan of `rows` alone, in that order."""
        number = np.full(self.n_rows, -1, np.int64)
        number[rows] = np.arange(len(rows))
        mine = number[self.writes.row] >= 0
        return self.with_rows(
            self.pair[rows], self.base[rows], self.n_bases, self.writes.at(mine), number
        )

    def with_rows(
        self, pair: Ints, base: Ints, n_bases: int, writes: Writes, number: Ints
    ) -> JointPlan:
        """Return a plan of other rows; `number[row]` is the new number of a write's row."""
        row = number[writes.row]
        order = np.argsort(row, kind="stable")
        moved = Writes(row, *(getattr(writes, f.name) for f in fields(writes)[1:])).at(order)
        return JointPlan(self.sites, self.n_layers, self.reads, pair, base, n_bases, moved)


@dataclass(frozen=True)
class Stem:
    """Rows that share the writes of their lowest layer with others."""

    plan: JointPlan  # one row for each set of shared writes
    rest: JointPlan  # the rows, with their other writes; `base`: the row of `plan` they continue
    rows: Ints  # [row of rest] row of the plan that was divided

    def part(self, stems: range) -> Stem:
        """Return the rows that continue some of the stems."""
        mine = np.flatnonzero((self.rest.base >= stems.start) & (self.rest.base < stems.stop))
        rest = self.rest.part(mine)
        number = np.arange(rest.n_rows)
        rest = rest.with_rows(rest.pair, rest.base - stems.start, len(stems), rest.writes, number)
        return Stem(self.plan.part(np.arange(stems.start, stems.stop)), rest, self.rows[mine])


def _keys(plan: JointPlan, mine: Bools, rows: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Yield a key for each of `rows`; rows with the same pair and writes `mine` have equal ones."""
    writes = plan.writes.at(mine)
    table = np.stack([getattr(writes, f.name) for f in fields(Writes)[1:]], axis=1)
    order = np.lexsort((*table.T[::-1], writes.row))
    table = np.ascontiguousarray(table[order])
    ends = np.searchsorted(writes.row[order], np.arange(plan.n_rows + 1))
    for row in rows:
        yield int(plan.pair[row]), table[ends[row] : ends[row + 1]].tobytes()


def shared_stems(plan: JointPlan, least: int = 2) -> tuple[Ints, list[Stem]]:
    """Return the rows that share nothing, and those that share the writes of their lowest layer.

    A row shares only what lies below its second layer, so a row of one layer shares nothing. Fewer
    than `least` rows with the same lowest writes do not share them.
    """
    writes = plan.writes
    low = plan.write_layer == plan.entry[writes.row]
    several = np.bincount(writes.row[~low], minlength=plan.n_rows) > 0
    groups: dict[tuple[int, bytes], list[int]] = {}
    candidates = np.flatnonzero(several).tolist()
    for row, key in zip(candidates, _keys(plan, low, candidates), strict=True):
        groups.setdefault(key, []).append(row)
    shared = [rows for rows in groups.values() if len(rows) >= least]
    if not shared:
        return np.arange(plan.n_rows), []
    leaders = np.array([rows[0] for rows in shared], np.int64)
    rows = np.concatenate([np.array(rows, np.int64) for rows in shared])
    base = np.repeat(np.arange(len(shared)), [len(rows) for rows in shared])
    alone = np.setdiff1d(np.arange(plan.n_rows), rows)

    def of(members: Ints, base: Ints, n_bases: int, chosen: Bools) -> JointPlan:
        number = np.full(plan.n_rows, -1, np.int64)
        number[members] = np.arange(len(members))
        mine = chosen & (number[writes.row] >= 0)
        return plan.with_rows(plan.pair[members], base, n_bases, writes.at(mine), number)

    stems = of(leaders, plan.base[leaders], plan.n_bases, low)
    return alone, [Stem(stems, of(rows, base, len(shared), ~low), rows)]


def joined(plans: Sequence[JointPlan]) -> JointPlan:
    """Return one plan of the rows of several, which are of the same batch."""
    first = np.cumsum([0, *(plan.n_rows for plan in plans)])
    columns = [
        np.concatenate([getattr(plan.writes, f.name) for plan in plans]) for f in fields(Writes)
    ]
    columns[0] += np.repeat(first[:-1], [len(plan.writes) for plan in plans])
    return replace(
        plans[0],
        pair=np.concatenate([plan.pair for plan in plans]),
        base=np.concatenate([plan.base for plan in plans]),
        writes=Writes(*columns),
    )


def plan_joint(
    sites: Sequence[Site],
    n_layers: int,
    reads: Sequence[int],
    differs: Bools,
    pair: Ints,
    writes: Writes,
    from_source: Bools,
    from_base: Bools,
) -> JointPlan:
    """Return the plan of rows, without the writes that are proven dead.

    A write is dead if
    - it lies after the last position that is read;
    - it is in the last block, changes its own token alone, and no metric reads that token;
    - its value equals the base run's, and no other write of the row comes before it: none in its
      layer or below, at its position or an earlier one, writes anything else than the base run's
      value.

    Args:
        differs: [pair, pos] whether base and source prompt hold different tokens.
        pair: [row] row of `differs`.
        from_source: [value] values equal the base run's wherever base and source cannot differ.
        from_base: [value] values are those of the base run itself.
    """
    plan = JointPlan(
        sites=tuple(sites),
        n_layers=n_layers,
        reads=np.isin(np.arange(reads[-1] + 1), reads),
        pair=pair,
        base=pair,
        n_bases=len(differs),
        writes=writes,
    )
    keep = writes.pos < plan.length
    by_token = np.array([site.reach == "token" for site in sites], bool)[writes.site]
    read = plan.reads[np.minimum(writes.pos, plan.length - 1)]
    keep &= ~(by_token & (writes.layer == n_layers - 1) & ~read)
    own = pair[writes.row]
    first_difference = np.where(differs.any(axis=1), differs.argmax(axis=1), differs.shape[1])
    from_token = np.array([site.from_token for site in sites], bool)[writes.site]
    same = writes.pos < first_difference[own]
    same |= from_token & (writes.layer == 0) & ~differs[own, writes.pos]
    same = from_base[writes.value] | (from_source[writes.value] & same)
    # per row and block: the first position at which something else than the base run's is written
    changed = np.full((len(pair), n_layers + 1), plan.length, np.int64)
    causes = keep & ~same
    np.minimum.at(changed, (writes.row[causes], plan.write_layer[causes]), writes.pos[causes])
    changed = np.minimum.accumulate(changed, axis=1)
    keep &= ~same | (writes.pos >= changed[writes.row, plan.write_layer])
    return plan.with_rows(pair, pair, len(differs), writes.at(keep), np.arange(len(pair)))


def overlap(sites: Sequence[Site], writes: Writes) -> tuple[Bools, int | None]:
    """Return which writes to keep of those that name one vector, and one that contradicts another.

    Writes of one vector with the same value are one write. `result` is `z` times W_O, so both name
    the same vectors.
    """
    names = [site.written_as or site.name for site in sites]
    key = np.array([names.index(name) for name in names], np.int64)[writes.site]
    order = np.lexsort((writes.value, writes.unit, writes.pos, writes.layer, key, writes.row))
    place = np.stack([writes.row, key, writes.layer, writes.pos])[:, order]
    unit, value = writes.unit[order], writes.value[order]
    keep = np.ones(len(writes), bool)
    if not len(writes):
        return keep, None
    new = np.ones(len(writes), bool)
    new[1:] = (place[:, 1:] != place[:, :-1]).any(axis=0)
    start = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))
    # sorted by unit, a write of all units comes first in its place
    whole = (unit[start] == WHOLE) & ~new
    again = np.zeros(len(writes), bool)
    again[1:] = ~new[1:] & (unit[1:] == unit[:-1])
    other = np.zeros(len(writes), bool)
    other[1:] = again[1:] & (value[1:] != value[:-1])
    other |= whole & (value != value[start])
    keep[order] = ~(again | whole)
    wrong = np.flatnonzero(other)
    return keep, int(order[wrong[0]]) if len(wrong) else None
