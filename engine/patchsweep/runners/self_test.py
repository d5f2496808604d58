"""The self-test: compares a runner with the bridge's hooks on a few amplified patches of each site.

A patch of one head or neuron may change logits by less than rounding, and then a runner that
ignores it would pass. So patch values are moved away from the base run's until each patch changes
logits by about their spread, and errors are relative to that effect. Patches that a plan calls dead
are tested too: their value must be the base metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import SiteError
from patchsweep.models.compute import compute_dtype_of, name_of
from patchsweep.models.offload import device_of
from patchsweep.runners.base import Runner
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.trials import (
    AMPLIFIED,
    N_PAIRS,
    SHAPES,
    Factors,
    Kind,
    Trial,
    amplified,
    intervention_of,
    make_trial,
    whole,
)
from patchsweep.spec.interventions import Intervention, Prompts
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.plan import PatchSet, SitePlan
from patchsweep.spec.sites import Site
from patchsweep.spec.spec import model_shape

# largest errors that rounding can cause, relative to a patch's effect and to the spread of logits
# (16-bit compute occurs only with quantised weights)
ERROR = {"float64": 1e-6, "float32": 1e-3, "float16": 0.03, "bfloat16": 0.2}
FLOOR = {"float64": 1e-8, "float32": 1e-4, "float16": 0.01, "bfloat16": 0.05}
# the smallest effect to compare, relative to the spread of logits; amplification aims at 1
VISIBLE = 0.02
MOST = 1e3  # largest factor of one amplification
LONGEST_PLACE = 60  # characters
METRICS_COMPARED = (METRICS["logit_diff"], METRICS["logit"])

Values = Float[Tensor, "metric patch"]


class NotDeadError(SiteError):
    """A patch that plans call dead has an effect."""


@dataclass(frozen=True)
class Measured:
    """A runner's metrics for one trial, on the CPU."""

    base: Float[Tensor, "metric pair"]
    source: Float[Tensor, "metric pair"]
    ran: tuple[Values, ...]  # of sets of patches: live ones, a set a site, and dead ones

    def effects(self, i: int, chosen: PatchSet) -> Values:
        """Return patched minus base metric of set i, which is `chosen`."""
        return self.ran[i] - self.base[:, chosen.plan.pair[chosen.patches]]


@dataclass(frozen=True)
class Outcome:
    """The result of the self-test at one site."""

    failure: str  # description of the first difference; empty: passed
    error: float  # largest error relative to its patch's effect
    seen: bool = True  # whether a patch of the site had an effect to compare

    @property
    def passed(self) -> bool:
        """Whether the runner agrees with the bridge's hooks."""
        return not self.failure


