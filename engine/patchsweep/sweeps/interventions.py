"""Several interventions in one sweep: a dim of the results; all share the captured runs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.models.moves import Arriving
from patchsweep.runners.base import Runner
from patchsweep.runners.packed.runner import Loaded, PackedRunner
from patchsweep.runners.select import RunnerChoice, RunnerName
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.spec import Request, SweepSpec, make_request
from patchsweep.store.difference import IDENTITY
from patchsweep.store.layout import Layout, Unit
from patchsweep.sweeps.exact import ExactWork
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.identity import intervention_words, sealed
from patchsweep.sweeps.layout import make_layout
from patchsweep.sweeps.noise import site_of

DIM = "intervention"
_AXIS = 2  # of the dim in the values: metric, pair, intervention, ...


def requests_of(
    model: TransformerBridge, pairs: PromptPairs, named: Any, spec: SweepSpec
) -> dict[str, Request]:
    """Return the request of each intervention; `spec` holds everything else.

    Raises:
        ConfigError: there are none, a name is no text, the run is not exact, or the interventions
            have different default directions and none is given.
        PatchsweepError: an argument breaks a rule for one of them.
    """
    if not named or not all(isinstance(name, str) and name for name in named):
        raise ConfigError(
            f"intervention={dict(named)!r} must map names to interventions, such as "
            "{'zero': 'zero', 'half': Scale(0.5)}"
        )
    methods = [*spec.method] if isinstance(spec.method, list | tuple) else [spec.method]
    others = {
        f"method={spec.method!r}": methods != [SweepSpec.method],
        f"precision={spec.precision}": spec.precision != SweepSpec.precision,
        f"tolerance={spec.tolerance!r}": spec.tolerance is not None,
    }
    if any(others.values()):
        unfit = next(name for name, is_given in others.items() if is_given)
        raise ConfigError(
            f"several interventions run exactly, and {unfit} is given; leave it out, or sweep them "
            "one by one"
        )
    requests = {
        name: make_request(model, pairs, replace(spec, intervention=given), aligned=True)
        for name, given in named.items()
    }
    directions = {request.direction for request in requests.values()}
    if len(directions) > 1:
        raise ConfigError(
            "the interventions have different default directions; give direction='denoising' "
            "(base is the corrupted prompt) or 'noising' (the clean one)"
        )
    return requests


def interventions_layout(
    requests: Mapping[str, Request], choice: RunnerChoice, config: Mapping[str, Any]
) -> Layout:
    """Return the layout of one sweep, with the dim of interventions after that of pairs."""
    one = make_layout(next(iter(requests.values())), choice, config)
    names = np.array([*requests], dtype=object)

    def widened(shape: tuple[Any, ...], more: Any) -> tuple[Any, ...]:
        return (*shape[:_AXIS], more, *shape[_AXIS:])

    variables = tuple(
        replace(v, dims=widened(v.dims, DIM), shape=widened(v.shape, len(names)))
        if v.attrs["role"] == "exact"
        else v
        for v in one.variables
    )
    words = {name: intervention_words(request.intervention) for name, request in requests.items()}
    identity = sealed({**one.attrs[IDENTITY], "intervention": words})
    return replace(
        one,
        variables=variables,
        coords={**one.coords, DIM: ((DIM,), names)},
        attrs={**one.attrs, "intervention": ", ".join(requests), IDENTITY: identity},
    )


class InterventionsWork:
    """Fills `<site>` for all interventions; a shard holds all of them."""

    def __init__(self, requests: Mapping[str, Request], runner: Runner) -> None:
        load = SharedLoads(runner)
        self.works = [ExactWork(request, runner, load) for request in requests.values()]

    def __contains__(self, variable: str) -> bool:
        return variable in self.works[0]

    def cost(self, unit: Unit) -> int:
        """See `Work`."""
        return sum(work.cost(unit) for work in self.works)

    def n_live(self, unit: Unit) -> int:
        """See `Work`."""
        return sum(work.n_live(unit) for work in self.works)

    def together(self, unit: Unit) -> Hashable:
        """See `Work`."""
        return self.works[0].together(unit)

    def values(self, units: Sequence[Unit]) -> list[Values]:
        """See `Work`; the noise floor is that of the first intervention's patches."""
        return self.start(units).read()

    def start(self, units: Sequence[Unit]) -> Arriving[list[Values]]:
        """See `Starts`."""
        started = [work.start(units) for work in self.works]

        def read() -> list[Values]:
            found = [of_work.read() for of_work in started]
            return [
                parts[0] if site_of(unit.variable) != unit.variable else np.stack(parts, axis=_AXIS)
                for unit, parts in zip(units, zip(*found, strict=True), strict=True)
            ]

        return Arriving(read, all(of_work.ready for of_work in started))

    def references(self, unit: Unit) -> tuple[Values, Values]:
        """See `Work`; the source run is the first intervention's."""
        return self.works[0].references(unit)


class SharedLoads:
    """Loads batches for several interventions, which share the captured runs."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self._last: tuple[Batch, Loaded] | None = None

    def __call__(self, batch: Batch, intervention: Intervention) -> Any:
        """See `Runner.load`; the packed runner's last captured batch is used again."""
        runner = self.runner
        if not isinstance(runner, PackedRunner):
            return runner.load(batch, intervention)
        if self._last is not None and _same_prompts(self._last[0], batch):
            loaded = self._last[1]
            values = {
                name: runner.values(point, intervention, loaded.base, loaded.source, batch.spans)
                for name, point in runner.points.items()
            }
            return replace(loaded, patch_values=values)
        loaded = runner.load(batch, intervention)
        self._last = (batch, loaded)
        return loaded


def _same_prompts(a: Batch, b: Batch) -> bool:
    return a.pairs == b.pairs and torch.equal(a.source, b.source)


def choose_runner(
    requests: Mapping[str, Request],
    wanted: RunnerName,
    prepare: Callable[[Request, RunnerName], RunnerChoice],
) -> RunnerChoice:
    """Return the runner that all requests share: packed if all can have it.

    `prepare(request, wanted)` selects a request's runner and prepares its intervention.
    """
    choices = [prepare(request, wanted) for request in requests.values()]
    if len({choice.runner.name for choice in choices}) > 1:
        choices = [prepare(request, "hooked") for request in requests.values()]
    return choices[0]
