"""Where each token of a packed batch lies in the packed batch, layer by layer. Pure, like the
planner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from patchsweep.runners.packed.schedule import PackedBatch
from patchsweep.spec.plan import Ints


@dataclass(frozen=True)
class Packing:
    """The packed batch of a packed batch at the input of one block."""

    layer: int  # n_layers: the final residual, after the last block
    rows: Ints  # [active] which rows of the packed batch are present
    offsets: Ints  # [active + 1] row i owns packed tokens offsets[i]:offsets[i+1]
    start: Ints  # [active] position of the row's first token
    pair: Ints  # [active]
    token_pair: Ints  # [token]
    token_pos: Ints  # [token] position in the prompt
    carried_from: Ints  # [carried] packed index in the block before
    carried_to: Ints  # [carried] packed index here; all other tokens start as the base run's
    write_token: Ints  # [write] packed index of a token that is replaced at this layer
    write_row: Ints  # [write] row (of the packed batch) that it belongs to
    same: bool  # nothing entered and nothing was dropped: the batch is the block's output

    @property
    def n_tokens(self) -> int:
        return len(self.token_pos)


def pack(packed: PackedBatch) -> Iterator[Packing]:
    """The packings of `packed` from its first block to the final residual.

    After the last block only the tokens that can be read are kept: each row's last one is the
    last position read, so rows are kept whole here and the unembedding picks its positions.
    """
    n_rows = len(packed.patch)
    before = np.zeros(n_rows, dtype=np.int64)  # tokens per row in the block before
    before_offsets = np.zeros(n_rows + 1, dtype=np.int64)
    for layer in range(int(packed.entry.min()), packed.n_layers + 1):
        only_patched = packed.token_entry & (packed.entry == layer)
        counts = np.where(only_patched, packed.stop - packed.start, packed.length - packed.start)
        counts[packed.entry > layer] = 0
        offsets = np.concatenate([[0], np.cumsum(counts)])
        row = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(offsets[-1]) - offsets[row]
        carried = within < before[row]
        position = packed.start[row] + within
        write = packed.write_layers[row, layer] & (position < packed.stop[row])
        active = np.flatnonzero(counts)
        yield Packing(
            layer=layer,
            rows=active,
            offsets=np.concatenate([offsets[active], offsets[-1:]]),
            start=packed.start[active],
            pair=packed.pair[active],
            token_pair=packed.pair[row],
            token_pos=position,
            carried_from=(before_offsets[row] + within)[carried],
            carried_to=np.flatnonzero(carried),
            write_token=np.flatnonzero(write),
            write_row=row[write],
            same=bool(np.array_equal(before, counts)),
        )
        before, before_offsets = counts, offsets
