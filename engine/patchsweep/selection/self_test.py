"""The self-test: a runner against the bridge's hooks, on a few amplified patches of every site.

One patch of one head, or of one neuron, may change a logit by less than rounding does, and then a
runner that ignores it would pass. So values are moved away from the base run's until each patch
changes logits about as much as they differ from each other, and errors are held against that
effect. Patches that a plan calls dead are tried too: their value must be the base metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.compute import compute_dtype_of, name_of
from patchsweep.errors import SiteError
from patchsweep.hooked import HookedRunner
from patchsweep.interventions import Intervention, Prompts
from patchsweep.metrics import METRICS
from patchsweep.models.homes import device_of
from patchsweep.planner import PatchSet, SitePlan
from patchsweep.request import model_shape
from patchsweep.runner import Runner
from patchsweep.selection.trials import (
    N_PAIRS,
    Factors,
    Kind,
    amplified,
    intervention_of,
    make_trials,
    whole,
)
from patchsweep.sites import Site

# what rounding may explain: a share of a patch's effect, and a share of the spread of logits
# (16 bits are computed in where quantised weights leave no choice)
ERROR = {"float64": 1e-6, "float32": 2e-3, "float16": 0.03, "bfloat16": 0.2}
FLOOR = {"float64": 1e-8, "float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
# effects are sought as large as the spread of logits, and one of this share is seen
VISIBLE = 0.02
MOST = 1e3  # by which values are amplified at once
LONGEST_PLACE = 60  # letters
METRICS_COMPARED = (METRICS["logit_diff"], METRICS["logit"])

Values = Float[Tensor, "metric patch"]


class NotDeadError(SiteError):
    """A patch that plans take for dead has an effect."""


@dataclass(frozen=True)
class Measured:
    """What a runner gives for one trial, on the CPU."""

    base: Float[Tensor, "metric pair"]
    source: Float[Tensor, "metric pair"]
    live: tuple[Values, ...]  # of each site

    def effects(self, site: int, chosen: PatchSet) -> Values:
        """Patched minus base metric."""
        return self.live[site] - self.base[:, chosen.plan.pair[chosen.patches]]


@dataclass(frozen=True)
class Outcome:
    """What the self-test found at one site."""

    failure: str  # what differs; empty: nothing does
    error: float  # largest error, as a share of its patch's effect
    seen: bool = True  # whether a patch of the site had an effect to compare

    @property
    def passed(self) -> bool:
        """Whether the runner gives what the bridge's hooks give."""
        return not self.failure


