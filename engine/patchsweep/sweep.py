"""`sweep`: plan, run, store. And `plan`, which takes the same arguments and runs nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attribution import check_request
from patchsweep.attribution.units import Estimator
from patchsweep.batch import Batch, make_batches
from patchsweep.errors import ConfigError, ModelError, StoreError
from patchsweep.estimate import Cost, estimate
from patchsweep.hooked import HookedRunner
from patchsweep.interventions import Direction, Intervention, ValueFn
from patchsweep.journal import Journal
from patchsweep.layout import Layout
from patchsweep.pairs import PromptPairs
from patchsweep.plan import SitePlan
from patchsweep.probe import Choice, RunnerName, choose_runner
from patchsweep.request import MetricLike, Positions, Request, Sets, device_of, make_request
from patchsweep.results import Memory, make_layout, shape_of
from patchsweep.screen import Asked, MethodLike, get_asked, run_screen
from patchsweep.store import Store, Unit

# tokens of a wave where no budget is given: large enough for full matrix-product speed
MAX_TOKENS = 4096
WAIT_S = 1.0  # between two looks at units that other processes hold


class Progress(Protocol):
    """Told how far a sweep is; token-layers are the unit of cost.

    An exception raised here ends the sweep between two units; nothing is lost then.
    """

    def begin(self, request: Request, choice: Choice, n_units: int, total: int, done: int) -> None:
        """`n_units` are to do; `total` token-layers are this process's, `done` of them before."""

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None: ...

    def waiting(self, n_units: int) -> None:
        """Other processes are at work on the last `n_units`; called again and again."""


class Quiet:
    """No progress."""

    def begin(
        self, request: Request, choice: Choice, n_units: int, total: int, done: int
    ) -> None: ...

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None: ...

    def waiting(self, n_units: int) -> None: ...


