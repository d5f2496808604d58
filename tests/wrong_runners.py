"""Runners that are wrong, each in one way, for the self-test to find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from patchsweep.forward.site_locations import SiteLocation, resolve_site
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.plan import Axes, Cells, PatchSet, PatchTable, Plan
from patchsweep.spec.sites import SITES
from torch import Tensor

Make = Callable[[], type[PackedRunner]]


def changed_cells(change: Callable[[Cells, Plan], Cells]) -> type[PackedRunner]:
    """Runs other patches than it was asked for."""

    class Wrong(PackedRunner):
        def run_together(self, loaded, sets, metrics, null=()):
            made = []
            for chosen in sets:
                cells = change(chosen.plan.cells(chosen.patches), chosen.plan)
                shared = {f.name: getattr(chosen.plan, f.name) for f in fields(Plan)}
                numbers = np.arange(len(chosen.patches))
                made.append(PatchSet(PatchTable(**shared, table=cells), numbers))
            return super().run_together(loaded, made, metrics)

    return Wrong


def changed_axes(change: Callable[[Axes, Plan], Axes]) -> type[PackedRunner]:
    """Takes other heads, or layers, for the coordinates."""

    class Wrong(PackedRunner):
        def run_together(self, loaded, sets, metrics, null=()):
            sets = [
                PatchSet(replace(c.plan, axes=change(c.plan.axes, c.plan)), c.patches) for c in sets
            ]
            return super().run_together(loaded, sets, metrics)

    return Wrong


def changed_results(change: Callable[..., Tensor]) -> type[PackedRunner]:
    """Hands on something else than what came out: `change(values, base, source, chosen, loaded)`,
    of which base and source are those of each patch's pair."""

    class Wrong(PackedRunner):
        def run_together(self, loaded, sets, metrics, null=()):
            base, source = (x.cpu() for x in self.references(loaded, metrics))
            found = super().run_together(loaded, sets, metrics)
            pairs = [chosen.plan.pair[chosen.patches] for chosen in sets]
            return [
                change(values.clone(), base[:, pair], source[:, pair], chosen, loaded)
                for values, pair, chosen in zip(found, pairs, sets, strict=True)
            ]

    return Wrong


def changed_values(change: Callable[[Tensor, Tensor], Tensor]) -> type[PackedRunner]:
    """Patches in `change(values, base)`."""

    class Wrong(PackedRunner):
        def load(self, batch, intervention):
            own = intervention.values

            def values(site, layer, base, source, spans):
                return change(own(site, layer, base, source, spans), base)

            intervention.__dict__["values"] = values
            return super().load(batch, intervention)

    return Wrong


def changed_batch(change: Callable[[Any], Any]) -> type[PackedRunner]:
    """Takes values from another batch than it was given."""

    class Wrong(PackedRunner):
        def load(self, batch, intervention):
            return super().load(change(batch), intervention)

    return Wrong


def changed_prefix(change: Callable[[Any, Any, PackedRunner], list[Tensor]], name: str):
    """Reads other keys or values of the prefix."""

    class Wrong(PackedRunner):
        def load(self, batch, intervention):
            loaded = super().load(batch, intervention)
            other = super().load(replace(batch, base=batch.source), intervention)
            kept = change(getattr(loaded.base, name), getattr(other.base, name), self)
            return replace(loaded, base=replace(loaded.base, **{name: kept}))

    return Wrong


def _shifted(by: int) -> Callable[[Cells, Plan], Cells]:
    def change(cells: Cells, plan: Plan) -> Cells:
        lengths = plan.lengths[cells.pair]
        start = np.clip(cells.start + by, 0, lengths - 1)
        return cells._replace(start=start, stop=np.clip(cells.stop + by, start + 1, lengths))

    return change


def _other_heads(axes: Axes, plan: Plan) -> Axes:
    assert axes.units is not None
    n = 1 + max(max(unit) for unit in axes.units)
    return replace(axes, units=tuple(tuple((u + 1) % n for u in unit) for unit in axes.units))


