"""Index tables of a packed batch: made and checked on the host, then moved in one copy.

They follow from the packing alone, so those of all blocks are made before the first block runs, and
nothing in the batch waits for them.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from patchsweep_kernels.attention import Rows, block_tokens
from patchsweep_kernels.scatter import Targets
from torch import Tensor

from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.site_locations import SiteLocation
from patchsweep.models.moves import Moves, on_cpu
from patchsweep.runners.packed.schedule import PackedBatch, PackedTokens, Packing, pack
from patchsweep.spec.plan import Column, Ints
from patchsweep.spec.sites import Site

LEAST_TOKENS = 256  # of a padded block
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PatchValues:
    """The patch values of one set, and where they are written."""

    point: SiteLocation
    # values [pair, pos, width] per layer at which they are written; None: identity patches, which
    # flip the last bit
    layers: Sequence[Tensor] | None
    # [patch] row of its one vector in the values, which are [row, width] then; None: see `layers`
    row: Column | Ints | None = None


@dataclass(frozen=True)
class PackedInput:
    """The inputs of a packed batch besides the model, for prompts of one length."""

    base: ActivationCache
    patch_values: Sequence[PatchValues]  # for each of the packed batch's sets
    local: dict[int, int]  # pair of the plan -> row of `base` and of the values


def size_of(n_tokens: int) -> int:
    """Return the padded size of a block: 256, 384, 512, 768, .., a third of it wasted at most."""
    power = 1 << max(0, n_tokens - 1).bit_length()
    return max(LEAST_TOKENS, power * 3 // 4 if n_tokens <= power * 3 // 4 else power)


@dataclass(frozen=True, eq=False)
class Padded:
    """The tables of packed tokens, followed by tokens that nobody reads.

    Each of those is a row of its own, at position 0 of the first pair, and sees itself alone.
    """

    token_pair: Tensor  # [token] row of the base run
    token_pos: Tensor  # [token]
    rows: Rows
    tokens: Tensor  # [2, token] `Rows.token_table`
    blocks: dict[int, Tensor]  # size -> `Rows.block_table`, followed by blocks without tokens

    @classmethod
    def of(
        cls,
        token_pair: Tensor,
        token_pos: Tensor,
        rows: Rows,
        n_pairs: int,
        sizes: Collection[int],
    ) -> Padded | None:
        """Return the tables on the CPU; None if the pairs of `rows` are not in order.

        `n_pairs`: of the base runs. `sizes`: of the attention kernel's blocks.
        """
        if bool((rows.pair[1:] < rows.pair[:-1]).any()):
            return None
        n, size = rows.n_tokens, size_of(rows.n_tokens)
        zeros = token_pair.new_zeros(size - n)
        padded = Rows(
            torch.cat((rows.offsets, torch.arange(n + 1, size + 1, device="cpu"))),
            torch.cat((rows.pair, rows.pair[-1:].expand(size - n))),
            torch.cat((rows.start, zeros)),
        )
        blocks = {}
        for of_block in sizes:
            table = padded.block_table(of_block, _CPU)
            full = table.new_zeros(-(-size // of_block) + n_pairs, 6)
            full[: len(table)] = table
            blocks[of_block] = full
        return cls(
            torch.cat((token_pair, zeros)),
            torch.cat((token_pos, zeros)),
            padded,
            padded.token_table(_CPU),
            blocks,
        )


@dataclass(frozen=True, eq=False)
class TokenTables:
    """What the hooks of one block call read of its packed tokens, on the block's device."""

    layer: int  # the block; n_layers: the final residual
    token_pair: Tensor  # [token] row of the base run
    token_pos: Tensor  # [token]
    writes: Mapping[int, Targets]  # set -> where its patches are written at this layer
    read: Tensor | None  # last block: packed index of the tokens that are read, at least one
    padded: Padded | None = field(default=None, kw_only=True)  # tables of a block with a graph


@dataclass(frozen=True, eq=False)
class Change:
    """How the tokens of a block follow from those of the block before it."""

    carried_from: Tensor | None  # [carried] packed index in the previous block; None: all, in order
    carried_to: Tensor  # [carried] packed index here
    new: Tensor  # [new] packed index of tokens that are copied from the base run
    new_pair: Tensor  # [new] row of the base run
    new_pos: Tensor  # [new]


