"""Which patches travel together: a packed batch is one packed batch through the layers.

Pure, like the planner: plain data in, plain data out. Patches of several sites may share a packed
batch, since a row of a batch does not know where another one is patched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchsweep.spec.plan import Bools, Ints, PatchSet


@dataclass(frozen=True)
class PackedBatch:
    """Patches that travel through the layers in one packed batch.

    Rows are sorted by pair, start, entry: those that read the same prefix lie together, so that
    their queries fold into one product.
    """

    sets: tuple[PatchSet, ...]
    length: int  # tokens of each prompt, up to the last that is read
    place: Ints  # [row] where its patch stands among those of all sets, one set after the other
    which: Ints  # [row] which of `sets` the patch is of
    patch: Ints  # [row] index into the plan of that set
    pair: Ints  # [row]
    entry: Ints  # [row] first block that the row passes
    token_entry: Bools  # [row] whether only the patched tokens pass that block
    start: Ints  # [row]
    stop: Ints  # [row]

    @property
    def n_tokens(self) -> int:
        """Most tokens alive at one layer."""
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
        """[pair, pos] whether a metric reads the logits there; of all sites the same."""
        return self.sets[0].plan.reads

    @cached_property
    def write_layers(self) -> Bools:
        """[row, layer] where the value is written, see `SitePlan.write_layers`."""
        found = np.zeros((len(self.patch), self.n_layers + 1), dtype=bool)
        for i, chosen in enumerate(self.sets):
            mine, plan = self.which == i, chosen.plan
            found[mine] = plan.write_layers[plan.layer_set[self.patch[mine]]]
        return found


def make_packed_batches(
    sets: Sequence[PatchSet], max_tokens: int, places: Ints | None = None
) -> Iterator[PackedBatch]:
    """Pack the patches of `sets`, whose plans are of one sweep, into packed batches of about
    `max_tokens`.

    A packed batch holds prompts of one length. Patches are taken in the order of their entry, so
    that later packed batches skip the lower blocks altogether. `places`: of these patches alone.
    """
    sets = tuple(sets)
    which = np.repeat(np.arange(len(sets)), [len(chosen.patches) for chosen in sets])
    if places is None:
        places = np.arange(len(which))
    patch = np.concatenate([chosen.patches for chosen in sets])[places]
    which = which[places]

    def column(name: str) -> NDArray[Any]:
        every = np.concatenate([getattr(chosen.plan, name)[chosen.patches] for chosen in sets])
        return every[places]

    pair, entry, start = column("pair"), column("entry"), column("start")
    token_entry, stop = column("token_entry"), column("stop")
    lengths = sets[0].plan.lengths[pair]
    for length in np.unique(lengths):
        chosen = np.flatnonzero(lengths == length)
        chosen = chosen[np.lexsort((start[chosen], pair[chosen], entry[chosen]))]
        total = np.cumsum(length - start[chosen])
        n_batches = max(1, -(-int(total[-1]) // max_tokens))
        # equal shares rather than full packed batches and a small last one
        share = np.minimum((total - 1) * n_batches // total[-1], n_batches - 1)
        for i in range(n_batches):
            rows = chosen[share == i]
            if not len(rows):
                continue
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
