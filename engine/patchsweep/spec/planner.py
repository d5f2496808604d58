"""The planner: lists a sweep's patches, and proves some dead without running them.

Pure: `plan_site` makes the plan of one site from the shapes of the model and of the pairs.
`runners.packed.schedule` packs the plan's live patches into packed batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from patchsweep.arguments import position_axis as given_positions
from patchsweep.errors import PlanError
from patchsweep.spec.plan import (
    Axes,
    Bools,
    Ints,
    ModelShape,
    PairShape,
    Places,
    SitePlan,
)
from patchsweep.spec.sites import Site

END = "end"  # the last token of each prompt; needs no label
LABELS = "labels"  # every label that all pairs have, and END


def plan_site(
    site: Site,
    axes: Axes,
    model: ModelShape,
    pairs: Sequence[PairShape],
    *,
    resample: bool = True,
) -> SitePlan:
    """Return the plan of `site` over `axes`; each patch is proved dead or counts as live.

    A patch is dead, and its value is exactly the base metric, when
    - `resample` (patch values come from the source prompt) and the patch ends before the first
      token that differs: by causality source and base are equal there;
    - `resample`, the patch is at layer 0 alone, base and source tokens are equal at its positions,
      and the site depends there on the token and its position alone;
    - the patch starts after the last position that a metric reads;
    - the patch is in the last block alone, the site changes only its own token, and no metric
      reads its positions.

    Raises:
        PlanError: the axes are empty or out of range.
    """
    _check(site, axes, model, pairs)
    positions = axes.positions if axes.positions is not None else (None,)
    n_units = 1 if axes.units is None else len(axes.units)
    places = _places(site, positions, pairs, resample)
    if not len(places.pair):
        raise PlanError("the sweep has no patches; choose positions that the prompts have")
    return SitePlan(
        site=site,
        axes=axes,
        shape=(len(pairs), len(axes.layers), len(positions), n_units),
        lengths=np.array([pair.reads[-1] for pair in pairs]) + 1,
        reads=_reads(pairs),
        n_layers=model.n_layers,
        full_lengths=np.array([pair.length for pair in pairs]),
        places=places,
    )


def _places(
    site: Site,
    positions: Sequence[int | str | None],
    pairs: Sequence[PairShape],
    resample: bool,
) -> Places:
    """Return all places of the sweep, and at which of them patches are dead."""
    spans = _spans(positions, pairs)
    _leave_out_alone(spans, positions, pairs)
    # positions past the end of a shorter prompt are no places
    pair, pos = np.nonzero(spans[..., 0] < spans[..., 1])
    first, stop = spans[pair, pos].T
    last_read = np.array([p.reads[-1] for p in pairs])[pair]
    first_diff = np.array([p.first_difference for p in pairs])[pair]
    # reads and differences inside a span, by cumulative counts
    n_read = _counts(_reads(pairs))
    n_diff = _counts(_differences(pairs))
    dead = first > last_read
    equal = np.zeros(len(pair), dtype=bool)
    start = first
    if resample:
        dead |= stop <= first_diff
        equal = n_diff[pair, stop] == n_diff[pair, first]
        start = np.maximum(first, np.minimum(first_diff, stop - 1))
    stop_read = np.minimum(stop, last_read + 1)
    return Places(
        pair=pair,
        pos=pos,
        first=first,
        start=np.minimum(start, np.maximum(stop_read - 1, 0)),
        stop=stop_read,
        dead=dead,
        unread=n_read[pair, stop] == n_read[pair, first],
        equal=equal,
    )


def _spans(positions: Sequence[int | str | None], pairs: Sequence[PairShape]) -> Ints:
    """Return `[pair, pos, (first, past last)]`: `span_of` each of `positions` in each pair."""
    if all(isinstance(position, int) for position in positions):
        asked = np.tile(np.array(positions), (len(pairs), 1))
        first = np.where(asked < 0, asked + [[pair.n_prompt] for pair in pairs], asked)
        inside = (first >= 0) & (first < [[pair.length] for pair in pairs])
        first = np.where(inside, first, 0)
        return np.stack([first, first + inside], axis=-1)
    return np.array([[span_of(position, pair) for position in positions] for pair in pairs])


def _leave_out_alone(
    spans: Ints, positions: Sequence[int | str | None], pairs: Sequence[PairShape]
) -> None:
    """Empty the spans of single positions to which no position of the source prompt corresponds.

    Raises:
        PlanError: a longer span holds such a position, or all positions are such.
    """
    for i, pair in enumerate(pairs):
        for alone in pair.alone:
            inside = (spans[i, :, 0] <= alone) & (alone < spans[i, :, 1])
            for j in np.flatnonzero(inside).tolist():
                if not isinstance(positions[j], int):
                    name = "'all'" if positions[j] is None else repr(positions[j])
                    raise PlanError(
                        f"positions={name} covers position {alone} of pair {i}, to which no "
                        "position of the source prompt corresponds; patch single positions, or "
                        "use the other direction, whose base prompt is the shorter one"
                    )
                spans[i, j] = 0


def span_of(position: int | str | None, pair: PairShape) -> tuple[int, int]:
    """Return the tokens `[first, past last)` of a position, a label, or None, which means all.

    A negative position counts from the end of the prompt. `END` is the prompt's last token, unless
    the pair has a label of that name. A position outside the pair's prompts has the span (0, 0).
    """
    if position is None:
        return 0, pair.length
    if isinstance(position, str):
        last = pair.n_prompt - 1
        return (
            pair.spans.get(position, (last, last + 1))
            if position == END
            else (pair.spans[position])
        )
    first = position + pair.n_prompt if position < 0 else position
    return (first, first + 1) if 0 <= first < pair.length else (0, 0)


def position_axis(positions: Any, pairs: Sequence[PairShape]) -> tuple[int | str, ...] | None:
    """Return the position axis that all sites share; None: one patch over all positions.

    `positions=None` is every position. Prompts of unequal lengths are aligned at their ends, so
    that a mean over pairs is a mean over like positions: the axis is -longest..-1.

    Raises:
        PlanError: `positions` is no such axis.
    """
    if positions is None:
        longest = max(pair.n_prompt for pair in pairs)
        if any(pair.n_prompt != longest for pair in pairs):
            return tuple(range(-longest, 0))
        return tuple(range(max(pair.length for pair in pairs)))
    if not isinstance(positions, str):
        return given_positions(positions)
    if positions == LABELS:
        return _shared_labels(pairs)
    if positions == END:
        return (END,)
    if positions != "all":
        raise PlanError(
            f"positions={positions!r} is not known; use 'all', 'labels', 'end', or a list of "
            "indices or labels"
        )
    return None


def _shared_labels(pairs: Sequence[PairShape]) -> tuple[str, ...]:
    """Return the labels that all pairs have, in the order of the first pair's prompt, and `END`."""
    shared = [name for name in pairs[0].spans if all(name in pair.spans for pair in pairs)]
    if not shared:
        raise PlanError(
            "positions='labels' needs a label that all pairs have, and there is none; label the "
            "pairs, or count from the end, such as positions=[-2, -1]"
        )
    ordered = sorted(shared, key=lambda name: pairs[0].spans[name])
    return (*ordered, *([] if END in ordered else [END]))