@dataclass(frozen=True, eq=False)
class BlockTables(TokenTables):
    """The tables of one block of a packed batch."""

    device: torch.device
    rows: Rows
    change: Change | None  # None: at the first block, and where no token enters or leaves


class Writes:
    """Makes the tables of the patches that a packed batch writes."""

    def __init__(self, packed: PackedBatch, given: PackedInput) -> None:
        self.packed, self.given = packed, given
        self.local = np.array([given.local.get(p, -1) for p in range(packed.n_pairs)])
        self._members: dict[int, tuple[Ints, Ints, Ints]] = {}  # set -> see `_units_of`

    def at(self, packing: PackedTokens) -> dict[int, Targets]:
        """Return, for each set that is patched at the packing's layer, the targets on the CPU."""
        which = self.packed.which[packing.write_row]
        if not self.packed.sets:  # what joint rows write is said by `JointWrites`
            return {}
        return {
            i: self._of_set(i, packing, of_set)
            for i in np.unique(which).tolist()
            for of_set in [which == i]
        }

    def _of_set(self, i: int, packing: PackedTokens, of_set: Any) -> Targets:
        packed, patch_values = self.packed, self.given.patch_values[i]
        token, row = packing.write_token[of_set], packing.write_row[of_set]
        plan, patch = packed.sets[i].plan, packed.patch[row]
        if patch_values.layers is None:
            source = token
        elif patch_values.row is None:
            length = patch_values.layers[packing.layer].shape[-2]
            source = self.local[packed.pair[row]] * length + packing.token_pos[token]
        else:
            source = patch_values.row[patch]
        if plan.axes.units is None:
            return Targets.of(on_cpu(token), on_cpu(source))
        base, site = self.given.base, patch_values.point.site
        width = 0
        if site.unit == "neuron":
            layers = base.sites[site.name] if patch_values.layers is None else patch_values.layers
            width = layers[packing.layer].shape[-1]
        n = n_units(base, site, packing.layer, width)
        unit_sets = plan.unit_set[patch]
        first, sizes, members = self._units_of(i)
        repeat = np.repeat(np.arange(len(unit_sets)), sizes[unit_sets])
        within = np.arange(len(repeat)) - np.repeat(
            np.cumsum(sizes[unit_sets]) - sizes[unit_sets], sizes[unit_sets]
        )
        unit = members[first[unit_sets[repeat]] + within]
        return Targets.of(on_cpu(token[repeat]), on_cpu(source[repeat] * n + unit), on_cpu(unit))

    def _units_of(self, i: int) -> tuple[Ints, Ints, Ints]:
        """Return the first member of each unit set, its size, and the members of all."""
        if i not in self._members:
            units = self.packed.sets[i].plan.axes.units
            assert units is not None
            sizes = np.array([len(unit) for unit in units])
            members = np.concatenate([np.array(unit) for unit in units])
            self._members[i] = np.cumsum(sizes) - sizes, sizes, members
        return self._members[i]


def n_units(base: ActivationCache, site: Site, layer: int, width: int) -> int:
    """Return the number of heads (or neurons) in one vector of `site`, which is `width` wide."""
    if site.unit == "head":
        return base.heads[layer]
    return base.keys[layer].shape[1] if site.unit == "kv_head" else width


