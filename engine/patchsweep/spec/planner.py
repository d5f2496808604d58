"""The planner: lists a sweep's patches, and proves some dead without running them.

Pure: `plan_site` makes the plan of one site from the shapes of the model and of the pairs.
`runners.packed.schedule` packs the plan's live patches into packed batches.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
    """Return `[pair, pos, (first, past last)]`, the span of each of `positions` in each pair.

    A position past the end of a pair's prompts has an empty span.
    """
    if all(isinstance(position, int) for position in positions):
        first = np.tile(np.array(positions), (len(pairs), 1))
        return np.stack([first, first + (first < [[pair.length] for pair in pairs])], axis=-1)
    return np.array([[_span(position, pair) for position in positions] for pair in pairs])


def _span(position: int | str | None, pair: PairShape) -> tuple[int, int]:
    if position is None:
        return 0, pair.length
    if isinstance(position, str):
        return pair.spans[position]
    return (position, position + 1) if position < pair.length else (0, 0)


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


def _outside(name: str, index: int, one: str, n: int, of: str = "") -> PlanError:
    """What is said of an index that is none of `n`."""
    fault = f"past the last {one} {n - 1}{of}" if index >= n else "and they count from 0"
    return PlanError(f"{name} has {index}, {fault}; use 0..{n - 1}")


def _check(site: Site, axes: Axes, model: ModelShape, pairs: Sequence[PairShape]) -> None:
    if not pairs:
        raise PlanError("there are no prompt pairs; give at least one")
    if not axes.layers or not all(axes.layers):
        raise PlanError("layers is empty; choose at least one layer")
    for layer in (layer for layers in axes.layers for layer in layers):
        if not 0 <= layer < model.n_layers:
            raise _outside("layers", layer, "layer", model.n_layers)
    longest = max(pair.length for pair in pairs)
    for position in axes.positions or ():
        if isinstance(position, str):
            for i, pair in enumerate(pairs):
                if position not in pair.spans:
                    labels = ", ".join(pair.spans)
                    remedy = (
                        f"use one of {labels}" if labels else "use positions, or label the pairs"
                    )
                    raise PlanError(
                        f"positions has the label {position!r}, which pair {i} does not carry; "
                        f"{remedy}"
                    )
        elif not 0 <= position < longest:
            raise _outside("positions", position, "position", longest, " of the longest prompt")
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
