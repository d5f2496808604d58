"""Packing: the place of each token in a packed batch, block by block. Pure, like the planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from patchsweep.runners.packed.schedule import PackedBatch
from patchsweep.spec.plan import Ints


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