class SelfTest:
    """What the bridge's hooks give for the trials of some sites; runners are held against it.

    Four or five forward passes through the bridge over prompts of 5 and 8 tokens.

    Raises:
        SiteError: the bridge cannot patch one of the sites, or a patch that plans call dead has
            an effect there.
    """

    def __init__(
        self,
        bridge: TransformerBridge,
        sites: Sequence[Site],
        kind: Kind,
        *,
        joint_layers: bool = False,
    ) -> None:
        self.bridge, self.sites, self.kind = bridge, tuple(sites), kind
        self.compute_dtype = compute_dtype_of(bridge)
        dtype = name_of(self.compute_dtype)
        self.error, self.floor = ERROR.get(dtype, 2e-3), FLOOR.get(dtype, 1e-4)
        self.trials = make_trials(
            model_shape(bridge),
            sites,
            kind,
            avoid=getattr(bridge.tokenizer, "all_special_ids", None) or (),
            device=device_of(bridge),
            joint_layers=joint_layers,
        )
        self._referee = HookedRunner(bridge, sites, self.compute_dtype)
        self._intervention = self._prepared(self._referee)
        self._spread, self.factors = self._try_first()
        self._expected: list[Measured] | None = None

    @property
    def expected(self) -> list[Measured]:
        """What the bridge's hooks give for each trial, factors raised where nothing is seen."""
        if self._expected is None:
            self._expected = self._measure(self._referee, self._intervention)
            if self._raise_factors():
                self._expected = self._measure(self._referee, self._intervention)
        return self._expected

    def judge(self, runner: Runner) -> dict[str, Outcome]:
        """How far `runner` agrees, by site.

        Where unpatched runs differ, so does every site.
        """
        found = self._measure(runner, self._prepared(runner))
        outcomes = {}
        for i, site in enumerate(self.sites):
            failure, error, seen = self._unpatched(found), 0.0, False
            for trial, expected, got in zip(self.trials, self.expected, found, strict=True):
                text, share, visible = self._compare(trial.live[i], i, expected, got)
                failure, error = failure or text, max(error, share)
                seen |= visible
            outcomes[site.name] = Outcome(failure, error, seen)
        return outcomes

    def _prepared(self, runner: Runner) -> Intervention:
        """An intervention of the kind, with means of what `runner` reads."""
        intervention = intervention_of(self.kind)
        batches = [trial.batch for trial in self.trials]
        prompts = [Prompts(x, b.spans) for b in batches for x in (b.base, b.source)]
        intervention.prepare(prompts, runner.activations)
        return intervention

    def _try_first(self) -> tuple[float, Factors]:
        """The spread of logits, and factors by which each layer's effects come near to it."""
        trial = self.trials[0]
        loaded = self._referee.load(trial.batch, self._intervention)
        base = self._referee.references(loaded, METRICS_COMPARED)[0].cpu()
        logits = loaded.base_logits
        spread = float((logits - logits.mean(dim=-1, keepdim=True)).std())
        sets = [whole(chosen) for chosen in (*trial.live, *trial.dead)]
        values = self._referee.run_together(loaded, sets, METRICS_COMPARED)
        effects = [v - base[:, s.plan.pair[s.patches]] for s, v in zip(sets, values, strict=True)]
        n = len(self.sites)
        for chosen, effect in zip(trial.dead, effects[n:], strict=True):
            _check_dead(chosen, effect, self.floor * spread)
        factors = {
            chosen.plan.site.name: _factors(chosen, effect, spread)
            for chosen, effect in zip(trial.live, effects[:n], strict=True)
        }
        return spread, factors

    def _measure(self, runner: Runner, intervention: Intervention) -> list[Measured]:
        found = []
        for number, trial in enumerate(self.trials):
            loaded = runner.load(trial.batch, amplified(intervention, self.factors))
            base, source = runner.references(loaded, METRICS_COMPARED)
            sets = list(trial.live)
            if runner is self._referee:
                dead = trial.dead if number else ()
                sets = [whole(chosen) for chosen in (*trial.live, *dead)]
            values = [x.cpu() for x in runner.run_together(loaded, sets, METRICS_COMPARED)]
            for chosen, x in zip(trial.dead, values[len(self.sites) :], strict=False):
                effect = x - base.cpu()[:, chosen.plan.pair[chosen.patches]]
                _check_dead(chosen, effect, self.floor * self._spread)
            found.append(Measured(base.cpu(), source.cpu(), tuple(values[: len(self.sites)])))
        return found

    def _raise_factors(self) -> bool:
        """Amplify layers once more in which no patch is seen; whether there are such."""
        assert self._expected is not None
        raised = False
        for i, site in enumerate(self.sites):
            seen = np.zeros(int(self.bridge.cfg.n_layers), dtype=bool)
            for trial, expected in zip(self.trials, self._expected, strict=True):
                chosen = trial.live[i]
                for layer, patches in _by_layer(chosen).items():
                    effects = expected.effects(i, chosen)[:, patches]
                    seen[layer] |= bool(self._visible(effects).any())
            tried = {layer for trial in self.trials for layer in _by_layer(trial.live[i])}
            for layer in tried:
                if not seen[layer]:
                    self.factors[site.name][layer] *= MOST
                    raised = True
        return raised

    def _visible(self, effects: Values) -> NDArray[np.bool_]:
        """[patch] whether it has an effect that rounding is small against."""
        size = effects.abs().amax(dim=0)
        return (torch.isfinite(size) & (size >= VISIBLE * self._spread)).numpy()

    def _unpatched(self, found: Sequence[Measured]) -> str:
        """What differs in the runs without a patch."""
        for trial, expected, got in zip(self.trials, self.expected, found, strict=True):
            for which in ("base", "source"):
                ours, theirs = getattr(got, which), getattr(expected, which)
                worst = float((ours - theirs).abs().max())
                if not worst <= self.floor * self._spread:  # NaN included
                    return (
                        f"its unpatched runs differ from the bridge's by {worst:.2g} in logits at "
                        f"{trial.batch.length} tokens"
                    )
        return ""

    def _compare(
        self, chosen: PatchSet, site: int, expected: Measured, got: Measured
    ) -> tuple[str, float, bool]:
        """What differs first, the largest error as a share of its effect, whether one is seen."""
        effect = expected.effects(site, chosen).abs().amax(dim=0)
        error = (got.live[site] - expected.live[site]).abs().amax(dim=0)
        known = torch.isfinite(effect)  # values may overflow where they are amplified
        bad = known & ~(error <= self.error * effect + self.floor * self._spread)
        visible = torch.from_numpy(self._visible(expected.effects(site, chosen)))
        share = float((error / effect)[visible].amax()) if bool(visible.any()) else 0.0
        text = ""
        if bool(bad.any()):
            column = int(torch.nonzero(bad)[0])
            text = (
                f"it differs from the bridge's hooks at {_place(chosen, column)} by "
                f"{float(error[column]):.2g} logits, where the patch changes them by "
                f"{float(effect[column]):.2g}"
            )
        return text, share, bool(visible.any())


def _factors(chosen: PatchSet, effect: Values, spread: float) -> Float[Tensor, "layer pair"]:
    plan = chosen.plan
    size = effect.abs().amax(dim=0).double()
    factors = torch.ones(plan.n_layers, N_PAIRS, dtype=torch.float64)
    pair = plan.pair[chosen.patches]
    for layer, columns in _by_layer(chosen).items():
        for column in columns:
            wanted = spread / max(float(size[column]), 1e-30)
            factors[layer, pair[column]] = min(max(wanted, 1.0), MOST)
    return factors


def _by_layer(chosen: PatchSet) -> dict[int, list[int]]:
    """Layer -> the columns of the patches at this layer alone."""
    found: dict[int, list[int]] = {}
    for column, layer_set in enumerate(chosen.plan.layer_set[chosen.patches].tolist()):
        layers = chosen.plan.axes.layers[layer_set]
        if len(layers) == 1:
            found.setdefault(layers[0], []).append(column)
    return found


def _check_dead(chosen: PatchSet, effect: Values, floor: float) -> None:
    """Raises SiteError where a patch that plans call dead has an effect."""
    size = effect.abs().amax(dim=0)
    for column in torch.nonzero(~(size <= floor)).flatten().tolist():
        raise NotDeadError(
            f"site {chosen.plan.site.name}: the patch of {_place(chosen, column)} changes logits "
            f"by {float(size[column]):.2g}, though by causality it changes nothing that is read; "
            "something behind the site mixes tokens, so leave the site out"
        )


def _place(chosen: PatchSet, column: int) -> str:
    """Where a patch is, in words."""
    assert isinstance(chosen.plan, SitePlan)
    place = chosen.plan.place_of(int(chosen.patches[column]))
    return place if len(place) <= LONGEST_PLACE else f"{place[:LONGEST_PLACE]}..."
