"""Defines `SweepSpec`, the arguments of a sweep, and `Request`, a spec checked against a model.

A `SweepSpec` holds everything that decides a sweep's numbers, except the model and the prompts.
Its defaults are the only ones: `sweep`, the command line and the analyses take theirs from it.
Nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import (
    check_bridge,
    check_tolerance,
    index_sets,
    one_of,
    true_or_false,
    whole_number,
)
from patchsweep.arguments import position_axis as given_positions
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import context_size
from patchsweep.errors import ConfigError, ModelError, PlanError, PromptError
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.compute import ComputeDtype, check_compute_dtype, compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.quantised import check_each_row, first_packed, n_parameters
from patchsweep.spec.batch import Batch, make_batches, pair_shape, sources_of
from patchsweep.spec.directions import check_directions
from patchsweep.spec.interventions import (
    Direction,
    Intervention,
    Mean,
    ValueFn,
    check_constant,
    check_labels,
    get_intervention,
    sees_source,
    shuffles,
)
from patchsweep.spec.metrics import Metric, MetricLike, check_rows, get_metrics, metrics_at
from patchsweep.spec.plan import Axes, ModelShape, PairShape, SitePlan
from patchsweep.spec.planner import plan_site, position_axis
from patchsweep.spec.reference import MeansFrom, check_means, with_reference
from patchsweep.spec.sites import Site, get_sites

Sets = int | Sequence[int | Sequence[int]]
Positions = int | Sequence[int | str] | Literal["all", "labels", "end"] | None
Precision = Literal["model", "bf16"]


@dataclass(frozen=True)
class SweepSpec:
    """The arguments of a sweep apart from the model and the prompts; checked when it is made.

    `sweep`, `plan` and `sample_exact` take a spec in the place of `sites`, or its fields one by
    one. The docstring of `sweep` explains each field.

        spec = SweepSpec("z", "logit_diff", layers=[9, 10], intervention="zero")
        plan(model, pairs, spec)
        sweep(model, pairs, spec, store="runs/z.zarr")

    Raises:
        PatchsweepError: a field breaks a rule that holds for every model.
    """

    sites: str | Sequence[str] = ("resid_pre",)
    metrics: MetricLike | Sequence[MetricLike] = "logit_diff"
    _: KW_ONLY
    direction: Direction | None = None  # None: denoising for resample, noising for the others
    intervention: str | Intervention | float | Tensor | ValueFn = "resample"
    layers: Sets | None = None
    positions: Positions = None
    heads: Sets | Literal["all"] | None = None
    neurons: Sets | Literal["all"] | None = None
    read: int = -1
    means_from: MeansFrom = None
    method: Any = "exact"  # names, methods or a Screen, see `sweeps.methods`
    precision: Precision = "model"
    compute_dtype: ComputeDtype = "auto"
    tolerance: float | str | None = None  # in units of the metric, or such as "1%"; None: exact
    per_token: bool = False  # the metrics also at each token of the answers by itself

    def __post_init__(self) -> None:
        get_sites(self.sites)
        get_metrics(self.metrics)
        get_intervention(self.intervention)
        if self.layers is not None:
            index_sets("layers", self.layers)
        for name in ("heads", "neurons"):
            if not isinstance(given := getattr(self, name), str | None):
                index_sets(name, given)
        if not isinstance(self.positions, str | None):
            given_positions(self.positions)
        check_compute_dtype(self.compute_dtype)
        whole_number("read", self.read)
        check_direction(self.direction)
        one_of("precision", self.precision, get_args(Precision))
        check_tolerance(self.tolerance)
        true_or_false("per_token", self.per_token)


SPEC_FIELDS = tuple(f.name for f in fields(SweepSpec))


def as_spec(sites: SweepSpec | str | Sequence[str], **others: Any) -> SweepSpec:
    """Return `sites` if it is a spec; otherwise make a spec of `sites` and the fields `others`.

    Raises:
        ConfigError: `sites` is a spec and `others` sets a field too.
        PatchsweepError: a field breaks a rule.
    """
    if not isinstance(sites, SweepSpec):
        return SweepSpec(sites, **others)
    default = SweepSpec()
    for name, value in others.items():
        if value is not getattr(default, name):
            raise ConfigError(
                f"{name}={value!r} stands beside a SweepSpec, which says its {name} itself; use "
                f"dataclasses.replace(spec, {name}=...)"
            )
    return sites


def check_direction(direction: Direction | None) -> None:
    """Raise ConfigError unless `direction` is denoising, noising or None."""
    if direction is not None and direction not in get_args(Direction):
        raise ConfigError(
            f"direction={direction!r} is not known; use 'denoising' (base is the corrupted "
            "prompt) or 'noising' (base is the clean prompt)"
        )


@dataclass(frozen=True)
class Experiment:
    """A model, its prompt pairs, the metrics, and the intervention that makes the patch values."""

    bridge: TransformerBridge
    pairs: PromptPairs
    metrics: tuple[Metric, ...]
    intervention: Intervention
    direction: Direction
    read: int  # prompt position whose logits are read first; -1 is the last


def make_experiment(
    model: TransformerBridge,
    pairs: PromptPairs,
    spec: SweepSpec,
    sites: Sequence[Site],
    *,
    aligned: bool = False,
) -> Experiment:
    """Check `spec` against a model and its pairs, and resolve metrics, intervention and direction.

    `sites` are the sites whose means the intervention may take. `aligned`: see `check_pairs`.

    Raises:
        PatchsweepError: an argument breaks a rule; the text says which, and what to do.
    """
    model_shape(model)
    check_pairs(model, pairs, aligned=aligned)
    metrics = metrics_at([len(pair.answer) for pair in pairs], spec.metrics, spec.per_token)
    intervention = with_reference(get_intervention(spec.intervention), spec.means_from, model)
    if any(pair.aligned for pair in pairs):
        check_aligned(sites, intervention)
    if spec.means_from is None:
        check_labels(intervention, [pair.labels for pair in pairs])
    check_means(intervention, pairs, sites)
    check_metrics(model, pairs, metrics)
    direction = intervention.default_direction if spec.direction is None else spec.direction
    for pair in pairs:
        pair_shape(pair, direction, spec.read)
    return Experiment(model, pairs, metrics, intervention, direction, spec.read)


@dataclass(frozen=True)
class Request(Experiment):
    """A spec checked against one model and its prompts, with a plan for each site."""

    spec: SweepSpec
    shape: ModelShape
    plans: tuple[SitePlan, ...]
    compute_dtype: torch.dtype  # of activations and matrix products
    noisy: bool  # rounding may look like effects: 16-bit compute, or quantised weights
    source_of: Mapping[int, int] | None = None  # pair -> pair that its source is from; None: itself

    def batches(self, numbers: Sequence[int]) -> list[Batch]:
        """Return the pairs `numbers` as batches, one per length."""
        return make_batches(
            self.pairs,
            numbers,
            self.direction,
            self.read,
            device_of(self.bridge),
            self.source_of,
        )

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(plan.site for plan in self.plans)


def make_request(
    model: TransformerBridge, pairs: PromptPairs, spec: SweepSpec, *, aligned: bool = False
) -> Request:
    """Check `spec` against a model and its pairs, and plan each site.

    `aligned`: see `check_pairs`.

    Raises:
        PatchsweepError: an argument breaks a rule; the text says which, and what to do.
    """
    sites = get_sites(spec.sites)
    experiment = make_experiment(model, pairs, spec, sites, aligned=aligned)
    shape = model_shape(model)
    check_each_row(model)
    dtype = compute_dtype_of(model, spec.compute_dtype)
    pair_shapes = [pair_shape(pair, experiment.direction, spec.read) for pair in pairs]
    if not sees_source(experiment.intervention):
        pair_shapes = [replace(pair, alone=()) for pair in pair_shapes]
    lengths = {pair.length for pair in pair_shapes}
    for site in sites:
        shapes = [found for length in lengths if (found := shape.values(site, length))]
        check_constant(experiment.intervention, site, shapes)
        sets = _sets("layers", spec.layers, shape.n_layers) if site.layered else ((0,),)
        check_directions(experiment.intervention, site, shapes, shape.d_head, sets, sweep=True)
    _refuse_unused(spec, sites)
    resample = experiment.intervention.from_source
    plans = tuple(_plan(spec, site, shape, pair_shapes, resample=resample) for site in sites)
    return Request(
        **{f.name: getattr(experiment, f.name) for f in fields(Experiment)},
        spec=spec,
        shape=shape,
        plans=plans,
        compute_dtype=dtype,
        noisy=dtype in SIXTEEN_BITS or first_packed(model) is not None,
        source_of=sources_of(pairs, [experiment.intervention]),
    )


def check_aligned(sites: Sequence[Site], intervention: Intervention) -> None:
    """Raise unless source values may be moved to other positions of the base prompt.

    Raises:
        PlanError: they hold positions themselves, or come from other prompts than the pair's own.
    """
    if isinstance(intervention, Mean) or shuffles(intervention):
        raise PlanError(
            f"intervention={intervention.name} takes values from other prompts of the same length, "
            "and a pair has prompts of unequal lengths; use resample or zero"
        )
    held = [site.name for site in sites if site.in_attention]
    if held and sees_source(intervention):
        raise PlanError(
            f"site {held[0]} holds the positions of its prompt, and a pair has prompts of unequal "
            "lengths, whose positions are shifted; use q, k, v or z"
        )


def _refuse_unused(spec: SweepSpec, sites: Sequence[Site]) -> None:
    """Raise PlanError for a selection along an axis that none of `sites` has."""
    taken = {
        "layers": any(site.layered for site in sites),
        "heads": any(site.unit in ("head", "kv_head") for site in sites),
        "neurons": any(site.unit == "neuron" for site in sites),
    }
    for name, any_site in taken.items():
        given = getattr(spec, name)
        if not isinstance(given, str | None) and not any_site:
            names = ", ".join(site.name for site in sites)
            raise PlanError(f"{name}={given!r}, and {names} has no {name}; leave {name} out")


def _plan(
    spec: SweepSpec,
    site: Site,
    shape: ModelShape,
    pair_shapes: Sequence[PairShape],
    *,
    resample: bool,
) -> SitePlan:
    """Return the plan of one site."""
    positions = position_axis(spec.positions, pair_shapes)
    units = _unit_sets(site, shape, spec.heads, spec.neurons)
    n_sources = 0
    if site.cells:
        if units is None or positions is None:
            raise PlanError(
                f"site {site.name} patches single cells (dest, src); use the site pattern for "
                "whole rows, heads='all' or positions='all'"
            )
        n_sources = max(p.length for p in pair_shapes)
        units = tuple(unit for unit in units for _ in range(n_sources))
    layers = _layer_sets(spec.layers, shape.n_layers) if site.layered else ((0,),)
    axes = Axes(layers, positions, units, n_sources)
    return plan_site(site, axes, shape, pair_shapes, resample=resample)


def check_pairs(model: TransformerBridge, pairs: PromptPairs, *, aligned: bool = False) -> None:
    """Raise unless `pairs` are prompt pairs that `model` can read.

    `aligned`: a pair's prompts may have unequal lengths, see `patchsweep.data.alignment`.

    Raises:
        PromptError: `pairs` is no PromptPairs; a pair is longer than the context, holds a token
            that the model does not know, or has prompts or answers of unequal length.
    """
    if not isinstance(pairs, PromptPairs):
        raise PromptError(
            f"pairs must be PromptPairs, got a {type(pairs).__name__}; make them with "
            "PromptPairs.from_strings, from_records or from_jsonl"
        )
    n_ctx, d_vocab = context_size(model), int(model.cfg.d_vocab)
    for number, pair in enumerate(pairs):
        # all tokens of an answer but the last are read
        length = max(len(pair.clean), len(pair.corrupted)) + len(pair.answer) - 1
        for side in ("clean", "corrupted"):
            n_ids, n_texts = (len(getattr(pair, side + ending)) for ending in ("", "_tokens"))
            if n_ids != n_texts:
                raise PromptError(
                    f"pair {number}: the {side} prompt has {n_ids} token ids and {n_texts} token "
                    "strings; make pairs with PromptPairs.from_strings, or give one string an id"
                )
        if pair.aligned and not aligned:
            raise PromptError(
                f"pair {number}: the prompts have {len(pair)} and {len(pair.corrupted)} tokens, "
                "and this analysis compares them token by token; use pairs of prompts of equal "
                "length (sweep, plan and run_patches take aligned ones)"
            )
        if len(pair.answer) != len(pair.wrong_answer) or not pair.answer:
            raise PromptError(
                f"pair {number}: the answers {pair.answer_text!r} and {pair.wrong_answer_text!r} "
                f"have {len(pair.answer)} and {len(pair.wrong_answer)} tokens; use answers of the "
                "same number of tokens"
            )
        if length > n_ctx:
            raise PromptError(
                f"pair {number}: prompt and answer have {length + 1} tokens, and this model reads "
                f"{n_ctx} and says one more; shorten the prompt"
            )
        top = max(*pair.clean, *pair.corrupted, *pair.answer, *pair.wrong_answer)
        if top >= d_vocab:
            raise PromptError(
                f"pair {number} has token {top}, and this model knows {d_vocab} tokens; make the "
                "pairs with the model that is swept"
            )


def check_metrics(model: TransformerBridge, pairs: PromptPairs, metrics: Sequence[Metric]) -> None:
    """Try user-defined metrics on random logits, see `metrics.check_rows`; runs no model.

    Raises:
        MetricError: a metric fails there, returns another shape, or mixes rows.
    """
    if len(set(getattr(model.original_model, "hf_device_map", {}).values())) > 1:
        return  # the device of the logits is known only when the model runs
    check_rows(metrics, len(pairs[0].answer), int(model.cfg.d_vocab), device_of(model))


def _sets(name: str, given: Sets | None, n: int) -> tuple[tuple[int, ...], ...]:
    """Return the sets in `given`; None: each of the `n` indices by itself."""
    return tuple((i,) for i in range(n)) if given is None else index_sets(name, given)


def _layer_sets(given: Sets | None, n: int) -> tuple[tuple[int, ...], ...]:
    """Return the sets of layers in `given`; negative layers count from the end."""
    counted = [
        tuple(i + n if -n <= i < 0 else i for i in layers) for layers in _sets("layers", given, n)
    ]
    return index_sets("layers", counted)  # -1 may name a layer that is there already


def _unit_sets(
    site: Site, shape: ModelShape, heads: Any, neurons: Any
) -> tuple[tuple[int, ...], ...] | None:
    """Return the unit axis of `site`: one set per entry; None: one patch over all units.

    Heads are patched one by one by default; neurons must be chosen.
    """
    if site.unit is None:
        return None
    name = "neurons" if site.unit == "neuron" else "heads"
    given = neurons if site.unit == "neuron" else heads
    if isinstance(given, str):
        if given != "all":
            raise PlanError(f"{name}={given!r} is not known; use 'all' or a list of indices")
        return None
    if site.unit == "neuron" and given is None:
        raise PlanError(
            f"site {site.name} has {shape.d_mlp} neurons a layer; choose some with neurons=[...], "
            "or neurons='all' for one patch over all of them"
        )
    return _sets(name, given, shape.n_units(site))


def model_shape(model: TransformerBridge) -> ModelShape:
    """Return the sizes of the model behind a bridge.

    Raises:
        ModelError: `model` is no bridge, or no causal language model.
    """
    check_bridge(model)
    cfg = model.cfg
    config = getattr(model.original_model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{cfg.model_name} is not a causal decoder; patch a causal language model")
    if not hasattr(model, "blocks"):
        raise ModelError(
            f"{cfg.model_name} has no single stack of blocks; patch a model that runs one, once"
        )
    if getattr(cfg, "attention_dir", "causal") == "bidirectional":
        raise ModelError(
            f"{cfg.model_name} attends in both directions; patch a causal language model"
        )
    block = model.blocks[0]
    return ModelShape(
        n_layers=int(cfg.n_layers),
        n_heads=int(cfg.n_heads),
        n_kv_heads=int(getattr(cfg, "n_key_value_heads", None) or cfg.n_heads),
        d_head=int(cfg.d_head),
        d_model=int(cfg.d_model),
        d_mlp=int(cfg.d_mlp or 0),
        d_vocab=int(cfg.d_vocab),
        block_parameters=n_parameters(block),
    )