class SelfTest:
    """Runs the trials of some sites through the bridge's hooks, and compares runners with them.

    Four forward passes through the bridge over prompts of 4 and 7 tokens serve all runners.
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
        self.error, self.floor = ERROR.get(dtype, 1e-3), FLOOR.get(dtype, 1e-4)
        self.trials = [
            make_trial(
                model_shape(bridge),
                sites,
                kind,
                number,
                avoid=getattr(bridge.tokenizer, "all_special_ids", None) or (),
                device=device_of(bridge),
                joint_layers=joint_layers,
            )
            for number in range(len(SHAPES))
        ]
        ones = torch.ones(model_shape(bridge).n_layers, N_PAIRS, dtype=torch.float64)
        self.factors: Factors = {site.name: ones.clone() for site in sites}
        self._expected: list[Measured] = []  # by the hooks; made for the first runner
        self._spread = 0.0  # of logits

    def judge(self, runner: Runner) -> dict[str, Outcome]:
        """Return the outcome of `runner` per site; if its unpatched runs differ, no site passes.

        The first runner's effects set the amplification factors. If these effects are wrong, the
        comparison finds that, or the hooks' effects are too small and are amplified further.

        Raises:
            SiteError: the bridge cannot patch one of the sites.
            NotDeadError: a patch that plans call dead has an effect.
        """
        intervention = self._prepared(runner)
        if not self._expected:
            self._set_factors(runner, intervention)
            self._expected = self._run_hooks()
            if self._raise_factors():
                self._expected = self._run_hooks()
        values = amplified(intervention, self.factors)
        measured = [_measure(runner, trial, values, trial.live)[1] for trial in self.trials]
        outcomes = {}
        for i, site in enumerate(self.sites):
            failure, error, seen = self._unpatched(measured), 0.0, False
            for trial, expected, got in zip(self.trials, self._expected, measured, strict=True):
                text, share, visible = self._compare(trial.live[i], i, expected, got)
                failure, error = failure or text, max(error, share)
                seen |= visible
            outcomes[site.name] = Outcome(failure, error, seen)
        return outcomes

    def check_hooks(self) -> None:
        """Check that the bridge's hooks can patch the sites, and that dead patches are dead there.

        Raises:
            SiteError: the hooks cannot patch a site.
            NotDeadError: a patch that plans call dead has an effect.
        """
        self._run_hooks(live=False)

    def _prepared(self, runner: Runner) -> Intervention:
        """Return an intervention of the kind, with means of the activations that `runner` reads."""
        intervention = intervention_of(self.kind)
        batches = [trial.batch for trial in self.trials]
        prompts = [Prompts(x, b.spans) for b in batches for x in (b.base, b.source)]
        intervention.prepare(prompts, runner.activations)
        return intervention

    def _set_factors(self, runner: Runner, intervention: Intervention) -> None:
        """Set the factors so that each patch changes logits by about the spread of logits."""
        trial = self.trials[0]
        measured = _measure(runner, trial, intervention, trial.live)[1]
        unpatched = torch.cat([measured.base[0], measured.source[0]])  # a logit_diff
        target = float(unpatched.square().mean().sqrt())
        for i, patch_set in enumerate(trial.live):
            pair = patch_set.plan.pair[patch_set.patches]
            size = measured.effects(i, patch_set).abs().amax(dim=0).nan_to_num(0.0)
            for layer, columns in _by_layer(patch_set).items():
                for column in columns:
                    factor = target / max(float(size[column]), 1e-30)
                    factor = min(max(factor, 1.0), MOST)
                    self.factors[patch_set.plan.site.name][layer, pair[column]] = factor

    def _run_hooks(self, *, live: bool = True) -> list[Measured]:
        """Return the metrics by the bridge's hooks, which replace all positions of each patch."""
        runner = HookedRunner(self.bridge, self.sites, self.compute_dtype)
        intervention = amplified(self._prepared(runner), self.factors)
        measured = []
        for number, trial in enumerate(self.trials):
            patch_sets = (*(trial.live if live else ()), *trial.dead)
            loaded, ran = _measure(runner, trial, intervention, [whole(c) for c in patch_sets])
            if not number:
                logits = loaded.base_logits
                self._spread = float((logits - logits.mean(dim=-1, keepdim=True)).std())
            for i, dead in enumerate(trial.dead, start=len(patch_sets) - len(trial.dead)):
                _check_dead(dead, ran.effects(i, dead), self._limit)
            measured.append(ran)
        return measured

    @property
    def _limit(self) -> float:
        """Largest difference between two logits that rounding can cause."""
        return self.floor * self._spread

    def _raise_factors(self) -> bool:
        """Amplify layers without a visible patch further; return whether there are any."""
        raised = False
        for i, site in enumerate(self.sites):
            seen: dict[int, bool] = {}
            for trial, measured in zip(self.trials, self._expected, strict=True):
                visible = self._visible(measured.effects(i, trial.live[i]))
                for layer, columns in _by_layer(trial.live[i]).items():
                    seen[layer] = seen.get(layer, False) or bool(visible[columns].any())
            for layer in (layer for layer, enough in seen.items() if not enough):
                self.factors[site.name][layer, :AMPLIFIED] *= MOST
                raised = True
        return raised

    def _visible(self, effects: Values) -> Bool[Tensor, " patch"]:
        """Return `[patch]`, whether its effect is large against rounding."""
        size = effects.abs().amax(dim=0)
        return torch.isfinite(size) & (size >= VISIBLE * self._spread)

    def _unpatched(self, found: Sequence[Measured]) -> str:
        """Return how the runs without a patch differ; empty if they do not."""
        for trial, expected, got in zip(self.trials, self._expected, found, strict=True):
            for run in ("base", "source"):
                worst = float((getattr(got, run) - getattr(expected, run)).abs().max())
                if not worst <= self._limit:  # NaN included
                    return (
                        f"its unpatched runs differ from the bridge's by {worst:.2g} in logits at "
                        f"{trial.batch.length} tokens"
                    )
        return ""

    def _compare(
        self, chosen: PatchSet, site: int, expected: Measured, got: Measured
    ) -> tuple[str, float, bool]:
        """Return the first difference, the largest relative error, whether an effect is visible."""
        effect = expected.effects(site, chosen).abs().amax(dim=0)
        error = (got.ran[site] - expected.ran[site]).abs().amax(dim=0)
        known = torch.isfinite(effect)  # values may overflow where they are amplified
        bad = known & ~(error <= self.error * effect + self._limit)  # NaN included
        visible = self._visible(expected.effects(site, chosen))
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


def _measure(
    runner: Runner, trial: Trial, intervention: Intervention, patch_sets: Sequence[PatchSet]
) -> tuple[Any, Measured]:
    """Return what `runner` loads for a trial, and the metrics of `patch_sets`."""
    loaded = runner.load(trial.batch, intervention)
    base, source = (x.cpu() for x in runner.references(loaded, METRICS_COMPARED))
    values = runner.run_together(loaded, patch_sets, METRICS_COMPARED)
    return loaded, Measured(base, source, tuple(x.cpu() for x in values))


def _by_layer(chosen: PatchSet) -> dict[int, list[int]]:
    """Return layer -> columns of the patches at this layer alone."""
    columns: dict[int, list[int]] = {}
    for column, layer_set in enumerate(chosen.plan.layer_set[chosen.patches].tolist()):
        layers = chosen.plan.axes.layers[layer_set]
        if len(layers) == 1:
            columns.setdefault(layers[0], []).append(column)
    return columns


def _check_dead(chosen: PatchSet, effects: Values, limit: float) -> None:
    """Raise NotDeadError if a patch that plans call dead has an effect."""
    size = effects.abs().amax(dim=0)
    for column in torch.nonzero(~(size <= limit)).flatten().tolist():
        raise NotDeadError(
            f"site {chosen.plan.site.name}: the patch of {_place(chosen, column)} changes logits "
            f"by {float(size[column]):.2g}, though by causality it changes nothing that is read; "
            "something behind the site mixes tokens, so leave the site out"
        )


def _place(chosen: PatchSet, column: int) -> str:
    """Return the place of a patch in words, in at most about `LONGEST_PLACE` characters."""
    assert isinstance(chosen.plan, SitePlan)
    place = chosen.plan.place_of(int(chosen.patches[column]))
    return place if len(place) <= LONGEST_PLACE else f"{place[:LONGEST_PLACE]}..."
