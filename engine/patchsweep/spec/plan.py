"""Plans: the patches of one site as a product of places, layers and units.

Plain data, no tensors, no files. Nothing here is as large as the number of patches: counts and
costs are arithmetic on the factors, and patches are computed for the slice that is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from patchsweep.spec.sites import Site

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PairShape:
    """The facts about a prompt pair that the planner needs."""

    differs: tuple[bool, ...]  # per position: base and source have different tokens or positions
    reads: tuple[int, ...]  # positions whose logits a metric reads, ascending
    spans: Mapping[str, tuple[int, int]]  # label -> [first, past-last) position
    n_forced: int = 0  # answer tokens after the prompt
    alone: tuple[int, ...] = ()  # positions without a value to patch in

    @property
    def length(self) -> int:
        return len(self.differs)

    @property
    def n_prompt(self) -> int:
        return self.length - self.n_forced

    @property
    def first_difference(self) -> int:
        return self.differs.index(True) if any(self.differs) else self.length


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, by TransformerLens' names."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    block_parameters: int  # weights in one block

    def n_units(self, site: Site) -> int:
        """Number of heads or neurons of `site` in one block; 1 if it has neither."""
        sizes = {"head": self.n_heads, "kv_head": self.n_kv_heads, "neuron": self.d_mlp}
        return 1 if site.unit is None else sizes[site.unit]

    def values(self, site: Site, length: int) -> tuple[int, ...] | None:
        """Return the shape of `site` in one block and one prompt; None: only a run tells."""
        if site.named:
            return None
        if site.is_pattern:
            return self.n_heads, length, length
        in_heads = site.unit in ("head", "kv_head") and site.name != "result"
        of_unit = {"neuron": 1}.get(str(site.unit), self.d_head if in_heads else self.d_model)
        return length, self.n_units(site) * of_unit


@dataclass(frozen=True)
class Axes:
    """The coordinates of the result; each entry says what one patch covers along that axis."""

    layers: tuple[tuple[int, ...], ...]  # layers patched together
    positions: tuple[int | str, ...] | None  # an index, or a label; None: all positions at once
    units: tuple[tuple[int, ...], ...] | None  # heads (or neurons) patched together; None: all
    n_sources: int = 0  # of pattern_cell: each unit is repeated once per source position


class Column:
    """One column of a plan: `column[patches]` computes the values for those patch numbers."""

    def __init__(self, of: Callable[[Ints], NDArray[Any]]) -> None:
        self._of = of

    def __getitem__(self, patches: ArrayLike | int) -> NDArray[Any]:
        numbers = np.asarray(patches, dtype=np.int64)
        return self._of(numbers.ravel()).reshape(numbers.shape)


class Cells(NamedTuple):
    """The cells of some patches: arrays `[patch]`."""

    pair: Ints
    layer_set: Ints  # index into axes.layers
    unit_set: Ints  # index into axes.units
    start: Ints  # first position whose value may change
    stop: Ints  # past the last position that is replaced


class CellColumn:
    """The column of a plan with one field of `Cells`, that of the attribute's name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, plan: Plan, owner: type) -> Column:
        return Column(lambda patches: getattr(plan.cells(patches), self.name))