def sweep(
    model: TransformerBridge,
    pairs: PromptPairs,
    sites: str | Sequence[str] = ("resid_pre",),
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    direction: Direction | None = None,
    intervention: str | Intervention | float | Tensor | ValueFn = "resample",
    layers: Sets | None = None,
    positions: Positions = None,
    heads: Sets | Literal["all"] | None = None,
    neurons: Sets | Literal["all"] | None = None,
    read: int = -1,
    method: MethodLike | Sequence[MethodLike] = "exact",
    store: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    slice_index: int = 0,
    n_slices: int = 1,
    runner: RunnerName = "auto",
    max_tokens: int = MAX_TOKENS,
    config: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> xr.Dataset:
    """Every patch of `sites` on `pairs`, exactly, as an `xarray.Dataset`.

    The variable of a site holds the raw patched metric, dims `metric, pair, layer, pos` and
    `head` (`kv_head` for k and v) where the site has heads; `base_metric` and `source_metric`
    `[metric, pair]` are the unpatched runs.

    Args:
        model: what `load_model` gives, or any TransformerBridge of a causal model.
        direction: `denoising` patches clean values into the corrupted run, `noising` the other
            way round. Default: denoising for resample, noising for zero and mean.
        intervention: `resample`, `zero`, `mean`, `shuffle`, a constant, or a callable
            `(site, layer, base, source) -> values`.
        layers, heads, neurons: indices, or tuples of indices that are patched together.
            Default: each by itself. `heads="all"`: all heads together, no head dim.
        positions: indices, labels of the pairs, or `"all"` for one patch over all positions,
            which drops the pos dim. Default: each position.
        read: prompt position whose logits the metrics read; default the last.
        method: `exact`, or attribution: `atp`, `atp_star`, `ig`, `relp` and the others of
            `patchsweep.attribution.METHODS`; several at once share a Dataset. The variable
            `<site>_<method>` then holds the estimate of metric(patched) - metric(base).
            `screen` (or a `Screen`) estimates all patches and runs the foremost exactly.
        store: folder or URL of a Zarr store; results stream there, and a second call with the
            same arguments goes on where the first stopped. Many processes may do so at once.
        storage_options: what the storage library is told (endpoint, retries); no credentials.
        slice_index, n_slices: do every n-th unit of work only, from this one on; all slices
            together write what one process would.
        runner: `auto` lets the probe choose; `wave` and `hooked` insist.
        max_tokens: most tokens in one wave.

    Raises:
        PatchsweepError: an argument breaks a rule; nothing has run then.
    """
    request = make_request(
        model,
        pairs,
        sites,
        metrics,
        direction=direction,
        intervention=intervention,
        layers=layers,
        positions=positions,
        heads=heads,
        neurons=neurons,
        read=read,
    )
    asked = get_asked(method)
    if asked.methods:
        check_request(request, asked.methods)
    if model.training:
        raise ModelError("the model is in training mode, where dropout is drawn; call model.eval()")
    if asked.screen is not None:
        asked.screen.check(request, n_slices)

    def layout_of(choice: Choice) -> Layout:
        return make_layout(
            request,
            choice,
            config or {},
            exact=asked.exact,
            more=asked.variables(request),
            attrs=asked.attrs(request),
        )

    share = Share(slice_index, n_slices)
    progress = progress or Quiet()
    if store is None:
        if n_slices > 1:
            raise ConfigError(f"n_slices={n_slices} needs a store, where the slices meet; give one")
        choice = prepare_runner(request, runner, max_tokens) if asked.exact else NO_RUNNER
        memory = Memory(layout_of(choice))
        _run(request, asked, choice, memory, progress)
        return memory.dataset()
    recorded = _recorded_choice(store, storage_options)
    if recorded is not None:  # another run's store is refused before anything runs
        layout = layout_of(recorded)
        Store.create_or_resume(store, layout, storage_options=storage_options).close()
    choice = prepare_runner(request, runner, max_tokens) if asked.exact else NO_RUNNER
    with (
        Store.create_or_resume(store, layout_of(choice), storage_options=storage_options) as sink,
        Journal(store, storage_options=storage_options) as journal,
    ):
        journalled = _Journalled(progress, journal, share, config)
        _run(request, asked, choice, sink, journalled, share)
        return sink.dataset()


def _run(
    request: Request,
    asked: Asked,
    choice: Choice,
    sink: Memory | Store,
    progress: Progress,
    share: Share | None = None,
) -> None:
    """Write all that was asked for and is missing in `sink`."""
    share = share or Share()
    if asked.screen is None:
        estimator = Estimator(request, asked.methods) if asked.methods else None
        run_units(request, choice, sink, progress, share, estimator)
        return
    pending = sink.pending()
    progress.begin(request, choice, len(pending), 0, 0)
    if not pending:
        return
    start = time.perf_counter()
    found = run_screen(request, choice, asked.screen)
    for name, values in (("base_metric", found.base), ("source_metric", found.source)):
        for pair in range(values.shape[1]):
            sink.write_fixed(name, pair, values[:, pair : pair + 1])
    for unit in _claimed(sink, pending, progress):
        sink.write(unit, found.values[unit.variable][sink.variables[unit.variable].slices(unit)])
        progress.advance(unit, 0, 0, time.perf_counter() - start)


@dataclass(frozen=True)
class Share:
    """Which units of a run one process does: every n-th."""

    index: int = 0
    n: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.n:
            raise ConfigError(
                f"slice={self.index} of n_slices={self.n} does not exist; "
                + (f"use 0..{self.n - 1}" if self.n > 0 else "n_slices is at least 1")
            )


class _Recorded:
    """Stands for the runner of which a store tells the name."""

    def __init__(self, name: str) -> None:
        self.name = name


NO_RUNNER = Choice(
    _Recorded("none"),  # type: ignore[arg-type]
    "no patch was run exactly",
    None,
)


def _recorded_choice(store: str | Path, storage_options: Mapping[str, Any] | None) -> Choice | None:
    """The runner that an existing store was begun with; None if there is no such store."""
    try:
        provenance = Store.open(store, storage_options=storage_options).attrs["provenance"]
        return Choice(
            _Recorded(provenance["runner"]),  # type: ignore[arg-type]
            provenance["runner_reason"],
            None,
        )
    except (StoreError, KeyError):
        return None  # `create_or_resume` says what is wrong, if something is


def plan(
    model: TransformerBridge,
    pairs: PromptPairs,
    sites: str | Sequence[str] = ("resid_pre",),
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff",
    *,
    max_tokens: int = MAX_TOKENS,
    **selection: Any,
) -> Cost:
    """What `sweep` with these arguments will cost; checks them all and runs no model."""
    return estimate(
        make_request(model, pairs, sites, metrics, **selection),
        max_tokens,
    )


def prepare_runner(request: Request, wanted: RunnerName, max_tokens: int) -> Choice:
    """The runner for `request`, its intervention prepared."""
    everything = range(len(request.pairs))
    batches = make_batches(
        request.pairs, everything, request.direction, request.read, device_of(request.bridge)
    )
    first = make_batches(
        request.pairs, [0], request.direction, request.read, device_of(request.bridge)
    )[0]
    clean = {b.length: b.source if request.direction == "denoising" else b.base for b in batches}
    if wanted != "wave":  # the probe patches too, so the values must be ready before it
        hooked = HookedRunner(request.bridge, request.sites)
        request.intervention.prepare(clean, hooked.activations)
    choice = choose_runner(
        request.bridge,
        request.plans,
        first,
        request.intervention,
        wanted=wanted,
        max_tokens=max_tokens,
    )
    if wanted == "wave":
        request.intervention.prepare(clean, choice.runner.activations)
    return choice


def run_units(
    request: Request,
    choice: Choice,
    sink: Memory | Store,
    progress: Progress,
    share: Share = Share(),
    estimator: Estimator | None = None,
) -> None:
    """Run every unit of the `share` that `sink` still misses; `estimator` gives the estimates.

    Units that another process holds are waited for, and taken over if it dies.
    """
    plans = {plan.site.name: plan for plan in request.plans}
    every = sink.pending() if isinstance(sink, Memory) else sink.units()
    units = sorted(every, key=lambda unit: (unit.first_pair, unit.variable))
    mine = units[share.index :: share.n]
    patches_of = {
        unit: _patches_of(plans[unit.variable], unit) for unit in mine if unit.variable in plans
    }
    costs = {u: _token_layers(plans[u.variable], patches) for u, patches in patches_of.items()}
    if estimator is not None:
        costs |= {unit: estimator.cost(unit) for unit in mine if unit.variable in estimator}
    missing = set(sink.pending())
    pending = [unit for unit in mine if unit in missing]
    total = sum(costs.values())
    done = total - sum(costs[unit] for unit in pending)
    progress.begin(request, choice, len(pending), total, done)
    captures = _Captures(request, choice)
    exact = any(name in plans for name in sink.variables)
    for unit in _claimed(sink, pending, progress):
        start = time.perf_counter()
        if estimator is not None and unit.variable in estimator:
            if not exact:
                _write_references(sink, unit, estimator)
            sink.write(unit, estimator.values(unit))
            seconds = time.perf_counter() - start
            progress.advance(unit, costs[unit], estimator.n_live(unit), seconds)
            continue
        patches = patches_of[unit]
        site_plan = plans[unit.variable]
        block = _Block(site_plan, unit, len(request.metrics))
        for batch, loaded, base, source in captures.of(unit.pairs):
            for row, pair in enumerate(batch.pairs):
                sink.write_fixed("base_metric", pair, base[:, row : row + 1])
                sink.write_fixed("source_metric", pair, source[:, row : row + 1])
            here = patches[np.isin(site_plan.pair[patches], batch.pairs)]
            dead, live = here[~site_plan.live[here]], here[site_plan.live[here]]
            local = batch.local
            block.put(dead, base[:, [local[p] for p in site_plan.pair[dead].tolist()]])
            if len(live):
                found = choice.runner.run(loaded, site_plan, live, request.metrics)
                block.put(live, found.numpy())
        sink.write(unit, block.values())
        progress.advance(
            unit,
            costs[unit],
            int(site_plan.live[patches].sum()),
            time.perf_counter() - start,
        )


def _write_references(sink: Memory | Store, unit: Unit, estimator: Estimator) -> None:
    """The unpatched metrics, where no exact run tells them."""
    found = estimator.references(unit)
    if found is not None:
        for name, values in zip(("base_metric", "source_metric"), found, strict=True):
            for row, pair in enumerate(unit.pairs):
                sink.write_fixed(name, pair, values[:, row : row + 1])


def _claimed(sink: Memory | Store, units: Sequence[Unit], progress: Progress) -> Iterator[Unit]:
    """Each of `units` when it is ours to do; ends when all are done, by us or by others."""
    if isinstance(sink, Memory):
        yield from units
        return
    left = list(units)
    while left:
        for unit in left:
            yield from sink.claim([unit])
        missing = set(sink.pending())
        left = [unit for unit in left if unit in missing]
        if left:
            progress.waiting(len(left))
            time.sleep(WAIT_S)


class _Journalled:
    """A progress that is also written to the store's journal."""

    def __init__(
        self,
        inner: Progress,
        journal: Journal,
        share: Share,
        config: Mapping[str, Any] | None,
    ) -> None:
        self._inner, self._journal, self._share, self._config = inner, journal, share, config

    def begin(self, request: Request, choice: Choice, n_units: int, total: int, done: int) -> None:
        self._journal.started(
            dict(self._config or {}),
            n_units=n_units,
            token_layers=total - done,
            slice=self._share.index,
            n_slices=self._share.n,
            probe_difference=choice.difference,
        )
        self._inner.begin(request, choice, n_units, total, done)

    def advance(self, unit: Unit, token_layers: int, n_live: int, seconds: float) -> None:
        self._journal.unit_done(unit, seconds=seconds, token_layers=token_layers, n_live=n_live)
        self._inner.advance(unit, token_layers, n_live, seconds)

    def waiting(self, n_units: int) -> None:
        self._inner.waiting(n_units)


class _Captures:
    """Captured batches, the last few kept: the units of a pair follow each other."""

    def __init__(self, request: Request, choice: Choice, keep: int = 2) -> None:
        self.request, self.choice, self.keep = request, choice, keep
        self._kept: dict[tuple[int, ...], Any] = {}

    def of(self, pairs: range) -> Iterator[tuple[Batch, Any, np.ndarray, np.ndarray]]:
        """Batches of `pairs` with what the runner loaded, and base and source metrics."""
        request, runner = self.request, self.choice.runner
        for batch in make_batches(
            request.pairs, pairs, request.direction, request.read, device_of(request.bridge)
        ):
            if batch.pairs not in self._kept:
                while len(self._kept) >= self.keep:
                    self._kept.pop(next(iter(self._kept)))
                loaded = runner.load(batch, request.intervention)
                base, source = runner.references(loaded, request.metrics)
                self._kept[batch.pairs] = (loaded, base.cpu().numpy(), source.cpu().numpy())
            yield batch, *self._kept[batch.pairs]


def _patches_of(plan: SitePlan, unit: Unit) -> np.ndarray:
    inside = (plan.pair >= unit.pairs.start) & (plan.pair < unit.pairs.stop)
    inside &= (plan.layer_set >= unit.layers.start) & (plan.layer_set < unit.layers.stop)
    return np.flatnonzero(inside)


def _token_layers(plan: SitePlan, patches: np.ndarray) -> int:
    return int(plan.cost[patches][plan.live[patches]].sum())


class _Block:
    """The cells of one unit, as the store keeps them; NaN until put."""

    def __init__(self, plan: SitePlan, unit: Unit, n_metrics: int) -> None:
        self.plan, self.unit = plan, unit
        self.shape = (len(unit.pairs), len(unit.layers), *plan.shape[2:])
        self._cells = np.full((n_metrics, int(np.prod(self.shape))), np.nan, np.float32)

    def put(self, patches: np.ndarray, values: np.ndarray) -> None:
        """Keep `values` `[metric, patch]`."""
        pair, layer, pos, units = np.unravel_index(self.plan.cell[patches], self.plan.shape)
        local = (pair - self.unit.pairs.start, layer - self.unit.layers.start, pos, units)
        self._cells[:, np.ravel_multi_index(local, self.shape)] = values

    def values(self) -> np.ndarray:
        """The block, without the axes that the site does not have."""
        n_metrics = len(self._cells)
        shape = list(shape_of(self.plan, n_metrics))
        shape[1] = self.shape[0]
        if self.plan.site.layered:
            shape[2] = self.shape[1]
        return self._cells.reshape(shape)