def _one_head_less(axes: Axes, plan: Plan) -> Axes:
    assert axes.units is not None
    return replace(axes, units=tuple(unit[:-1] or unit for unit in axes.units))


def _other_layers(axes: Axes, plan: Plan) -> Axes:
    n = plan.n_layers
    return replace(axes, layers=tuple(tuple((x + 1) % n for x in s) for s in axes.layers))


def _other_source(cells: Cells, plan: Plan) -> Cells:
    """The cell of `pattern_cell` before, or after the first one."""
    n = plan.axes.n_sources
    source = cells.unit_set % n
    other = np.where(source > 0, source - 1, np.minimum(1, cells.start))
    return cells._replace(unit_set=cells.unit_set - source + other)


def _without(layer: Callable[[int, int], bool]) -> Callable[..., Tensor]:
    """The base metric where a patch lies in such a layer."""

    def change(values, base, source, chosen, loaded):
        plan = chosen.plan
        for column, layer_set in enumerate(plan.layer_set[chosen.patches].tolist()):
            if any(layer(x, plan.n_layers) for x in plan.axes.layers[layer_set]):
                values[:, column] = base[:, column]
        return values

    return change


def _where(bad: Callable[..., np.ndarray]) -> Callable[..., Tensor]:
    """The base metric where `bad(plan, patches, loaded)`."""

    def change(values, base, source, chosen, loaded):
        which = torch.as_tensor(bad(chosen.plan, chosen.patches, loaded)).expand(values.shape[1])
        return torch.where(which, base, values)

    return change


def _one_nan(values, base, source, chosen, loaded):
    values[0, -1] = torch.nan
    return values


class ReadsTooEarly(PackedRunner):
    """Reads the logits one token before the last of a row."""

    def run_together(self, loaded, sets, metrics, null=()):
        reads = tuple(read - 1 for read in loaded.batch.reads)
        loaded = replace(loaded, batch=replace(loaded.batch, reads=reads))
        return super().run_together(loaded, sets, metrics)


class OtherReferences(PackedRunner):
    """Says that base and source metric are each other."""

    def references(self, loaded, metrics):
        base, source = super().references(loaded, metrics)
        return source, base


def moved(site: str, to: str) -> type[PackedRunner]:
    """Patches `site` where `to` is: before rotary instead of after, or the other way round."""

    class Wrong(PackedRunner):
        def __init__(self, bridge, sites, *args, **kwargs):
            super().__init__(bridge, sites, *args, **kwargs)
            points = resolve_site(self.unwrapped, SITES[to]).points
            self.points[site] = SiteLocation(SITES[site], points)

    return Wrong