@dataclass(frozen=True)
class Plan:
    """Numbered patches of one site; columns such as `plan.start[patches]` return their values."""

    site: Site
    axes: Axes
    shape: tuple[int, int, int, int]  # cells along pair, layer, pos, unit
    lengths: Ints  # [pair] tokens that matter: up to the last position read
    reads: Bools  # [pair, pos] whether a metric reads the logits there
    n_layers: int  # of the model

    def cells(self, patches: Ints) -> Cells:
        """Return the cells of `patches`."""
        raise NotImplementedError

    pair = CellColumn()  # [patch] number of the prompt pair
    layer_set = CellColumn()  # [patch] index into axes.layers
    unit_set = CellColumn()  # [patch] index into axes.units
    start = CellColumn()  # [patch] first position whose value may change
    stop = CellColumn()  # [patch] past the last position that is replaced

    @property
    def entry(self) -> Column:
        """[patch] first block that the patched tokens run through; n_layers: unembedding only."""
        return Column(lambda patches: self.entry_of_set[self.cells(patches).layer_set])

    @property
    def token_entry(self) -> Column:
        """[patch] whether only the patched tokens run through the entry block, not the suffix."""
        return Column(lambda patches: np.full(len(patches), self.enters_by_token))

    @property
    def suffix(self) -> Column:
        """[patch] number of tokens from the patch to the last position that is read."""

        def of(patches: Ints) -> Ints:
            cells = self.cells(patches)
            return self.lengths[cells.pair] - cells.start

        return Column(of)

    @property
    def cost(self) -> Column:
        """[patch] token-layers (tokens times blocks) of a patch that runs."""

        def of(patches: Ints) -> Ints:
            cells = self.cells(patches)
            suffix = self.lengths[cells.pair] - cells.start
            replaced = self.enters_by_token * (cells.stop - cells.start)
            token_layers: Ints = self.suffix_blocks[cells.layer_set] * suffix + replaced
            return token_layers

        return Column(of)

    @cached_property
    def write_layers(self) -> Bools:
        """[layer set, layer] at which layers the value is written; `resid_post`: one later."""
        table = np.zeros((len(self.axes.layers), self.n_layers + 1), dtype=bool)
        for i, layers in enumerate(self.axes.layers):
            for layer in layers:
                table[i, layer + self.site.shift] = True
        return table

    @cached_property
    def entry_of_set(self) -> Ints:
        """[layer set] first block that the patched tokens run through."""
        return self.write_layers.argmax(axis=1)

    @property
    def enters_by_token(self) -> bool:
        """Whether a patch changes only its own tokens in its entry block."""
        return self.site.reach == "token" and not self.site.shift

    @cached_property
    def suffix_blocks(self) -> Ints:
        """[layer set] number of blocks that the whole suffix runs through."""
        n_blocks: Ints = self.n_layers - self.entry_of_set - self.enters_by_token
        return n_blocks


@dataclass(frozen=True)
class Places:
    """The places of a sweep: all (pair, position) that a patch can have, sorted by pair."""

    pair: Ints  # [place]
    pos: Ints  # [place] index into axes.positions
    first: Ints  # [place] first position that is replaced
    start: Ints  # [place] first position whose value may change
    stop: Ints  # [place] past the last position that is replaced and matters
    dead: Bools  # [place] patches are dead at every layer
    unread: Bools  # [place] no metric reads its positions: patches of the last block may be dead
    equal: Bools  # [place] base and source tokens are equal: patches of layer 0 may be dead


@dataclass(frozen=True)
class Totals:
    """Counts for a part of a plan."""

    n_patches: int
    n_live: int
    token_layers: int  # tokens times blocks that live patches run through


