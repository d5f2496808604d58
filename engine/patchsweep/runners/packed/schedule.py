"""Schedule: divides patches into packed batches, and says where each token lies, block by block.

Pure, like the planner: plain data in, plain data out. Patches of several sites may share a packed
batch, since the rows of a batch are independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.spec.plan import Bools, Ints, PatchSet


@dataclass(frozen=True)
class PackedBatch:
    """Patches that run through the blocks together, one row each.

    Rows are sorted by pair, start, entry: rows that read the same prefix are adjacent, so that
    their queries share one matrix product.
    """

    sets: tuple[PatchSet, ...]
    length: int  # tokens of each prompt, up to the last position that is read
    place: Ints  # [row] index of its patch in the concatenated patches of `sets`
    which: Ints  # [row] index into `sets`
    patch: Ints  # [row] patch number in the plan of that set
    pair: Ints  # [row]
    entry: Ints  # [row] first block that the row runs through
    token_entry: Bools  # [row] whether only the patched tokens run through that block
    start: Ints  # [row]
    stop: Ints  # [row]

    @property
    def n_tokens(self) -> int:
        """Most tokens at the input of any block."""
        return int((self.length - self.start).sum())

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.sets[0].plan.n_layers

    @property
    def n_pairs(self) -> int:
        """Pairs of the sweep."""
        return self.sets[0].plan.shape[0]

    @property
    def reads(self) -> Bools:
        """[pair, pos] whether a metric reads the logits there; the same for all sites."""
        return self.sets[0].plan.reads

    def tokens_at(self, layer: int) -> tuple[Ints, Ints]:
        """Return `[row]` the first position of each row at a block, and how many tokens it has."""
        only_patched = self.token_entry & (self.entry == layer)
        counts = np.where(only_patched, self.stop - self.start, self.length - self.start)
        counts[self.entry > layer] = 0
        return self.start, counts

    @cached_property
    def write_layers(self) -> Bools:
        """[row, layer] at which layers the value is written, see `Plan.write_layers`."""
        table = np.zeros((len(self.patch), self.n_layers + 1), dtype=bool)
        for i, patch_set in enumerate(self.sets):
            rows, plan = self.which == i, patch_set.plan
            table[rows] = plan.write_layers[plan.layer_set[self.patch[rows]]]
        return table


def equal_parts(rows: Ints, n_tokens: Ints, most: int) -> Iterator[Ints]:
    """Yield `rows` in parts of about `most` tokens: of equal size, with no small last one.

    `n_tokens`: of each row.
    """
    total = np.cumsum(n_tokens)
    n_parts = max(1, -(-int(total[-1]) // most))
    part = np.minimum((total - 1) * n_parts // total[-1], n_parts - 1)
    for i in range(n_parts):
        if (part == i).any():
            yield rows[part == i]


def make_packed_batches(
    sets: Sequence[PatchSet], max_tokens: int, places: Ints | None = None
) -> Iterator[PackedBatch]:
    """Yield packed batches of about `max_tokens` tokens with the patches of `sets`, of one sweep.

    A packed batch holds prompts of one length. Patches are sorted by entry block, so that later
    packed batches skip the lower blocks. `places`: indices of the patches to pack, in the
    concatenated patches of `sets`; None: all.
    """
    sets = tuple(sets)
    which = np.repeat(np.arange(len(sets)), [len(chosen.patches) for chosen in sets])
    if places is None:
        places = np.arange(len(which))
    patch = np.concatenate([chosen.patches for chosen in sets])[places]
    which = which[places]

    def column(name: str) -> NDArray[Any]:
        values = np.concatenate([getattr(chosen.plan, name)[chosen.patches] for chosen in sets])
        return values[places]

    pair, entry, start = column("pair"), column("entry"), column("start")
    token_entry, stop = column("token_entry"), column("stop")
    lengths = sets[0].plan.lengths[pair]
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        chosen = chosen[np.lexsort((start[chosen], pair[chosen], entry[chosen]))]
        for rows in equal_parts(chosen, length - start[chosen], max_tokens):
            rows = rows[np.lexsort((entry[rows], start[rows], pair[rows]))]
            yield PackedBatch(
                sets=sets,
                length=int(length),
                place=places[rows],
                which=which[rows],
                patch=patch[rows],
                pair=pair[rows],
                entry=entry[rows],
                token_entry=token_entry[rows],
                start=start[rows],
                stop=stop[rows],
            )


@dataclass(frozen=True)
class PackedTokens:
    """What the hooks of one block call must know of its packed tokens."""

    layer: int  # the block; n_layers: the final residual
    token_pair: Ints  # [token]
    token_pos: Ints  # [token] position in the prompt
    write_token: Ints  # [write] packed index of a token that is patched at this layer
    write_row: Ints  # [write] its row in the packed batch


@dataclass(frozen=True)
class Packing(PackedTokens):
    """The tokens of a packed batch at the input of one block."""

    rows: Ints  # [active] rows of the packed batch that are present
    offsets: Ints  # [active + 1] cu_seqlens: row i owns packed tokens offsets[i]:offsets[i+1]
    start: Ints  # [active] position of the row's first token
    pair: Ints  # [active]
    carried_from: Ints  # [carried] packed index in the previous block
    carried_to: Ints  # [carried] packed index here; all other tokens are copied from the base run
    same: bool  # no token enters or leaves: the input is the previous block's output

    @property
    def n_tokens(self) -> int:
        return len(self.token_pos)


def pack(packed: PackedBatch) -> Iterator[Packing]:
    """Yield the packings of `packed` from its first block to the final residual.

    Rows end at the last position read. After the last block they keep all their tokens, and the
    unembedding selects the positions that are read.
    """
    n_rows = len(packed.patch)
    before = first_before = np.zeros(n_rows, dtype=np.int64)  # of each row in the block before
    before_offsets = np.zeros(n_rows + 1, dtype=np.int64)
    last: Packing | None = None
    for layer in range(int(packed.entry.min()), packed.n_layers + 1):
        first, counts = packed.tokens_at(layer)
        stays = np.array_equal(before, counts) and np.array_equal(first_before, first)
        if last is None or not stays:
            offsets = np.concatenate([[0], np.cumsum(counts)])
            row = np.repeat(np.arange(len(counts)), counts)
            position = first[row] + np.arange(offsets[-1]) - offsets[row]
            patched = position < packed.stop[row]
            within = position - first_before[row]
            carried = (within >= 0) & (within < before[row])
            active = np.flatnonzero(counts)
            last = Packing(
                layer=layer,
                token_pair=packed.pair[row],
                token_pos=position,
                write_token=np.empty(0, np.int64),
                write_row=np.empty(0, np.int64),
                rows=active,
                offsets=np.concatenate([offsets[active], offsets[-1:]]),
                start=first[active],
                pair=packed.pair[active],
                carried_from=(before_offsets[row] + within)[carried],
                carried_to=np.flatnonzero(carried),
                same=False,
            )
            before, first_before, before_offsets = counts, first, offsets
        elif not last.same:
            every = np.arange(last.n_tokens)
            last = replace(last, carried_from=every, carried_to=every, same=True)
        write = np.flatnonzero(packed.write_layers[row, layer] & patched)
        yield replace(last, layer=layer, write_token=write, write_row=row[write])
