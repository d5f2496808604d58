"""`latents`: the effect of every latent of some dictionaries, exact and estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.joint.patches import BESIDE, EXACT_COST, adaptive_attributes, settings_of
from patchsweep.analyses.latents.changes import (
    Changes,
    LatentReader,
    find_changes,
    latent_site,
    unkeyed,
)
from patchsweep.analyses.latents.estimates import LatentAttribution, check_methods
from patchsweep.analyses.latents.exact import LatentPatches
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.analyses.thresholds import choose_thresholds, tolerance_words
from patchsweep.arguments import check_runner, whole_number
from patchsweep.attribution import Method, get_methods
from patchsweep.attribution.run import MAX_TOKENS
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import token_table
from patchsweep.errors import ConfigError
from patchsweep.models.compute import ComputeDtype
from patchsweep.models.offload import device_of
from patchsweep.models.running import runs_model
from patchsweep.results.tolerance import TOKEN_LAYERS
from patchsweep.runners.select import RunnerName
from patchsweep.spec.batch import Batch, base_and_source, clean_prompts
from patchsweep.spec.dictionary import Dictionary, check_dictionaries
from patchsweep.spec.directions import Live, Scale
from patchsweep.spec.interventions import (
    Custom,
    Direction,
    Intervention,
    Mean,
    Reader,
    check_constant,
    check_labels,
    get_intervention,
    shuffles,
)
from patchsweep.spec.plan import Ints
from patchsweep.spec.reference import MeansFrom, check_means, with_reference
from patchsweep.spec.spec import MetricLike, SweepSpec, check_pairs, model_shape
from patchsweep.store.difference import ADAPTIVE
from patchsweep.sweeps.calibration import SampleSummary
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.identity import intervention_words, method_identity
from patchsweep.sweeps.joint import JointRequest, joint_request
from patchsweep.sweeps.joint_adaptive import AdaptivePatches, check_joint_tolerance
from patchsweep.sweeps.layout import metric_and_pair_coords, strings
from patchsweep.sweeps.patches import Patch

KIND = "latents"
# cells of estimates [metric, pair, layer, pos, latent] that one pass may hold
_CELLS = 2**26


@runs_model
def latents(
    model: TransformerBridge,
    pairs: PromptPairs,
    dictionaries: Dictionary | Sequence[Dictionary],
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    *,
    estimates: str | Sequence[str | Method] = ("atp",),
    top: int | None = None,
    tolerance: float | str | None = SweepSpec.tolerance,
    direction: Direction | None = SweepSpec.direction,
    intervention: str | Intervention | float | Tensor = "resample",
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
    compute_dtype: ComputeDtype = SweepSpec.compute_dtype,
    runner: RunnerName = "auto",
    max_tokens: int | None = None,
    cache_budget: int | None = None,
    config: Mapping[str, Any] | None = None,
    stages: Stages | None = None,
) -> xr.Dataset:
    """Patch every latent of dictionaries at every position, one at a time: exact, and estimated.

    A patch gives one latent the activation that it has in the source run (or that of
    `intervention`) and adds the change times its decoder row to what the dictionary writes. All
    other latents, and what the dictionary does not explain, stay as in the base run: the patched
    activation is base + (patched - base activation of the latent) · decoder row. A transcoder
    reads the MLP's input, say, and writes at the MLP's output.

    `patched` [metric, pair, pos, latent] is the raw metric, NaN beyond a pair's length; the effect
    is `patched - base_metric`. `atp` and others of the same shape are estimates of the effect.
    `change` [pair, pos, latent] is by how much the patch changes the latent's activation. Where it
    is 0 (the latent is silent in both runs, say) the patch is proven to do nothing and did not
    run. Only latents that change somewhere have a place on `latent`, named such as
    resid_post.12/345, with the coordinates `dictionary`, `latent_layer`, `latent_number`.

    Args:
        dictionaries: read by `Dictionary.from_safetensors`; several run in the same batches.
        estimates: attribution methods: atp, relp, relp_ah, gim, ig. All latents from one backward
            pass (ig: several), see `patchsweep.analyses.latents.estimates`.
        top: run exactly only the `top` places (pos, latent) with the largest mean |estimate| of
            the first method over the pairs, for the first metric; the others are NaN in `patched`.
            0: estimates alone. Default: all.
        tolerance: the largest error of a value, in units of the metric or such as "1%": what a
            patch hardly changes is not run but taken from the base run's gradient, as in `sweep`.
            Each dictionary has its own thresholds, from a sample of its latents. Adds
            `patched_linear` and `patched_token_layers`. Default: every patch runs exactly.
        intervention: what a latent's activation becomes: "resample" (the source run's), "zero",
            a mean, "shuffle", a number, or `Scale`.
        stages: where the stages "estimates" and "exact" run, see `patchsweep.analyses.stages`.

    Others are those of `sweep`. Dictionaries with many latents at one place: Bricken et al.,
    Towards Monosemanticity (2023); patches with the error term: Marks et al., arXiv 2403.19647.

    Raises:
        ConfigError: a dictionary has another width, layer or place than the model.
        PatchsweepError: another argument breaks a rule; nothing has run then.
    """
    check_runner(runner, max_tokens, cache_budget)
    named = [estimates] if isinstance(estimates, str) else estimates
    methods = get_methods(named) if named else ()
    if top is not None:
        whole_number("top", top, least=0)
        if not methods:
            raise ConfigError(f"top={top} ranks latents by estimates; name one, such as ['atp']")
    shape = model_shape(model)
    check_pairs(model, pairs)
    known = check_dictionaries(dictionaries, shape, model.hook_dict)
    chosen = _intervention(model, pairs, known, intervention, means_from)
    source = "shuffle" if shuffles(chosen) else "resample"
    sets = [Patch(x.site, x.layer, intervention=source) for x in known]
    direction = direction or chosen.default_direction
    request = joint_request(model, pairs, sets, metrics, direction, read, None, compute_dtype)
    check_methods(request, methods)
    check_joint_tolerance(request, tolerance, runner)
    stages = Stages.of(stages)

    def compute() -> xr.Dataset:
        run = _Run(request, [x.on(device_of(model)) for x in known], chosen)
        estimated = [run.estimated(method, stages) for method in methods]
        stages.wait()
        places = None if top is None else run.places(estimated[0][methods[0].name].values, top)
        patches = (
            None
            if top == 0
            else LatentPatches(
                request, run.dictionaries, runner, max_tokens, cache_budget, tolerance
            )
        )
        exact = run.exact(patches, places, stages)
        stages.wait()
        return run.dataset(exact, dict(zip((m.name for m in methods), estimated, strict=True)))

    settings = {
        **settings_of(request),
        "interventions": intervention_words(chosen),
        "dictionaries": list(known),
        "estimates": [{"name": m.name, **method_identity(m)} for m in methods],
        "top": top,
        **tolerance_words(tolerance),
    }
    return stages.analysis(KIND, model, pairs, settings, compute, config)


def _intervention(
    model: TransformerBridge,
    pairs: PromptPairs,
    dictionaries: Sequence[Dictionary],
    given: Any,
    means_from: MeansFrom,
) -> Intervention:
    """Return the intervention on latents, checked."""
    found = with_reference(get_intervention(given), means_from, model)
    if (isinstance(found, Live) and not isinstance(found, Scale)) or (
        isinstance(found, Custom) and callable(found.value)
    ):
        raise ConfigError(
            f"intervention={found.name} is none of latents; use resample, zero, mean, mean_all, "
            "mean_label, shuffle, a number, or Scale"
        )
    sites = [latent_site(one) for one in dictionaries]
    if isinstance(found, Mean) and found.reference is None:
        check_labels(found, [pair.labels for pair in pairs])
    check_means(found, pairs, sites)
    for site, one in zip(sites, dictionaries, strict=True):
        check_constant(found, site, [(len(pair), one.n_latents) for pair in pairs])
    return found


class _Run:
    """The changes of one call's latents, and what its stages compute of them."""

    def __init__(
        self, request: JointRequest, dictionaries: Sequence[Dictionary], intervention: Intervention
    ) -> None:
        self.request, self.dictionaries = request, tuple(dictionaries)
        self.intervention = intervention
        reader = LatentReader(request.bridge, dictionaries, request.compute_dtype)
        every = request.batches(range(len(request.pairs)))
        sites = tuple(latent_site(one) for one in dictionaries)
        intervention.prepare(
            clean_prompts(every, request.direction), Reader(KIND, sites, reader.activations)
        )
        self.changes = find_changes(request, reader, intervention)
        self.keys = np.unique(self.changes.key)  # [latent] those that change somewhere
        if not len(self.keys):
            names = ", ".join(one.name for one in dictionaries)
            raise ConfigError(
                f"no latent of {names} changes its activation in any pair; check that the "
                "dictionary belongs to this model and layer, or use another intervention"
            )
        self.n_pos = request.pairs.longest
        self.dims = {
            "metric": len(request.metrics),
            "pair": len(request.pairs),
            "pos": self.n_pos,
            "latent": len(self.keys),
        }

    def estimated(self, method: Method, stages: Stages) -> xr.Dataset:
        """Run the stage of one method's estimates."""
        request = self.request
        run = LatentAttribution(request, self.dictionaries, self.intervention, method).run
        cells = request.shape.n_layers * int(np.prod([*self.dims.values()])) // self.dims["pair"]

        def block(pairs: range) -> Computed:
            return self._block([method.name], pairs, run, 0.0)

        return stages.run(
            "estimates",
            {method.name: self.dims},
            max(1, min(MAX_TOKENS // self.n_pos, _CELLS // cells)),
            block,
            metrics=[metric.name for metric in request.metrics],
            attrs={"method": method.name},
        )

    def places(self, estimates: Values, top: int) -> np.ndarray:
        """Return `[pos, latent]`: the `top` places with the largest mean |estimate|."""
        size = np.nan_to_num(np.abs(estimates[0])).sum(axis=0)
        best = np.argsort(-size, axis=None, kind="stable")[:top]
        chosen = np.zeros(size.size, bool)
        chosen[best] = True
        return chosen.reshape(size.shape) & (size > 0)

    def exact(
        self, patches: LatentPatches | None, places: np.ndarray | None, stages: Stages
    ) -> xr.Dataset | None:
        """Run the stage of exact values, of `places` alone if they are given; None: nothing."""
        if patches is None:
            return None
        joint, names = patches.joint, ["patched"]
        if isinstance(joint, AdaptivePatches):
            names += BESIDE

            def calibrate() -> Mapping[str, SampleSummary]:
                return patches.calibrate(lambda batch: self._of(batch, places))

            n_metrics = len(self.request.metrics)
            joint.summaries = choose_thresholds(joint.sites, n_metrics, stages, calibrate)

        def block(pairs: range) -> Computed:
            return self._block(names, pairs, patches.run, None, places)

        ds = stages.run(
            "exact",
            dict.fromkeys(names, self.dims),
            1 if self.dims["pair"] == 1 else max(1, MAX_TOKENS // self.n_pos),
            block,
            metrics=[metric.name for metric in self.request.metrics],
        )
        stages.wait()
        ds = ds.assign_attrs(runner=joint.choice.runner.name)
        return self._told(ds, joint) if isinstance(joint, AdaptivePatches) else ds

    def _told(self, ds: xr.Dataset, joint: AdaptivePatches) -> xr.Dataset:
        """Return exact values with what they say of their tolerance."""
        ran, exact = (ds["patched" + ending].values for ending in (TOKEN_LAYERS, EXACT_COST))
        owner, _ = unkeyed(self.keys)
        numbers = range(len(joint.sites))
        columns = [slice(*np.searchsorted(owner, (i, i + 1)).tolist()) for i in numbers]
        n_live = np.bincount(self.changes.dictionary, minlength=len(joint.sites)).tolist()
        told = adaptive_attributes(
            joint,
            dict(zip(joint.sites, n_live, strict=True)),
            {name: ran[..., at] for name, at in zip(joint.sites, columns, strict=True)},
            {name: exact[..., at] for name, at in zip(joint.sites, columns, strict=True)},
        )
        return ds.drop_vars("patched" + EXACT_COST).assign_attrs({ADAPTIVE: told})

    def _block(
        self,
        names: Sequence[str],
        pairs: range,
        run: Any,
        dead: float | None,
        places: np.ndarray | None = None,
    ) -> Computed:
        """Return the values of a block of pairs: of the variables `names`, one after the other.

        Dead patches have `dead` (None: the base metric) in the first, and 0 in others.
        """
        request = self.request
        values = np.concatenate([*empty(dict.fromkeys(names, self.dims), pairs).values()])
        references = np.empty((2, self.dims["metric"], len(pairs)), np.float32)
        for batch in request.batches(pairs):
            rows = [pair - pairs.start for pair in batch.pairs]
            changes = self._of(batch, places)
            found, of_batch = run(batch, changes)
            references[:, :, rows] = of_batch
            base = of_batch[0][:, :, None, None] if dead is None else dead
            values[:, rows, : batch.length] = 0.0
            values[: self.dims["metric"], rows, : batch.length] = base
            if places is not None:  # live, and not chosen
                values[:, *self._cells(self._of(batch, None), pairs)] = np.nan
            values[:, *self._cells(changes, pairs)] = found
        return dict(zip(names, np.split(values, len(names)), strict=True)), references

    def _of(self, batch: Batch, places: np.ndarray | None) -> Changes:
        """Return the changes on the pairs of a batch, at `places` alone if they are given."""
        part = self.changes.at(np.isin(self.changes.pair, batch.pairs))
        return part if places is None else part.at(places[self._cells(part, range(1))[1:]])

    def _cells(self, changes: Changes, pairs: range) -> tuple[Ints, Ints, Ints]:
        """Return the indices of changes on the axes pair, pos and latent of a block of pairs."""
        column: Ints = np.searchsorted(self.keys, changes.key)
        return changes.pair - pairs.start, changes.pos, column

    def dataset(self, exact: xr.Dataset | None, estimates: Mapping[str, xr.Dataset]) -> xr.Dataset:
        """Return all results as one Dataset."""
        request, dims = self.request, tuple(self.dims)
        of_exact = {} if exact is None else exact.attrs
        told = {key: of_exact[key] for key in ("runner", ADAPTIVE) if key in of_exact}
        first = exact if exact is not None else next(iter(estimates.values()))
        nothing = np.full([*self.dims.values()], np.nan, np.float32)
        change = np.full([*self.dims.values()][1:], np.nan, np.float32)
        for i, pair in enumerate(request.pairs):
            change[i, : len(pair) + len(pair.answer) - 1] = 0
        change[self._cells(self.changes, range(1))] = self.changes.change
        owner, number = unkeyed(self.keys)
        names = [one.name for one in self.dictionaries]
        runs = [base_and_source(pair, request.direction)[0] for pair in request.pairs]
        return xr.Dataset(
            {
                "patched": (dims, nothing if exact is None else exact["patched"].values),
                **{
                    name: (dims, exact[name].values, {"role": name.removeprefix("patched_")})
                    for name in BESIDE
                    if exact is not None and name in exact
                },
                **{
                    name: (dims, ds[name].values, {"role": "estimate"})
                    for name, ds in estimates.items()
                },
                "change": (dims[1:], change),
                "base_metric": (dims[:2], first["base_metric"].values),
                "source_metric": (dims[:2], first["source_metric"].values),
            },
            coords={
                **metric_and_pair_coords(request.metrics, request.pairs),
                "pos": np.arange(self.n_pos),
                "base_token": (("pair", "pos"), token_table(request.bridge, runs)),
                "latent": strings([f"{names[i]}/{j}" for i, j in zip(owner, number, strict=True)]),
                "dictionary": ("latent", strings([names[i] for i in owner])),
                "latent_layer": ("latent", np.array([x.layer for x in self.dictionaries])[owner]),
                "latent_number": ("latent", number),
            },
            attrs={
                "direction": request.direction,
                "intervention": self.intervention.name,
                "read": request.read,
                "n_patches": int(
                    sum(x.n_latents for x in self.dictionaries) * np.isfinite(change[:, :, 0]).sum()
                ),
                "n_live": len(self.changes),
                **told,
            },
        )
