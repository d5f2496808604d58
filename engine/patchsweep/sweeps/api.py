"""`sweep` runs a sweep; `plan` takes the same arguments and returns the cost without running."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_config, check_runner, check_store_path
from patchsweep.attribution import check_request
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.models.compute import ComputeDtype, name_of, sentence
from patchsweep.models.running import running, runs_model
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.runners.select import RunnerChoice, RunnerName, select_runner
from patchsweep.spec.batch import clean_prompts
from patchsweep.spec.interventions import Direction, Intervention, Reader, ValueFn
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.spec import (
    SPEC_FIELDS,
    MetricLike,
    Positions,
    Precision,
    Request,
    Sets,
    SweepSpec,
    as_spec,
    make_request,
)
from patchsweep.store.difference import ADAPTIVE, IDENTITY
from patchsweep.store.layout import Layout
from patchsweep.store.store import Store, check_space, recorded_attributes
from patchsweep.sweeps.adaptive import (
    Adaptive,
    AdaptiveWork,
    adaptive_variables,
    check_adaptive,
)
from patchsweep.sweeps.bf16 import RecheckedWork, check_proof, recheck_variables
from patchsweep.sweeps.calibration import Calibration
from patchsweep.sweeps.cost import Cost, estimate
from patchsweep.sweeps.estimates import Estimator
from patchsweep.sweeps.exact import ExactWork
from patchsweep.sweeps.executor import Progress, Slice, Work, check_progress, run_into
from patchsweep.sweeps.identity import read_weights, refuse_unversioned, request_settings
from patchsweep.sweeps.interventions import (
    InterventionsWork,
    choose_runner,
    interventions_layout,
    requests_of,
)
from patchsweep.sweeps.layout import make_layout
from patchsweep.sweeps.means import keep_means
from patchsweep.sweeps.methods import EXACT, MethodLike, MethodSpec, parse_methods
from patchsweep.sweeps.saving import check_sample, estimate_saving
from patchsweep.sweeps.screen import ScreenWork

log = logging.getLogger("patchsweep")
InterventionLike = str | Intervention | float | Tensor | ValueFn


@runs_model
def sweep(
    model: TransformerBridge,
    pairs: PromptPairs,
    sites: SweepSpec | str | Sequence[str] = SweepSpec.sites,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    direction: Direction | None = SweepSpec.direction,
    intervention: InterventionLike | Mapping[str, InterventionLike] = SweepSpec.intervention,
    layers: Sets | None = SweepSpec.layers,
    positions: Positions = SweepSpec.positions,
    heads: Sets | Literal["all"] | None = SweepSpec.heads,
    neurons: Sets | Literal["all"] | None = SweepSpec.neurons,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    method: MethodLike | Sequence[MethodLike] = SweepSpec.method,
    precision: Precision = SweepSpec.precision,
    compute_dtype: ComputeDtype = SweepSpec.compute_dtype,
    tolerance: float | str | None = SweepSpec.tolerance,
    per_token: bool = SweepSpec.per_token,
    store: str | Path | None = None,
    storage_options: Mapping[str, Any] | None = None,
    slice_index: int = 0,
    n_slices: int = 1,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    cache_budget: int | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress | bool | None = None,
) -> xr.Dataset:
    """Run every patch of `sites` on `pairs` exactly and return an `xarray.Dataset`.

    The variable of a site holds the raw patched metric, dims `metric, pair, layer, pos` and, if
    the site has heads, `head` (`kv_head` for k and v). `base_metric` and `source_metric`
    `[metric, pair]` hold the unpatched runs.

    Args:
        model: a model from `load_model`, or any TransformerBridge of a causal model.
        sites: names of `patchsweep.spec.sites.SITES`; or a `SweepSpec`, which holds this and all
            arguments down to `per_token`.
        direction: `denoising` patches clean values into the corrupted run, `noising` corrupted
            values into the clean run. Default: denoising for resample, noising for zero and mean.
        intervention: `resample`, `zero`, `mean`, `shuffle`, a constant (a number, `[width]` or
            `[pos, width]`), or a callable `(site, layer, base, source) -> values` of one pair, all
            three `[1, pos, width]`. A mapping of names to interventions runs all of them and adds
            the dim `intervention` after `pair`; they share the captured runs.
        layers, heads, neurons: indices, or tuples of indices that are patched together; negative
            layers count from the end. Default: each separately. `heads="all"`: all heads together,
            no head dim.
        positions: indices and labels of the pairs (a label's whole span is one patch). Negative
            ones count from the end of each prompt, and `"end"` is its last token. `"labels"`: all
            labels that every pair has, and the end. `"all"`: one patch over all positions, which
            drops the pos dim. Default: each position; for prompts of unequal lengths counted from
            the end, -longest..-1, so that means over pairs are over like positions.
        read: prompt position whose logits the metrics read; default the last.
        means_from: pairs, or a JSONL file of them, whose clean prompts give the means for
            `intervention` mean, mean_all or mean_label. Default: `pairs`. Each mean needs four
            prompts of the pair's length (mean_all: positions; mean_label: positions of the label).
        method: `exact`, or attribution: `atp`, `atp_star`, `ig`, `relp` and the others of
            `patchsweep.attribution.METHODS`; several at once share a Dataset. The variable
            `<site>_<method>` then holds the estimate of metric(patched) - metric(base).
            `screen` (or a `Screen`) estimates all patches and runs the top k exactly.
        store: folder or URL of a Zarr store; results stream there, and a second call with the
            same arguments resumes the run. Many processes may do so at once.
        storage_options: options for the storage library (endpoint, retries); no credentials.
        slice_index, n_slices: run every `n_slices`-th work item from `slice_index` on; all slices
            together write what one process would.
        runner: `auto` uses packed batches if they pass the self-test (see
            `patchsweep.runners.select`), else hooks; `packed` and `hooked` force a runner.
        max_tokens: most tokens in one packed batch. Default: the value that the store records, or
            one that suits the device of the weights, see `patchsweep.runners.packed.budget`.
        cache_budget: bytes of activations kept in memory; the rest spills to files.
            Default: a fraction of the free memory.
        precision: `model` multiplies in `compute_dtype`; `bf16` multiplies in bf16 and runs the
            largest effects and a sample again, see `patchsweep.sweeps.bf16`.
        compute_dtype: `float32` computes in fp32 and casts each block's 16-bit weights while it
            runs; `model` computes in the weights' dtype, whose rounding hides effects below the
            variable `<site>_noise`. Default `auto`: float32 for weights of 16 bits, which takes 2
            to 4 times as long where 16-bit products are fast.
        tolerance: the largest error that values may have, in units of the metric, or as a share of
            |source - base| such as "1%". What a patch changes is run, the rest is taken to first
            order, with thresholds from a sample that is run both ways (see
            `patchsweep.sweeps.adaptive`). Default: every patch runs exactly.
        per_token: the metrics also at each token of the answers by itself, after the tokens of the
            right answer before it: `logit_diff`, then `logit_diff@0`, `logit_diff@1`, ...
        progress: where progress is reported, a `patchsweep.sweeps.executor.Progress`. Default: a
            bar in a notebook or a terminal; False: none.

    Raises:
        PatchsweepError: an argument breaks a rule; nothing has run then.
    """
    several = isinstance(intervention, Mapping)
    spec = as_spec(
        sites,
        metrics=metrics,
        direction=direction,
        intervention=SweepSpec.intervention if several else intervention,
        layers=layers,
        positions=positions,
        heads=heads,
        neurons=neurons,
        read=read,
        means_from=means_from,
        method=method,
        precision=precision,
        compute_dtype=compute_dtype,
        tolerance=tolerance,
        per_token=per_token,
    )
    if several:
        requests = requests_of(model, pairs, intervention, spec)
    else:
        requests = {"": make_request(model, pairs, spec, aligned=True)}
    request = next(iter(requests.values()))
    work_slice = Slice(slice_index, n_slices)
    method_spec = _check_settings(request, store, n_slices, runner, max_tokens, cache_budget)
    check_config(config)
    recheck = spec.precision == "bf16"
    into = partial(
        run_into,
        store,
        progress=check_progress(progress),
        work_slice=work_slice,
        storage_options=storage_options,
        config=config,
    )
    if store is None and n_slices > 1:
        raise ConfigError(f"n_slices={n_slices} needs a store, where the slices meet; give one")
    attrs = recorded = None
    if store is not None:
        for each in requests.values():
            refuse_unversioned(request_settings(each) | method_spec.settings())
        attrs = recorded_attributes(store, storage_options)
        recorded = _recorded_choice(attrs, runner, max_tokens)
        read_weights(model)
    if several:
        most = max_tokens if recorded is None else recorded.runner.max_tokens  # type: ignore[attr-defined]
        prepare = partial(prepare_runner, max_tokens=most, cache_budget=cache_budget)
        chosen = choose_runner(requests, runner, prepare)
        work = InterventionsWork(requests, chosen.runner)
        return into(interventions_layout(requests, chosen, config or {}), lambda _: [work])
    own = model.cfg.dtype
    if request.compute_dtype != own:
        log.info(
            "computing in %s; compute_dtype=model multiplies in %s, faster, with its rounding",
            sentence(name_of(own), name_of(request.compute_dtype)),
            name_of(own),
        )

    more, methods = method_spec.variables(request), method_spec.settings()
    if recheck:
        more += recheck_variables(request)
    if spec.tolerance is not None:
        more += adaptive_variables(request)
        methods["exact"] = {"tolerance": spec.tolerance}

    def layout_of(choice: RunnerChoice, thresholds: Calibration | None = None) -> Layout:
        attrs = method_spec.attrs(request)
        if thresholds is not None:
            attrs |= {ADAPTIVE: thresholds.attributes(request)}
        return make_layout(
            request,
            choice,
            config or {},
            exact=method_spec.exact,
            more=more,
            attrs=attrs,
            methods=methods,
            precision=spec.precision,
        )

    if store is not None:  # refuse an unusable store before anything runs
        if recorded is None:
            check_space(store, layout_of(NO_RUNNER), storage_options)
        else:
            layout = layout_of(recorded)
            Store.create_or_resume(store, layout, storage_options=storage_options).close()
        request = keep_means(request, store, storage_options)
    choice = NO_RUNNER
    if method_spec.exact:
        choice = prepare_runner(request, runner, max_tokens, cache_budget, recorded)
    adaptive = None if spec.tolerance is None else Adaptive(request, choice)
    # another process may have created the store meanwhile, with packed batches of another size
    if store is not None and recorded is None:
        attrs = recorded_attributes(store, storage_options)
        recorded = _recorded_choice(attrs, runner, max_tokens)
    if recorded is not None and isinstance(choice.runner, PackedRunner):
        choice.runner.max_tokens = recorded.runner.max_tokens  # type: ignore[attr-defined]
    thresholds = None
    if adaptive is not None:
        first = (attrs or {}).get(ADAPTIVE)
        thresholds = Calibration.of_attributes(first, request) if first else adaptive.calibrate()

    def works(attrs: Mapping[str, Any]) -> list[Work]:
        # another process may have been faster: all use the thresholds of the first
        if adaptive is not None:
            thresholds = Calibration.of_attributes(attrs.get(ADAPTIVE, {}), request)
            return [AdaptiveWork(adaptive, thresholds)]
        return _works(request, method_spec, choice, recheck)

    return into(layout_of(choice, thresholds), works, self_test_error=choice.difference)


def _works(
    request: Request,
    method_spec: MethodSpec,
    choice: RunnerChoice,
    proven: bool,
) -> list[Work]:
    """Return the `Work`s that fill the run's variables; only one of them gives references."""
    if method_spec.screen is not None:
        return [ScreenWork(request, choice, method_spec.screen)]
    works: list[Work] = []
    if proven:
        works.append(RecheckedWork(request, choice))
    elif method_spec.exact:
        works.append(ExactWork(request, choice.runner))
    if method_spec.methods:
        works.append(
            Estimator(request, method_spec.methods, tells_references=not method_spec.exact)
        )
    return works


@dataclass(frozen=True)
class _Recorded:
    """Placeholder for a runner: the name and batch size that a store records."""

    name: str
    max_tokens: int | None = None


NO_RUNNER = RunnerChoice(_Recorded("none"), "no patch was run exactly", None)  # type: ignore[arg-type]


def _recorded_choice(
    attrs: Mapping[str, Any] | None, runner: RunnerName, max_tokens: int | None
) -> RunnerChoice | None:
    """Return the runner that a store records, with the arguments' overrides; None: no store."""
    if attrs is None:
        return None
    provenance, identity = attrs.get("provenance"), attrs.get(IDENTITY)
    origin = provenance if isinstance(provenance, Mapping) else {}
    name = str(origin.get("runner"))
    n_tokens = identity.get("max_tokens") if isinstance(identity, Mapping) else None
    if not isinstance(n_tokens, int) or n_tokens < 1:
        n_tokens = None
    if runner != "auto" and name != "none":
        name = runner
    if name == "packed" and max_tokens is not None:
        n_tokens = max_tokens
    recorded = _Recorded(name, n_tokens)
    return RunnerChoice(recorded, str(origin.get("runner_reason")), None)  # type: ignore[arg-type]


def plan(
    model: TransformerBridge,
    pairs: PromptPairs,
    sites: SweepSpec | str | Sequence[str] = SweepSpec.sites,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    sample: bool = False,
    **settings: Any,
) -> Cost:
    """Return the cost of `sweep` with these arguments; checks them all and runs no model.

    `settings` are keyword arguments of `sweep`. A store is neither created nor read, and slices
    need none. `sample=True` does run a few patches, with the tolerance and exactly, and the cost
    holds the `saving` that they suggest (see `patchsweep.sweeps.saving`).

    Raises:
        PatchsweepError: an argument breaks a rule.
        TypeError: `sweep` has no such argument.
    """
    bound = inspect.signature(sweep).bind(model, pairs, sites, metrics, **settings)
    bound.apply_defaults()
    arguments = bound.arguments
    spec = as_spec(sites, **{name: arguments[name] for name in SPEC_FIELDS if name != "sites"})
    request = make_request(model, pairs, spec, aligned=True)
    work_slice = Slice(arguments["slice_index"], arguments["n_slices"])
    names = ("store", "n_slices", "runner", "max_tokens", "cache_budget")
    method_spec = _check_settings(request, *(arguments[name] for name in names))
    if sample:
        check_sample(request)
    cost = estimate(
        request,
        arguments["max_tokens"],
        arguments["cache_budget"],
        method_spec=method_spec,
        runner=arguments["runner"],
        proven=spec.precision == "bf16",
        n_slices=work_slice.n,
    )
    if not sample:
        return cost
    with running(model):
        choice = prepare_runner(request, *(arguments[name] for name in names[2:]))
        return replace(cost, saving=estimate_saving(request, choice))


def _check_settings(
    request: Request,
    store: str | Path | None,
    n_slices: int,
    runner: RunnerName,
    max_tokens: int | None,
    cache_budget: float | None,
) -> MethodSpec:
    """Parse the spec's method; raise for settings that are invalid, alone or together."""
    check_runner(runner, max_tokens, cache_budget)
    precision = request.spec.precision
    if store is not None:
        check_store_path(store)
    method_spec = parse_methods(request.spec.method)
    if method_spec.methods:
        check_request(request, method_spec.methods)
    if method_spec.screen is not None:
        method_spec.screen.check(request, n_slices)
    if precision == "bf16" and (not method_spec.exact or method_spec.screen is not None):
        raise ConfigError("precision=bf16 is for method=exact; use precision=model")
    if precision == "bf16" and runner == "hooked":
        raise ConfigError(
            "precision=bf16 is done by the packed runner alone; use runner=auto, or precision=model"
        )
    if precision == "bf16":
        check_proof(request)
    if request.spec.tolerance is not None:
        others = {
            f"method={request.spec.method!r}": method_spec != EXACT,
            "precision=bf16": precision == "bf16",
            "runner=hooked": runner == "hooked",
        }
        check_adaptive(request, others)
    return method_spec


def prepare_runner(
    request: Request,
    wanted: RunnerName,
    max_tokens: int | None,
    cache_budget: int | None = None,
    begun_with: RunnerChoice | None = None,
) -> RunnerChoice:
    """Select the runner for `request` and prepare the intervention.

    `begun_with` is the recorded choice of a store of the same run, which needs no self-test again.
    """
    tested = wanted == "auto" and begun_with is not None and begun_with.runner.name != "none"
    if tested:
        assert begun_with is not None
        wanted = "hooked" if begun_with.runner.name == "hooked" else "packed"
    choice = select_runner(
        request.bridge,
        request.plans,
        request.intervention,
        wanted=wanted,
        tested=tested,
        max_tokens=max_tokens,
        cache_budget=cache_budget,
        compute_dtype=request.compute_dtype,
    )
    if tested:
        assert begun_with is not None
        choice = replace(choice, reason=begun_with.reason)
    # read means at the places that the runner patches: runners may differ in a site's place
    batches = request.batches(range(len(request.pairs)))
    reader = Reader(choice.runner.name, request.sites, choice.runner.activations)
    request.intervention.prepare(clean_prompts(batches, request.direction), reader)
    return choice
