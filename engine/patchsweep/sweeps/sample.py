"""A random sample of exact values, to compare estimates with instead of an exact sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_runner, whole_number
from patchsweep.data.pairs import PromptPairs
from patchsweep.models.running import running
from patchsweep.runners.select import RunnerName
from patchsweep.spec.finite import check_cells
from patchsweep.spec.spec import MetricLike, Request, SweepSpec, as_spec, make_request
from patchsweep.sweeps.api import prepare_runner
from patchsweep.sweeps.exact import Block, Captures, measured_floor
from patchsweep.sweeps.layout import Memory, make_layout
from patchsweep.sweeps.noise import site_of


def sample_exact(
    model: TransformerBridge,
    pairs: PromptPairs,
    sites: SweepSpec | str | Sequence[str] = SweepSpec.sites,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    n: int = 200,
    seed: int = 0,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    **selection: Any,
) -> xr.Dataset:
    """Return exact values of `n` random live patches of each site, in the form of `sweep`.

    `sites` may be a `SweepSpec`; `selection` are its other fields. Live patches that were not drawn
    are NaN; dead ones have the base metric. To compare estimates with the sample:
    `compare(estimates.merge(sample, compat="override"))`.

    Raises:
        PatchsweepError: an argument breaks a rule; nothing has run then.
    """
    spec = as_spec(sites, metrics=metrics, **selection)
    return draw(make_request(model, pairs, spec, aligned=True), n, seed, runner, max_tokens)


def draw(
    request: Request, n: int, seed: int, runner: RunnerName, max_tokens: int | None = None
) -> xr.Dataset:
    """Do `sample_exact` for a request.

    Raises:
        PlanError: `n` is not positive, or `seed` is negative.
        ConfigError: there is no such runner, or `max_tokens` is out of range.
        ModelError: the model is not in a state to run, see `running.check_state`.
    """
    whole_number("n", n, least=1)
    whole_number("seed", seed, least=0)
    check_runner(runner, max_tokens)
    rng = np.random.default_rng(seed)
    drawn = {}
    for plan in request.plans:
        numbers = rng.choice(plan.n_live, size=min(n, plan.n_live), replace=False)
        drawn[plan.site.name] = plan.nth_live(numbers)
    with running(request.bridge):
        choice = prepare_runner(request, runner, max_tokens)
        memory = Memory(make_layout(request, choice, {}))
        captures = Captures(request, choice.runner)
        plans = {plan.site.name: plan for plan in request.plans}
        for unit in sorted(memory.pending(), key=lambda unit: unit.first_pair):
            plan = plans[site_of(unit.variable)]
            if plan.site.name != unit.variable:
                floor = measured_floor(choice.runner, captures, plan, unit.pairs, request.metrics)
                memory.write(unit, floor)
                continue
            block = Block(plan, unit, len(request.metrics))
            for captured in captures.of(unit.pairs):
                live = block.fill_dead(captured)
                patches = live[np.isin(live, drawn[plan.site.name])]
                if len(patches):
                    values = choice.runner.run(captured.loaded, plan, patches, request.metrics)
                    block.put(patches, check_cells(values.numpy(), plan, patches, request.metrics))
                for row, pair in enumerate(captured.batch.pairs):
                    columns = slice(row, row + 1)
                    memory.write_references(
                        pair, captured.base[:, columns], captured.source[:, columns]
                    )
            memory.write(unit, block.values())
        return memory.dataset()