# way to be wrong -> the runner, for every site
WRONG: dict[str, Make] = {
    "ignores-the-patch": lambda: changed_results(lambda v, base, *_: base),
    "returns-the-source-metric": lambda: changed_results(lambda v, base, source, *_: source),
    "returns-nan": lambda: changed_results(lambda v, *_: v * torch.nan),
    "returns-one-nan": lambda: changed_results(_one_nan),
    "returns-infinity": lambda: changed_results(lambda v, *_: v + torch.inf),
    "swaps-the-metrics": lambda: changed_results(lambda v, *_: v.flip(0)),
    "one-metric-for-both": lambda: changed_results(lambda v, *_: v[:1].expand_as(v)),
    "turns-the-patches-round": lambda: changed_results(lambda v, *_: v.flip(1)),
    "first-patch-for-all": lambda: changed_results(lambda v, *_: v[:, :1].expand_as(v)),
    "metric-too-large-by-1-percent": lambda: changed_results(lambda v, *_: 1.01 * v),
    "effect-too-large-by-1-percent": lambda: changed_results(
        lambda v, base, *_: base + 1.01 * (v - base)
    ),
    "effect-of-the-other-sign": lambda: changed_results(lambda v, base, *_: 2 * base - v),
    "half-the-effect": lambda: changed_results(lambda v, base, *_: (base + v) / 2),
    "ignores-the-last-layer": lambda: changed_results(_without(lambda x, n: x == n - 1)),
    "ignores-the-first-layer": lambda: changed_results(_without(lambda x, n: x == 0)),
    "ignores-the-first-pair": lambda: changed_results(_where(lambda p, i, _: p.pair[i] == 0)),
    "ignores-the-second-pair": lambda: changed_results(_where(lambda p, i, _: p.pair[i] == 1)),
    "right-at-the-first-length-only": lambda: changed_results(
        _where(lambda p, i, loaded: np.array(loaded.batch.length > 5))
    ),
    "right-at-the-second-length-only": lambda: changed_results(
        _where(lambda p, i, loaded: np.array(loaded.batch.length < 6))
    ),
    "ignores-the-positions-read": lambda: changed_results(
        _where(lambda p, i, loaded: p.start[i] >= min(loaded.batch.reads))
    ),
    "position-before": lambda: changed_cells(_shifted(-1)),
    "position-after": lambda: changed_cells(_shifted(1)),
    "all-positions-up-to-the-patch": lambda: changed_cells(
        lambda cells, _: cells._replace(start=np.zeros_like(cells.start))
    ),
    "pair-of-another-row": lambda: changed_cells(
        lambda cells, _: cells._replace(pair=1 - cells.pair)
    ),
    "values-of-another-pair": lambda: changed_batch(lambda b: replace(b, source=b.source.flip(0))),
    "prompts-of-another-pair": lambda: changed_batch(
        lambda b: replace(b, base=b.base.flip(0), source=b.source.flip(0))
    ),
    "base-and-source-exchanged": lambda: changed_batch(
        lambda b: replace(b, base=b.source, source=b.base)
    ),
    "values-of-the-other-sign": lambda: changed_values(lambda v, base: 2 * base - v),
    "values-too-large-by-1-percent": lambda: changed_values(lambda v, base: 1.01 * v),
    "values-rounded-to-bf16": lambda: changed_values(lambda v, base: v.bfloat16().to(v)),
    "zeros-for-values": lambda: changed_values(lambda v, base: torch.zeros_like(v)),
    "not-the-values-but-their-change": lambda: changed_values(lambda v, base: v - base),
    "keys-of-the-source-prefix": lambda: changed_prefix(lambda own, other, _: other, "keys"),
    "values-of-the-source-prefix": lambda: changed_prefix(lambda own, other, _: other, "values"),
    "keys-of-another-pairs-prefix": lambda: changed_prefix(
        lambda own, other, _: [x.flip(0) for x in own], "keys"
    ),
    "keys-of-another-layers-prefix": lambda: changed_prefix(
        lambda own, other, _: [own[-1], *own[:-1]], "keys"
    ),
    "logits-of-the-token-before": lambda: ReadsTooEarly,
    "base-and-source-metric-exchanged": lambda: OtherReferences,
}
# where a site has several layers, heads or cells
WRONG_LAYERS: dict[str, Make] = {"layer-after": lambda: changed_axes(_other_layers)}
WRONG_HEADS: dict[str, Make] = {
    "head-after": lambda: changed_axes(_other_heads),
    "one-head-less": lambda: changed_axes(_one_head_less),
}
WRONG_CELLS: dict[str, Make] = {"cell-before": lambda: changed_cells(_other_source)}


def ways_of(site: str) -> dict[str, Make]:
    """The ways in which a runner can be wrong at `site`."""
    known = SITES[site]
    ways = dict(WRONG)
    if known.layered:
        ways |= WRONG_LAYERS
    else:
        # the embedding is at no last layer, and every reader of it is behind a norm
        del ways["ignores-the-last-layer"], ways["values-too-large-by-1-percent"]
    if known.unit is not None and site != "pattern_cell":
        ways |= WRONG_HEADS
    if site == "pattern_cell":
        ways |= WRONG_CELLS
    return ways