def make_tables(
    packed: PackedBatch,
    given: PackedInput,
    packings: Iterable[Packing] | None = None,
    *,
    pad_up_to: int = 0,
) -> deque[BlockTables]:
    """Return the tables of all blocks of `packed`, and of the final residual, in order.

    `packings`: where its tokens lie; None: as `pack` says. `pad_up_to`: blocks of at most so many
    tokens get padded tables too.

    Take each off before its block runs: on a CPU its rows gather the masks of their attention.
    """
    base, writes = given.base, Writes(packed, given)
    tables: list[BlockTables] = []
    sizes: dict[Rows, set[int]] = defaultdict(set)  # of attention blocks
    for packing in pack(packed) if packings is None else packings:
        device = base.devices[packing.layer]
        before = tables[-1] if tables else None
        if before is not None and packing.same and before.device == device:
            block = replace(before, layer=packing.layer, change=None)
        else:
            block = _entering(packing, device, writes.local, before)
        block = replace(block, writes=writes.at(packing), read=None)
        if packing.layer == packed.n_layers - 1:
            block = replace(block, read=read_tokens(packed, packing))
        if packing.layer < packed.n_layers and device.type == "cuda":
            sizes[block.rows].add(_block_size(base, packing.layer, device))
        tables.append(block)
    if pad_up_to:
        tables = list(_padded(tables, sizes, base.shape[0], pad_up_to))
    return deque(_moved(tables, sizes))


def _entering(
    packing: Packing, device: torch.device, local: Ints, before: BlockTables | None
) -> BlockTables:
    """Return the tables, on the CPU, of a block where tokens enter or leave, or devices change."""
    token_pair = local[packing.token_pair]
    change = None
    if before is not None and not packing.same:
        fresh = np.ones(packing.n_tokens, dtype=bool)
        fresh[packing.carried_to] = False
        new = np.flatnonzero(fresh)
        every = len(packing.carried_from) == len(before.token_pos)
        change = Change(
            None if every else on_cpu(packing.carried_from),
            on_cpu(packing.carried_to),
            on_cpu(new),
            on_cpu(token_pair[new]),
            on_cpu(packing.token_pos[new]),
        )
    return BlockTables(
        layer=packing.layer,
        token_pair=on_cpu(token_pair),
        token_pos=on_cpu(packing.token_pos),
        writes={},
        read=None,
        device=device,
        rows=Rows(
            offsets=torch.from_numpy(packing.offsets),
            pair=torch.from_numpy(local[packing.pair]),
            start=torch.from_numpy(packing.start),
        ),
        change=change,
    )


def read_tokens(packed: PackedBatch, packing: PackedTokens) -> Tensor:
    """Return the tokens that are read, at least one: modules need not take zero tokens."""
    read = np.flatnonzero(packed.reads[packing.token_pair, packing.token_pos])
    return on_cpu(read if len(read) else np.zeros(1, np.int64))


def _block_size(base: ActivationCache, layer: int, device: torch.device) -> int:
    keys, values = base.keys[layer], base.values[layer]
    share = base.heads[layer] // keys.shape[1]
    return block_tokens(share, keys.shape[-1], values.shape[-1], keys.dtype, device)


def _padded(
    tables: Sequence[BlockTables], sizes: Mapping[Rows, set[int]], n_pairs: int, most: int
) -> Iterator[BlockTables]:
    """Yield `tables` with padded ones where the padded size is at most `most`."""
    made: dict[Rows, Padded | None] = {}
    for block in tables:
        rows = block.rows
        if block.read is not None or size_of(rows.n_tokens) > most:
            yield block
            continue
        if rows not in made:
            made[rows] = Padded.of(
                block.token_pair, block.token_pos, rows, n_pairs, sizes.get(rows, ())
            )
        yield replace(block, padded=made[rows])


def _moved(tables: Sequence[BlockTables], sizes: Mapping[Rows, set[int]]) -> list[BlockTables]:
    """Return `tables` on their devices, moved in one copy a device.

    `sizes`: the sizes of the attention blocks of rows, whose tables go along.
    """
    moves: dict[torch.device, Moves] = defaultdict(Moves)
    for block in tables:
        of_rows = (
            table
            for size in sizes.get(block.rows, ())
            for table in (block.rows.token_table(_CPU), block.rows.block_table(size, _CPU))
        )
        moves[block.device].add(block, *of_rows)
    for device, to_device in moves.items():
        to_device.start(device)
    for block in tables:
        moved = moves[block.device]
        for size in sizes.get(block.rows, ()):
            block.rows.keep_tables(
                size,
                moved.there(block.rows.token_table(_CPU)),
                moved.there(block.rows.block_table(size, _CPU)),
            )
    return [moves[block.device].there(block) for block in tables]