@dataclass(frozen=True)
class SitePlan(Plan):
    """All patches of one site, live and dead, as a product: place x layer set x unit set.

    Whether a patch is live, and its cost, depend on its place and its layer set alone. The plan
    keeps these two tables and counts by arithmetic; nothing is as large as the number of patches.
    Patches are numbered in the order of the result's cells `[pair, layer, pos, unit]`; positions
    and sources past the end of a shorter prompt have no patch.
    """

    full_lengths: Ints  # [pair] tokens of the prompt
    places: Places

    def cells(self, patches: Ints) -> Cells:
        pair, layer, place, unit = self._decode(patches)
        return Cells(pair, layer, unit, self.places.start[place], self.places.stop[place])

    @property
    def cell(self) -> Column:
        """[patch] flat index into `shape`."""

        def of(patches: Ints) -> Ints:
            pair, layer, place, unit = self._decode(patches)
            where = (pair, layer, self.places.pos[place], unit)
            return np.asarray(np.ravel_multi_index(where, self.shape), dtype=np.int64)

        return Column(of)

    @property
    def live(self) -> Column:
        """[patch] whether the patch can change a metric."""

        def of(patches: Ints) -> Bools:
            _, layer, place, unit = self._decode(patches)
            dead = self.places.dead[place] | (self._only_last[layer] & self.places.unread[place])
            dead |= self._only_first[layer] & self.places.equal[place]
            if self.axes.n_sources:  # causality: no token attends to a later one
                dead |= unit % self.axes.n_sources > self.places.first[place]
            return ~dead

        return Column(of)

    def place_of(self, patch: int) -> str:
        """Return the place of a patch in words, such as `pair 0, layer 12, pos S, head 3`."""
        pair, layer, pos, unit = np.unravel_index(int(self.cell[np.array([patch])][0]), self.shape)
        words = [f"pair {pair}"]
        if self.site.layered:
            words.append(f"layer {'+'.join(map(str, self.axes.layers[layer]))}")
        if self.axes.positions is not None:
            words.append(f"pos {self.axes.positions[pos]}")
        if self.axes.units is not None:
            words.append(f"{self.site.unit} {'+'.join(map(str, self.axes.units[unit]))}")
        if self.axes.n_sources:
            words.append(f"src {unit % self.axes.n_sources}")
        return ", ".join(words)

    def patches(self, pairs: Sequence[int] | None = None, layers: range | None = None) -> Ints:
        """Return the patches of `pairs` in the layer sets `layers`, sorted by pair; None: all."""
        pairs = range(self.shape[0]) if pairs is None else pairs
        layers = range(self.shape[1]) if layers is None else layers
        per_set = np.diff(self._first_place) * self._units_of
        parts = [
            self._first_patch[pair]
            + np.arange(layers.start * per_set[pair], layers.stop * per_set[pair])
            for pair in pairs
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def live_patches(self, pairs: Sequence[int] | None = None, layers: range | None = None) -> Ints:
        """Return the live ones among `self.patches(pairs, layers)`."""
        patches = self.patches(pairs, layers)
        live_ones: Ints = patches[self.live[patches]]
        return live_ones

    def nth_live(self, numbers: Ints) -> Ints:
        """Return the patches with the indices `numbers` in the list of all live patches."""
        ends = np.concatenate([[0], np.cumsum(self.live_by_layer()[0].sum(axis=1))])
        pair = np.searchsorted(ends, numbers, side="right") - 1
        patches = np.empty(len(numbers), np.int64)
        for p in np.unique(pair).tolist():
            patches[pair == p] = self.live_patches([p])[numbers[pair == p] - ends[p]]
        return patches

    @property
    def n_patches(self) -> int:
        return int(self._first_patch[-1])

    @property
    def n_live(self) -> int:
        return self.totals().n_live

    @property
    def token_layers(self) -> int:
        """Tokens times blocks that the live patches run through."""
        return self.totals().token_layers

    @property
    def loop_token_layers(self) -> int:
        """Tokens times blocks of a loop that runs one full forward pass per patch."""
        return int((self.full_lengths * np.diff(self._first_patch)).sum()) * self.n_layers

    def totals(self, pairs: range | None = None, layers: range | None = None) -> Totals:
        """Return counts for the patches of `pairs` in the layer sets `layers`; None: all."""
        pairs = range(self.shape[0]) if pairs is None else pairs
        layers = range(self.shape[1]) if layers is None else layers
        sums = self._sums[:, [pairs.start, pairs.stop]][:, :, [layers.start, layers.stop]]
        n_live, token_layers = (
            sums[:, 1, 1] - sums[:, 0, 1] - sums[:, 1, 0] + sums[:, 0, 0]
        ).tolist()
        n_patches = int(self._first_patch[pairs.stop] - self._first_patch[pairs.start])
        return Totals(n_patches // self.shape[1] * len(layers), n_live, token_layers)

    def live_by_layer(self) -> tuple[Ints, Ints]:
        """Return two tables `[pair, layer set]`: live patches, and the tokens of their suffixes."""
        n_live, tokens, _ = self._tables
        return n_live, tokens

    @cached_property
    def _tables(self) -> Ints:
        """[3, pair, layer set] live patches, their suffix tokens, their replaced tokens."""
        tables = np.zeros((3, *self.shape[:2]), np.int64)
        units, suffix, replaced = self._weights()
        for alive, members in self._layer_classes():
            live = units * alive
            for table, weights in zip(tables, (live, live * suffix, live * replaced), strict=True):
                sums = np.concatenate([[0], np.cumsum(weights)])
                table += np.outer(np.diff(sums[self._first_place]), members)
        return tables

    @cached_property
    def _sums(self) -> Ints:
        """[2, pair + 1, layer set + 1] live patches and token-layers of all before both indices."""
        n_live, tokens, replaced = self._tables
        sums = np.zeros((2, self.shape[0] + 1, self.shape[1] + 1), np.int64)
        sums[0, 1:, 1:] = n_live
        sums[1, 1:, 1:] = self.suffix_blocks * tokens + self.enters_by_token * replaced
        return sums.cumsum(axis=1).cumsum(axis=2)

    @cached_property
    def _first_place(self) -> Ints:
        """[pair + 1] index of each pair's first place; the last entry is the number of places."""
        return np.searchsorted(self.places.pair, np.arange(self.shape[0] + 1))

    @cached_property
    def _first_patch(self) -> Ints:
        """[pair + 1] number of each pair's first patch; the last entry is the number of patches."""
        per_pair = np.diff(self._first_place) * self._units_of * self.shape[1]
        return np.concatenate([[0], np.cumsum(per_pair)])

    @cached_property
    def _units_of(self) -> Ints:
        """[pair] number of unit sets; pattern_cell: only sources inside the prompts count."""
        n = self.axes.n_sources
        sources = np.minimum(self.full_lengths, n) if n else np.ones_like(self.full_lengths)
        n_units: Ints = self.shape[3] // (n or 1) * sources
        return n_units

    def _decode(self, patches: Ints) -> tuple[Ints, Ints, Ints, Ints]:
        """Return `[patch]` arrays: pair, layer set, place, unit set."""
        pair = np.searchsorted(self._first_patch, patches, side="right") - 1
        n_units = self._units_of[pair]
        per_set = np.diff(self._first_place)[pair] * n_units
        layer, within = np.divmod(patches - self._first_patch[pair], per_set)
        place, unit = np.divmod(within, n_units)
        if n := self.axes.n_sources:
            head, source = np.divmod(unit, np.minimum(self.full_lengths[pair], n))
            unit = head * n + source
        return pair, layer, self._first_place[pair] + place, unit

    @cached_property
    def _only_last(self) -> Bools:
        """[layer set] the set is the last block alone, and the site changes only its own token."""
        wanted = {self.n_layers - 1} if self.site.reach == "token" else None
        return np.array([set(layers) == wanted for layers in self.axes.layers])

    @cached_property
    def _only_first(self) -> Bools:
        """[layer set] the set is layer 0 alone, where the site depends only on its own token."""
        wanted = {0} if self.site.from_token else None
        return np.array([set(layers) == wanted for layers in self.axes.layers])

    def _layer_classes(self) -> Iterator[tuple[Bools, Bools]]:
        """Yield classes of layer sets with the same dead places.

        Each is ([place] alive, [layer set] member of the class).
        """
        places = self.places
        for last in (False, True):
            for first in (False, True):
                dead = places.dead | (last & places.unread) | (first & places.equal)
                yield ~dead, (self._only_last == last) & (self._only_first == first)

    def _weights(self) -> tuple[Ints, Ints, Ints]:
        """Return `[place]` counts: unit sets alive by causality, suffix tokens, replaced tokens."""
        places = self.places
        units = np.full(len(places.first), self.shape[3], np.int64)
        if n := self.axes.n_sources:
            units = units // n * np.minimum(places.first + 1, n)
        replaced = places.stop - places.start
        return units, self.lengths[places.pair] - places.start, replaced


@dataclass(frozen=True)
class PatchTable(Plan):
    """Patches chosen one by one, all of them live."""

    table: Cells

    def cells(self, patches: Ints) -> Cells:
        return Cells(*(column[patches] for column in self.table))


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Some patches of one site."""

    plan: Plan
    patches: Ints  # patch numbers in the plan
