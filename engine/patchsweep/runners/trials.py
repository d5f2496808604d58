"""Trials of the self-test: short random prompts, and a few patches of every site.

Each trial has three pairs of prompts. The first pair has patches of one head (or neuron), the
second patches of many heads, so that one amplification factor fits all values of a pair. The third
has patches that plans call dead, not amplified. Layers are the first, the middle and the last;
positions are single ones and a span.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from patchsweep.models.wrapping import trial_tokens
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import (
    Custom,
    Intervention,
    Mean,
    Resample,
    Shuffle,
    Spans,
    Zero,
    values_of,
)
from patchsweep.spec.plan import (
    Axes,
    Ints,
    ModelShape,
    PairShape,
    PatchSet,
    PatchTable,
    Plan,
    SitePlan,
)
from patchsweep.spec.planner import plan_site
from patchsweep.spec.sites import Site

N_PAIRS = 3
AMPLIFIED = 2  # pairs whose patch values are amplified
N_SHARED = 1  # tokens that base and source have in common, at the start
SPAN = "span"  # label of all tokens but the last

Kind = Literal["resample", "zero", "mean", "mean_all", "mean_label", "custom"]
Factors = Mapping[str, Float[Tensor, "layer pair"]]  # by site


@dataclass(frozen=True)
class Trial:
    """Patches of every site on prompts of one length."""

    batch: Batch
    live: tuple[PatchSet, ...]  # one a site
    dead: tuple[PatchSet, ...]  # one a site; the plan says that their value is the base metric


@dataclass(frozen=True)
class Shape:
    """The length of a trial's prompts, and the positions that it reads."""

    length: int
    reads: tuple[int, ...]  # positions whose logits are read


# the second is longer than the windows of tiny models, reads two tokens, and has a token after them
SHAPES = (Shape(4, (3,)), Shape(7, (4, 5)))


def kind_of(intervention: Intervention) -> Kind:
    """Return the kind of an intervention's patch values; one kind shares a self-test."""
    cls = type(intervention)
    if cls in (Resample, Shuffle):
        return "resample"
    if cls is Zero:
        return "zero"
    if isinstance(intervention, Mean):
        kinds: dict[str, Kind] = {"position": "mean", "all": "mean_all", "label": "mean_label"}
        return kinds[intervention.per]
    return "custom"


def intervention_of(kind: Kind) -> Intervention:
    """Return an intervention that represents `kind` and works for any prompts."""
    if kind == "resample":
        return Resample()
    if kind == "zero":
        return Zero()
    if kind == "custom":
        return Custom(_noise)
    return Mean({"mean": "position", "mean_all": "all", "mean_label": "label"}[kind])  # type: ignore[arg-type]


