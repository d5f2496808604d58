"""Runner selection: the packed runner if it passes the self-test, else the hooked runner."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ConfigError, ModelError, PatchsweepError, SiteError
from patchsweep.forward.plain import check_bridge
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.memory import is_out_of_memory
from patchsweep.models.wrapping import state_of
from patchsweep.runners.base import Runner
from patchsweep.runners.hooked import HookedRunner
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.self_test import NotDeadError, Outcome, SelfTest
from patchsweep.runners.trials import Kind, kind_of
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import Site

log = logging.getLogger("patchsweep")
RunnerName = Literal["auto", "packed", "hooked"]
# largest difference in logits that rounding can cause, by compute dtype
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}


@dataclass(frozen=True)
class RunnerChoice:
    """The runner that a sweep uses, and why."""

    runner: Runner
    reason: str
    difference: float | None  # largest error relative to its effect; None: not measured


@dataclass
class _Known:
    """Results of self-tests of a bridge, valid for one state of its weights and modules."""

    state: int
    outcomes: dict[_Key, Outcome] = field(default_factory=dict)
    hooked: set[_Key] = field(default_factory=set)  # keys of sites that hooks can patch


_Key = tuple[str, Kind, bool]  # site, kind of patch values, whether in several layers at once
_KNOWN: WeakKeyDictionary[TransformerBridge, _Known] = WeakKeyDictionary()


def select_runner(
    bridge: TransformerBridge,
    plans: Sequence[SitePlan],
    intervention: Intervention,
    *,
    wanted: RunnerName = "auto",
    tested: bool = False,
    max_tokens: int | None = None,
    cache_budget: int | None = None,
    compute_dtype: torch.dtype | None = None,
) -> RunnerChoice:
    """Return the packed runner if it passes the self-test at every site, else the hooked runner.

    `wanted` as `packed` or `hooked` selects that runner without comparing them; `hooked` still
    checks that the model is causal, unless it is `tested` already. Results are cached for the life
    of the process, until the model changes. A fallback to hooks is logged. The runner computes in
    `compute_dtype` (None: the model's own). The self-test computes in fp32 for 16-bit weights in
    any case, because there rounding is small and errors stand out.

    Raises:
        ConfigError: `packed` is wanted, and the model or a site does not allow it.
        ModelError: the model is not causal, the bridge computes something else than the model, or
            neither runner can run it.
        SiteError: no runner can patch a site.
    """
    sites = [plan.site for plan in plans]

    def packed_runner() -> PackedRunner:
        runner = PackedRunner(
            bridge, sites, max_tokens, cache_budget=cache_budget, compute_dtype=compute_dtype
        )
        runner.check(plans)
        return runner

    def hooked(reason: str, error: float | None = None) -> RunnerChoice:
        return RunnerChoice(HookedRunner(bridge, sites, compute_dtype), reason, error)

    def fallback(why: str, error: float | None) -> RunnerChoice:
        test.check_hooks(sites)
        reason = f"the packed runner cannot: {why}"
        log.warning(
            "runner=auto takes the hooked runner, tens of times slower than packed batches: %s",
            reason,
        )
        return hooked(reason, error)

    if wanted == "packed":
        try:
            return RunnerChoice(packed_runner(), "asked for", None)
        except Unsupported as error:
            raise ConfigError(
                f"runner=packed cannot run this: {error.reason}; use runner=auto or runner=hooked"
            ) from error
    if tested:
        return hooked("asked for")
    check_bridge(bridge)
    # whether a patch covers several layers
    joint = any(len(layers) > 1 for plan in plans for layers in plan.axes.layers)
    test = _Tests(bridge, kind_of(intervention), joint)
    if wanted == "hooked":
        test.check_hooks(sites)
        return hooked("asked for")
    try:
        packed = packed_runner()
        outcomes = test.outcomes(sites)
    except Unsupported as error:
        return fallback(error.reason, None)
    failed = next((o for o in outcomes.values() if not o.passed), None)
    difference = max(outcome.error for outcome in outcomes.values())
    if failed is not None:
        return fallback(failed.failure, difference)
    # the reason holds no measured number: it goes into the store, the same on every machine
    reason = "passes the self-test"
    if unseen := [name for name, outcome in outcomes.items() if not outcome.seen]:
        reason += f"; not compared, since the bridge's hooks do nothing there: {', '.join(unseen)}"
    return RunnerChoice(packed, reason, difference)


class _Tests:
    """Self-tests of one bridge: cached results, and new tests on demand."""

    def __init__(self, bridge: TransformerBridge, kind: Kind, joint_layers: bool) -> None:
        self.bridge, self.kind, self.joint_layers = bridge, kind, joint_layers
        state = state_of(bridge)
        known = _KNOWN.get(bridge)
        if known is None or known.state != state:
            known = _KNOWN[bridge] = _Known(state)
        self.known = known

    def outcomes(self, sites: Sequence[Site]) -> dict[str, Outcome]:
        """Return the self-test's outcome at each of `sites`, by name."""
        self._judge([site for site in sites if self._key(site) not in self.known.outcomes])
        return {site.name: self.known.outcomes[self._key(site)] for site in sites}

    def check_hooks(self, sites: Sequence[Site]) -> None:
        """Check that the bridge's hooks can patch `sites`, and that dead patches are dead there.

        Raises:
            SiteError: a site cannot be patched.
            ModelError: the bridge cannot run.
        """
        todo = [site for site in sites if self._key(site) not in self.known.hooked]
        if not todo:
            return
        try:
            self._self_test(todo).check_hooks()
        except PatchsweepError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ModelError(
                f"the bridge of {self.bridge.cfg.model_name} cannot be run with hooks: "
                f"{type(error).__name__}: {error}; runner=packed runs the model's own modules, "
                "without the self-test"
            ) from error
        self.known.hooked.update(self._key(site) for site in todo)

    def _key(self, site: Site) -> _Key:
        return site.name, self.kind, self.joint_layers

    def _self_test(self, sites: Sequence[Site]) -> SelfTest:
        return SelfTest(self.bridge, sites, self.kind, joint_layers=self.joint_layers)

    def _judge(self, sites: Sequence[Site]) -> None:
        """Test `sites` together; if that fails, one by one to find the failing site."""
        if not sites:
            return
        try:
            test = self._self_test(sites)
            results = test.judge(PackedRunner(self.bridge, sites, compute_dtype=test.compute_dtype))
            self.known.hooked.update(self._key(site) for site in sites)
        except NotDeadError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if len(sites) > 1:
                for site in sites:
                    self._judge([site])
                return
            results = {sites[0].name: self._failed(sites[0], error)}
        for site in sites:
            self.known.outcomes[self._key(site)] = results[site.name]

    def _failed(self, site: Site, error: Exception) -> Outcome:
        """Return the outcome for a site whose self-test ended with `error`, or raise the error."""
        if isinstance(error, Unsupported):
            return Outcome(error.reason, 0.0)
        if isinstance(error, SiteError):  # packed batches may be able to patch what no hook can
            return Outcome("", 0.0, seen=False)
        if isinstance(error, PatchsweepError):
            raise error
        # unknown blocks may fail in any way in packed batches, which the self-test must detect; if
        # the bridge fails too, raise its error
        self.check_hooks([site])
        return Outcome(f"{type(error).__name__}: {error}", 0.0)
