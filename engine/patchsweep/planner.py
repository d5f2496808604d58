"""The planner: which patches a sweep has, which are known without running, and what it costs.

Pure: plain data in, plain data out, no tensor and no file. A plan of one site is a table with
one row per patch; `waves.schedule` packs live rows into batches that travel through the layers
together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import PlanError
from patchsweep.sites import Site

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PairShape:
    """What the planner needs to know of a prompt pair."""

    differs: tuple[bool, ...]  # per position: base and source hold different tokens
    reads: tuple[int, ...]  # positions whose logits a metric reads, ascending
    spans: Mapping[str, tuple[int, int]]  # label -> [first, past-last) position

    @property
    def length(self) -> int:
        return len(self.differs)

    @property
    def first_difference(self) -> int:
        return self.differs.index(True) if any(self.differs) else self.length


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model, in TransformerLens words."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    d_vocab: int
    block_parameters: int  # weights that one token meets in one block

    def n_units(self, site: Site) -> int:
        """How many heads or neurons `site` has in one block; 1 if it is not divided."""
        sizes = {"head": self.n_heads, "kv_head": self.n_kv_heads, "neuron": self.d_mlp}
        return 1 if site.unit is None else sizes[site.unit]


@dataclass(frozen=True)
class Axes:
    """What one patch covers along each axis; every entry is one coordinate of the result."""

    layers: tuple[tuple[int, ...], ...]  # layers patched together
    positions: tuple[int | str, ...] | None  # an index, or a label; None: all positions at once
    units: tuple[tuple[int, ...], ...] | None  # heads (or neurons) patched together; None: all
    n_sources: int = 0  # of pattern_cell: each of the units stands once for every source position


@dataclass(frozen=True)
class SitePlan:
    """All patches of one site, live and dead; row i of every array is patch i.

    Patches are in the order of the result's cells `[pair, layer, pos, unit]`.
    """

    site: Site
    axes: Axes
    shape: tuple[int, int, int, int]  # cells along pair, layer, pos, unit
    lengths: Ints  # [pair] tokens that matter: up to the last position read
    full_lengths: Ints  # [pair] tokens of the prompt
    reads: Bools  # [pair, pos] whether a metric reads the logits there
    n_layers: int  # of the model
    cell: Ints  # [patch] flat index into `shape`
    pair: Ints  # [patch]
    layer_set: Ints  # [patch] index into axes.layers
    unit_set: Ints  # [patch] index into axes.units
    start: Ints  # [patch] first position whose value may change
    stop: Ints  # [patch] past the last position that is replaced
    live: Bools  # [patch]

    @property
    def n_patches(self) -> int:
        return len(self.cell)

    @property
    def n_live(self) -> int:
        return int(self.live.sum())

    def place_of(self, patch: int) -> str:
        """Where a patch is, by its labels: such as `pair 0, layer 12, pos S, head 3`."""
        pair, layer, pos, unit = np.unravel_index(int(self.cell[patch]), self.shape)
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

    @cached_property
    def write_layers(self) -> Bools:
        """[layer set, layer] where the value is written; `resid_post` writes one further on."""
        table = np.zeros((len(self.axes.layers), self.n_layers + 1), dtype=bool)
        for i, layers in enumerate(self.axes.layers):
            for layer in layers:
                table[i, layer + (self.site.name == "resid_post")] = True
        return table

    @cached_property
    def entry(self) -> Ints:
        """[patch] first block that the patch's tokens pass; n_layers: none, only the readout."""
        return self.write_layers.argmax(axis=1)[self.layer_set]

    @cached_property
    def token_entry(self) -> Bools:
        """[patch] whether only the patched tokens pass the entry block, not the whole suffix."""
        one_token = self.site.reach == "token" and self.site.name != "resid_post"
        return np.full(self.n_patches, one_token)

    @cached_property
    def suffix(self) -> Ints:
        """[patch] tokens from the patch on, up to the last that is read."""
        return self.lengths[self.pair] - self.start

    @property
    def token_layers(self) -> int:
        """Tokens times blocks that the live patches pass."""
        return int(self.cost[self.live].sum())

    @property
    def loop_token_layers(self) -> int:
        """What a loop needs that runs one full forward pass per patch."""
        return int((self.full_lengths[self.pair] * self.n_layers).sum())

    @cached_property
    def cost(self) -> Ints:
        """[patch] token-layers of a patch that runs."""
        suffix_layers = self.n_layers - self.entry - self.token_entry
        return suffix_layers * self.suffix + self.token_entry * (self.stop - self.start)


@dataclass(frozen=True, eq=False)
class PatchSet:
    """Some patches of one site."""

    plan: SitePlan
    patches: Ints  # indices into the plan