def _noise(site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
    """Return noisy values, so that writing them at a wrong place gives another effect."""
    generator = torch.Generator().manual_seed(layer)
    noise = torch.randn(base.shape[1:], generator=generator).to(base)
    if site.is_pattern:
        return base * (1 + noise)  # stays 0 where causality makes it 0
    return base + noise * base.float().square().mean().sqrt().to(base)


def amplified(intervention: Intervention, factors: Factors) -> Intervention:
    """Return `intervention` with its values moved `factors` times as far from the base run's.

    The result has the same class, since runners check it.
    """

    def values(
        site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        new = values_of(intervention, site, layer, base, source, spans)
        factor = factors[site.name][layer].to(base)
        factor = rearrange(factor, f"pair -> pair {' '.join(['1'] * (base.ndim - 1))}")
        return base + factor * (new - base)

    result = copy.copy(intervention)
    result.__dict__["values"] = values
    result.__dict__["asks_pair_by_pair"] = True
    return result


def make_trial(
    shape: ModelShape,
    sites: Sequence[Site],
    kind: Kind,
    number: int,
    *,
    avoid: Sequence[int],
    device: torch.device,
    joint_layers: bool,
) -> Trial:
    """Return the trial of `SHAPES[number]`, without the tokens `avoid`.

    `joint_layers`: include patches of several layers at once.
    """
    length, reads = SHAPES[number].length, SHAPES[number].reads
    tokens = trial_tokens(
        shape.d_vocab, length + 2 * len(reads), n_prompts=2 * N_PAIRS, avoid=avoid, seed=number
    )
    base, source = tokens[:N_PAIRS, :length].clone(), tokens[N_PAIRS:, :length].clone()
    source[:, :N_SHARED] = base[:, :N_SHARED]
    answers = tokens[:N_PAIRS, length:].view(N_PAIRS, 2, len(reads))
    spans: Spans = {SPAN: (0, length - 1)}
    batch = Batch(
        pairs=tuple(range(N_PAIRS)),
        base=base.to(device),
        source=source.to(device),
        reads=reads,
        source_reads=reads,
        answer=answers[:, 0].to(device),
        wrong=answers[:, 1].to(device),
        spans=(spans,) * N_PAIRS,
    )
    pairs = [
        PairShape(tuple((b != s).tolist()), reads, spans) for b, s in zip(base, source, strict=True)
    ]
    plans = [_plan(site, shape, pairs, kind, joint_layers) for site in sites]
    return Trial(
        batch,
        live=tuple(PatchSet(plan, _some_live(plan, number)) for plan in plans),
        dead=tuple(PatchSet(plan, _some_dead(plan, number)) for plan in plans),
    )


def _plan(
    site: Site, shape: ModelShape, pairs: Sequence[PairShape], kind: Kind, joint_layers: bool
) -> SitePlan:
    last, length = shape.n_layers - 1, pairs[0].length
    layers: list[tuple[int, ...]] = [(0,), (last // 2,), (last,)]
    if joint_layers and last and not site.is_pattern:
        layers.append((0, last))
    positions: tuple[int | str, ...] = (0, 1, *pairs[0].reads, length - 1, SPAN)
    units = _units(site, shape)
    n_sources = 0
    if site.cells:
        assert units is not None
        n_sources, positions = length, positions[:-1]
        units = tuple(unit for unit in units for _ in range(length))
    axes = Axes(
        tuple(dict.fromkeys(layers)) if site.layered else ((0,),),
        tuple(dict.fromkeys(positions)),
        units,
        n_sources,
    )
    return plan_site(site, axes, shape, pairs, resample=kind == "resample")


def _units(site: Site, shape: ModelShape) -> tuple[tuple[int, ...], ...] | None:
    """Return four sets of heads: the first, the last (pair 0); every other, all (pair 1)."""
    if site.unit is None:
        return None
    n = shape.n_units(site)
    return (0,), (n - 1,), tuple(range(0, n, 2)), tuple(range(n))


def whole(chosen: PatchSet) -> PatchSet:
    """Return the same patches with all their positions; plans skip those that change nothing."""
    plan = chosen.plan
    assert isinstance(plan, SitePlan)
    assert plan.axes.positions is not None
    _, _, pos, _ = np.unravel_index(plan.cell[chosen.patches], plan.shape)
    last = int(plan.full_lengths[0]) - 1
    spans = [(p, p + 1) if isinstance(p, int) else (0, last) for p in plan.axes.positions]
    start, stop = np.array(spans, dtype=np.int64)[pos].T
    cells = plan.cells(chosen.patches)._replace(start=start, stop=stop)
    shared = {f.name: getattr(plan, f.name) for f in fields(Plan)}
    return PatchSet(PatchTable(**shared, table=cells), np.arange(len(chosen.patches)))


def _some_live(plan: SitePlan, number: int) -> Ints:
    """Return one live patch per layer and pair; units and positions alternate."""
    chosen: list[int] = []
    for layer in range(len(plan.axes.layers)):
        for pair in range(AMPLIFIED):
            candidates = plan.live_patches([pair], range(layer, layer + 1))
            turn = number + layer
            if plan.axes.units is not None:
                unit = plan.unit_set[candidates] // (plan.axes.n_sources or 1)
                candidates = candidates[unit == 2 * pair + turn % 2]
            if len(candidates):
                _, _, pos, _ = np.unravel_index(plan.cell[candidates], plan.shape)
                positions = np.unique(pos)
                candidates = candidates[
                    pos == positions[-1 - (turn // 2 + pair + layer) % len(positions)]
                ]
                chosen.append(int(candidates[turn % len(candidates)]))
    return np.array(sorted(chosen), dtype=np.int64)


def _some_dead(plan: SitePlan, number: int) -> Ints:
    """Return one dead patch per layer."""
    rng = np.random.default_rng(number)
    chosen: list[int] = []
    for layer in range(len(plan.axes.layers)):
        candidates = plan.patches([AMPLIFIED], range(layer, layer + 1))
        candidates = candidates[~plan.live[candidates]]
        if len(candidates):
            chosen.append(int(rng.choice(candidates)))
    return np.array(sorted(chosen), dtype=np.int64)