def _counts(marks: Bools) -> Ints:
    """Return `[pair, position]`, the number of marks before the position."""
    counts = np.zeros((marks.shape[0], marks.shape[1] + 1), dtype=np.int64)
    np.cumsum(marks, axis=1, out=counts[:, 1:])
    return counts


def _reads(pairs: Sequence[PairShape]) -> Bools:
    """Return `[pair, position]`, whether logits are read there."""
    marks = np.zeros((len(pairs), max(pair.length for pair in pairs)), dtype=bool)
    for row, pair in zip(marks, pairs, strict=True):
        row[list(pair.reads)] = True
    return marks


def _differences(pairs: Sequence[PairShape]) -> Bools:
    """Return `[pair, position]`, whether the two prompts have different tokens there."""
    marks = np.zeros((len(pairs), max(pair.length for pair in pairs)), dtype=bool)
    for row, pair in zip(marks, pairs, strict=True):
        row[: pair.length] = pair.differs
    return marks


def _outside(
    name: str, index: int, one: str, n: int, of: str = "", *, lowest: int = 0
) -> PlanError:
    """What is said of an index that is not in lowest..n-1; negative ones count from the end."""
    if index >= n:
        return PlanError(f"{name} has {index}, past the last {one} {n - 1}{of}; use 0..{n - 1}")
    fault = f"before the first {one}{of}" if lowest else "and they count from 0"
    return PlanError(f"{name} has {index}, {fault}; use {lowest}..{n - 1}")


def _check(site: Site, axes: Axes, model: ModelShape, pairs: Sequence[PairShape]) -> None:
    if not pairs:
        raise PlanError("there are no prompt pairs; give at least one")
    if not axes.layers or not all(axes.layers):
        raise PlanError("layers is empty; choose at least one layer")
    for layer in (layer for layers in axes.layers for layer in layers):
        if not 0 <= layer < model.n_layers:
            raise _outside("layers", layer, "layer", model.n_layers, lowest=-model.n_layers)
    longest = max(pair.length for pair in pairs)
    lowest = -max(pair.n_prompt for pair in pairs)
    for position in axes.positions or ():
        if isinstance(position, str):
            for i, pair in enumerate(pairs):
                if position not in pair.spans and position != END:
                    labels = ", ".join(pair.spans)
                    remedy = (
                        f"use one of {labels}" if labels else "use positions, or label the pairs"
                    )
                    raise PlanError(
                        f"positions has the label {position!r}, which pair {i} does not carry; "
                        f"{remedy}"
                    )
        elif not lowest <= position < longest:
            of = " of the longest prompt"
            raise _outside("positions", position, "position", longest, of, lowest=lowest)
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
                raise _outside(f"{site.unit}s of {site.name}", unit, "one", n_units)
