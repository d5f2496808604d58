"""The probe: which runner a model gets. The wave runner must first agree with the bridge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.batch import Batch
from patchsweep.errors import ConfigError, PatchsweepError, SiteError
from patchsweep.hooked import HookedRunner
from patchsweep.interventions import Intervention
from patchsweep.metrics import METRICS
from patchsweep.models.homes import is_offloaded
from patchsweep.planner import SitePlan
from patchsweep.runner import Runner
from patchsweep.waves import Unsupported, WaveRunner

RunnerName = Literal["auto", "wave", "hooked"]
# largest difference in logits that rounding may explain, by dtype of the weights
TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.3}
N_PATCHES = 4


@dataclass(frozen=True)
class Choice:
    """The runner that a sweep uses, and why."""

    runner: Runner
    reason: str
    difference: float | None  # largest difference from the hooked runner, where it was measured


def choose_runner(
    bridge: TransformerBridge,
    plans: Sequence[SitePlan],
    batch: Batch,
    intervention: Intervention,
    *,
    wanted: RunnerName = "auto",
    max_tokens: int | None = None,
    cache_budget: int | None = None,
) -> Choice:
    """The wave runner where it agrees with the hooked one on a few patches per site.

    `wave` or `hooked` as `wanted` takes that runner without comparing.

    Raises:
        ConfigError: the wave runner is wanted and the model or a site does not allow it.
    """
    sites = [plan.site for plan in plans]
    if wanted == "hooked":
        return Choice(HookedRunner(bridge, sites), "asked for", None)
    try:
        wave = WaveRunner(bridge, sites, max_tokens, cache_budget=cache_budget)
        wave.check(plans)
        if wanted == "wave":
            return Choice(wave, "asked for", None)
        comparable, unseen = _comparable(bridge, plans, batch)
        difference = _difference(
            wave,
            HookedRunner(bridge, [p.site for p in comparable]),
            comparable,
            batch,
            intervention,
        )
    except Unsupported as error:
        if wanted == "wave":
            raise ConfigError(
                f"runner=wave cannot run this: {error.reason}; use runner=auto or runner=hooked"
            ) from error
        return Choice(HookedRunner(bridge, sites), f"the wave runner cannot: {error.reason}", None)
    except PatchsweepError:
        raise
    except Exception as error:
        # blocks of an unknown kind may break in any way when they are replayed: to find that out
        # is what the probe is for
        if wanted == "wave":
            raise
        text = f"the wave runner cannot: {type(error).__name__}: {error}"
        return Choice(HookedRunner(bridge, sites), text, None)
    tolerance = TOLERANCE.get(str(bridge.cfg.dtype).removeprefix("torch."), 1e-3)
    if difference > tolerance:
        return Choice(
            HookedRunner(bridge, sites),
            f"the wave runner differs from the bridge by {difference:.2g} in logits, "
            f"more than {tolerance:g}",
            difference,
        )
    # no measured number in the reason: it goes into the store, which is the same on every machine
    reason = f"agrees with the bridge within {tolerance:g} in logits"
    if unseen:
        reason += f"; not compared, since the bridge's hooks do nothing there: {', '.join(unseen)}"
    return Choice(wave, reason, difference)


def _comparable(
    bridge: TransformerBridge, plans: Sequence[SitePlan], batch: Batch
) -> tuple[list[SitePlan], list[str]]:
    """The plans whose site the hooked runner can patch, and the names of the other sites."""
    try:
        HookedRunner(bridge, [plan.site for plan in plans]).check(batch.base[:1])
    except SiteError:
        pass  # one by one below, to see which
    else:
        return list(plans), []
    comparable, unseen = [], []
    for plan in plans:
        try:
            HookedRunner(bridge, [plan.site]).check(batch.base[:1])
            comparable.append(plan)
        except SiteError:
            unseen.append(plan.site.name)
    return comparable, unseen


def _difference(
    wave: WaveRunner,
    hooked: HookedRunner,
    plans: Sequence[SitePlan],
    batch: Batch,
    intervention: Intervention,
) -> float:
    """Largest difference in answer logits: unpatched, and over a few patches of every site."""
    metrics = (METRICS["logit_diff"], METRICS["logit"])
    ours, theirs = wave.load(batch, intervention), hooked.load(batch, intervention)
    worst = 0.0
    for a, b in zip(
        wave.references(ours, metrics), hooked.references(theirs, metrics), strict=True
    ):
        worst = max(worst, float((a - b).abs().max()))
    rng = np.random.default_rng(0)
    for plan in plans:
        mine = plan.live_patches(batch.pairs)
        if not len(mine):
            continue
        # few layers, so that the hooked runner needs few forward passes: each of them reads the
        # weights anew where they are offloaded
        n_layers = 1 if is_offloaded(wave.replica.bridge.original_model) else 2
        layers = rng.choice(np.unique(plan.layer_set[mine]), size=n_layers)
        mine = mine[np.isin(plan.layer_set[mine], layers)]
        chosen = np.sort(rng.choice(mine, size=min(N_PATCHES, len(mine)), replace=False))
        a = wave.run(ours, plan, chosen, metrics)
        b = hooked.run(theirs, plan, chosen, metrics)
        worst = max(worst, float((a - b).abs().max()))
    return worst