def plan_site(
    site: Site,
    axes: Axes,
    model: ModelShape,
    pairs: Sequence[PairShape],
    *,
    resample: bool = True,
) -> SitePlan:
    """Every patch of `site` over `axes`, each proved dead or called live.

    A patch is dead, its value the base metric exactly, when
    - `resample` (the new values come from the source prompt) and it ends before the first token
      that differs: by causality source and base are equal there;
    - `resample`, and at layer 0 it covers only equal tokens at a site that sees tokens alone;
    - it starts after the last position that a metric reads;
    - it sits in the last block at a site that changes its own token only, none of them read.

    Raises:
        PlanError: the axes are empty or out of range.
    """
    _check(site, axes, model, pairs)
    positions = axes.positions if axes.positions is not None else (None,)
    n_units = 1 if axes.units is None else len(axes.units)
    shape = (len(pairs), len(axes.layers), len(positions), n_units)

    rows: list[tuple[int, int, int, int]] = []  # pair, pos index, first, stop
    for p, pair in enumerate(pairs):
        for j, position in enumerate(positions):
            span = _span(position, pair)
            if span[0] < span[1]:  # positions past the end of a shorter prompt are no patches
                rows.append((p, j, *span))
    if not rows:
        raise PlanError("the sweep has no patches; choose positions that the prompts have")
    pair_of, pos_index, first, stop = (
        np.array([row[i] for row in rows], dtype=np.int64) for i in range(4)
    )

    n_layer_sets = len(axes.layers)
    layer_set = np.repeat(np.arange(n_layer_sets), n_units)
    unit_set = np.tile(np.arange(n_units), n_layer_sets)
    per_place = len(layer_set)
    pair_col = np.repeat(pair_of, per_place)
    pos_col = np.repeat(pos_index, per_place)
    layer_col = np.tile(layer_set, len(rows))
    unit_col = np.tile(unit_set, len(rows))
    first_col, stop_col = np.repeat(first, per_place), np.repeat(stop, per_place)
    cell = np.ravel_multi_index((pair_col, layer_col, pos_col, unit_col), shape)
    order = np.argsort(cell)

    last_read = np.array([pair.reads[-1] for pair in pairs])
    first_diff = np.array([pair.first_difference for pair in pairs])
    dead = first_col > last_read[pair_col]
    # reads and differences inside a span, by cumulative counts
    n_read = _counts(pairs, [_marks(pair.reads, pair.length) for pair in pairs])
    n_diff = _counts(pairs, [np.array(pair.differs) for pair in pairs])
    span_reads = n_read[pair_col, stop_col] - n_read[pair_col, first_col]
    span_diffs = n_diff[pair_col, stop_col] - n_diff[pair_col, first_col]
    only_last = np.array([set(layers) == {model.n_layers - 1} for layers in axes.layers])
    only_first = np.array([set(layers) == {0} for layers in axes.layers])
    if axes.n_sources:
        source = unit_col % axes.n_sources
        dead |= source > first_col  # causality: nothing attends to what follows it
    if site.reach == "token":
        dead |= only_last[layer_col] & (span_reads == 0)
    start_col = first_col
    if resample:
        dead |= stop_col <= first_diff[pair_col]
        if site.from_token:
            dead |= only_first[layer_col] & (span_diffs == 0)
        start_col = np.maximum(first_col, np.minimum(first_diff[pair_col], stop_col - 1))
    stop_col = np.minimum(stop_col, last_read[pair_col] + 1)
    start_col = np.minimum(start_col, np.maximum(stop_col - 1, 0))

    return SitePlan(
        site=site,
        axes=axes,
        shape=shape,
        lengths=last_read + 1,
        full_lengths=np.array([pair.length for pair in pairs]),
        reads=np.diff(n_read, axis=1).astype(bool),
        n_layers=model.n_layers,
        cell=cell[order],
        pair=pair_col[order],
        layer_set=layer_col[order],
        unit_set=unit_col[order],
        start=start_col[order],
        stop=stop_col[order],
        live=~dead[order],
    )


def _span(position: int | str | None, pair: PairShape) -> tuple[int, int]:
    if position is None:
        return 0, pair.length
    if isinstance(position, str):
        return pair.spans[position]
    return (position, position + 1) if position < pair.length else (0, 0)


def _marks(positions: Sequence[int], length: int) -> Bools:
    marks = np.zeros(length, dtype=bool)
    marks[list(positions)] = True
    return marks


def _counts(pairs: Sequence[PairShape], marks: Sequence[Bools]) -> Ints:
    """[pair, position] how many marks lie before the position."""
    longest = max(pair.length for pair in pairs)
    counts = np.zeros((len(pairs), longest + 1), dtype=np.int64)
    for i, row in enumerate(marks):
        counts[i, 1 : len(row) + 1] = np.cumsum(row)
    return counts


def _check(site: Site, axes: Axes, model: ModelShape, pairs: Sequence[PairShape]) -> None:
    if not pairs:
        raise PlanError("there are no prompt pairs; give at least one")
    if not axes.layers or not all(axes.layers):
        raise PlanError("layers is empty; choose at least one layer")
    for layer in (layer for layers in axes.layers for layer in layers):
        if not 0 <= layer < model.n_layers:
            raise PlanError(
                f"layers has {layer}, past the last layer {model.n_layers - 1}; "
                f"use 0..{model.n_layers - 1}"
            )
    longest = max(pair.length for pair in pairs)
    for position in axes.positions or ():
        if isinstance(position, str):
            for i, pair in enumerate(pairs):
                if position not in pair.spans:
                    known = ", ".join(pair.spans) or "none"
                    raise PlanError(
                        f"positions has the label {position!r}, which pair {i} does not carry; "
                        f"its labels: {known}"
                    )
        elif not 0 <= position < longest:
            raise PlanError(
                f"positions has {position}, past the last position {longest - 1} of the longest "
                f"prompt; use 0..{longest - 1}"
            )
    if axes.positions is not None and not axes.positions:
        raise PlanError("positions is empty; choose at least one, or 'all' for one patch over all")
    if axes.units is not None:
        n_units = model.n_units(site)
        if site.unit is None:
            raise PlanError(f"site {site.name} has no heads; leave heads out for it")
        if not axes.units or not all(axes.units):
            raise PlanError("heads is empty; choose at least one")
        for unit in (unit for units in axes.units for unit in units):
            if not 0 <= unit < n_units:
                raise PlanError(
                    f"{site.unit}s of {site.name} has {unit}, past the last one {n_units - 1}; "
                    f"use 0..{n_units - 1}"
                )
