"""bf16 sweeps that prove themselves: fast products, and their error measured in the same run.

`<site>` holds fp32 values where a patch was run again, else those of the bf16 waves;
`<site>_bf16` holds those of the bf16 waves everywhere, so their difference where both are exact is
the measured error. Both are set on the fp32 base run: value = base + (patched - base of the bf16
run). `<site>_noise` is the largest change that patching a run with its own values made, per metric
and pair: effects below it are rounding.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from patchsweep.errors import ConfigError
from patchsweep.exact import (
    Block,
    Captured,
    Captures,
    check_numbers,
    patches_of,
    references_of,
    split,
)
from patchsweep.planner import Ints, SitePlan
from patchsweep.probe import Choice
from patchsweep.request import Request, blocks_of
from patchsweep.results import dims_of, shape_of
from patchsweep.store import Unit, Variable
from patchsweep.waves import WaveRunner
from patchsweep.work import Values

# patches of a unit that are run again in fp32: its largest effects, and a random sample
N_LARGEST = 24
N_SAMPLE = 8
SUFFIX, NOISE = "_bf16", "_noise"


def proof_variables(request: Request) -> tuple[Variable, ...]:
    """The variables of a bf16 sweep besides the sites' own."""
    blocks = blocks_of(request.plans)
    found = []
    for plan in request.plans:
        name = plan.site.name
        found.append(
            Variable(
                name=name + SUFFIX,
                dims=dims_of(plan),
                shape=shape_of(plan, len(request.metrics)),
                unit=blocks[name],
                attrs={"long_name": f"patched metric at {name}, by bf16 products alone"},
            )
        )
        found.append(
            Variable(
                name=name + NOISE,
                dims=("metric", "pair"),
                shape=(len(request.metrics), len(request.pairs)),
                unit=(blocks[name][0], 1),
                attrs={"long_name": f"rounding noise of a bf16 patch at {name}"},
            )
        )
    return tuple(found)


class ProvenWork:
    """Patches with bf16 products, the largest and a sample run again in fp32.

    Raises:
        ConfigError: the wave runner, which alone has bf16 products, does not suit the model.
    """

    def __init__(self, request: Request, choice: Choice, max_tokens: int | None) -> None:
        if not isinstance(choice.runner, WaveRunner):
            raise ConfigError(
                f"precision=bf16 needs the wave runner, but {choice.reason}; use precision=model"
            )
        self.request = request
        self.exact = choice.runner
        self.runner = WaveRunner(request.bridge, request.sites, max_tokens, "bf16")
        # one for both: how much may be kept in memory, and the unembedding, which stays exact
        self.runner.budget, self.runner.readout = self.exact.budget, self.exact.readout
        self.plans = {plan.site.name: plan for plan in request.plans}
        self.captures = Captures(request, self.runner)
        self.exact_captures = Captures(request, self.exact)
        self._kept: dict[str, tuple[Unit, Values]] = {}  # the other variable's block of a unit

    def __contains__(self, variable: str) -> bool:
        return _site_of(variable) in self.plans

    def cost(self, unit: Unit) -> int:
        """See `Work`; the proof is a few patches more and not counted."""
        if unit.variable not in self.plans:
            return 0
        plan = self.plans[unit.variable]
        patches = patches_of(plan, unit)
        return int(plan.cost[patches][plan.live[patches]].sum())

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        if unit.variable not in self.plans:
            return 0
        plan = self.plans[unit.variable]
        return int(plan.live[patches_of(plan, unit)].sum())

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`: those of the fp32 runs."""
        return references_of(self.exact_captures, unit, len(self.request.metrics))

    def values(self, unit: Unit) -> Values:
        """See `Work`."""
        site = _site_of(unit.variable)
        plan = self.plans[site]
        if unit.variable == site + NOISE:
            return self._noise(plan, unit)
        kept = self._kept.pop(unit.variable, None)
        if kept is not None and (kept[0].pairs, kept[0].layers) == (unit.pairs, unit.layers):
            return kept[1]
        merged, raw = self._blocks(plan, unit)
        other = site if unit.variable != site else site + SUFFIX
        self._kept = {other: (unit, merged if other == site else raw)}
        return raw if other == site else merged

    def _blocks(self, plan: SitePlan, unit: Unit) -> tuple[Values, Values]:
        """The unit's block with the fp32 values, and the one of the bf16 waves alone."""
        metrics = self.request.metrics
        merged, raw = Block(plan, unit, len(metrics)), Block(plan, unit, len(metrics))
        both = zip(
            split(plan, unit, self.captures), split(plan, unit, self.exact_captures), strict=True
        )
        ran: list[tuple[Captured, Ints, Values]] = []  # the fp32 runs, live patches, effects
        for (low, _, _), (exact, dead, live) in both:
            base = exact.base_of(plan, dead)
            merged.put(dead, base)
            raw.put(dead, base)
            if not len(live):
                continue
            found = self.runner.run(low.loaded, plan, live, metrics).numpy()
            effect = check_numbers(found, plan, live) - low.base_of(plan, live)
            values = exact.base_of(plan, live) + effect
            raw.put(live, values)
            merged.put(live, values)
            ran.append((exact, live, effect))
        for exact, again in _chosen(ran, _seed(plan, unit)):
            values = self.exact.run(exact.loaded, plan, again, metrics).numpy()
            merged.put(again, check_numbers(values, plan, again))
        return merged.values(), raw.values()

    def _noise(self, plan: SitePlan, unit: Unit) -> Values:
        """Largest |change| per metric and pair when runs are patched with their own values."""
        metrics = self.request.metrics
        noise = np.zeros((len(metrics), len(unit.pairs)), np.float32)
        whole = Unit(plan.site.name, 0, 0, unit.pairs, range(plan.shape[1]))
        for captured, _, live in split(plan, whole, self.captures):
            loaded = self.runner.with_own_values(captured.loaded)
            rng = np.random.default_rng(_seed(plan, unit))
            for pair in captured.batch.pairs:
                mine = live[plan.pair[live] == pair]
                some = np.sort(rng.choice(mine, min(N_SAMPLE, len(mine)), replace=False))
                if len(some):
                    found = self.runner.run(loaded, plan, some, metrics).numpy()
                    change = np.abs(found - captured.base_of(plan, some)).max(axis=1)
                    noise[:, pair - unit.pairs.start] = change
        return noise


def _site_of(variable: str) -> str:
    return variable.removesuffix(SUFFIX).removesuffix(NOISE)


def _seed(plan: SitePlan, unit: Unit) -> Sequence[int]:
    """The same sample in every run of a unit, whichever process does it."""
    return [zlib.crc32(plan.site.name.encode()), unit.pair_block, unit.layer_block]


def _chosen(
    ran: Sequence[tuple[Captured, Ints, Values]], seed: Sequence[int]
) -> Iterator[tuple[Captured, Ints]]:
    """The patches to run again: the largest effects of each metric, and a random sample.

    `ran` has for each batch of a unit its patches and their effects `[metric, patch]`.
    """
    if not ran:
        return
    effect = np.concatenate([effect for _, _, effect in ran], axis=1)
    n = effect.shape[1]
    largest = np.argsort(-np.abs(effect), axis=1)[:, :N_LARGEST].ravel()
    sample = np.random.default_rng(seed).choice(n, min(N_SAMPLE, n), replace=False)
    chosen = np.zeros(n, dtype=bool)
    chosen[largest] = chosen[sample] = True
    ends = np.cumsum([len(live) for _, live, _ in ran])[:-1]
    for (exact, live, _), again in zip(ran, np.split(chosen, ends), strict=True):
        if again.any():
            yield exact, live[again]
