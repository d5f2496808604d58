"""The layout of a sweep's results: arrays, coordinates and provenance of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_config
from patchsweep.data.alignment import END, NONE, partners
from patchsweep.data.pairs import PromptPairs
from patchsweep.results.rounding import NOISE
from patchsweep.runners.select import RunnerChoice
from patchsweep.spec.batch import base_and_source, pair_shape
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.planner import span_of
from patchsweep.spec.reference import means_attrs
from patchsweep.spec.shards import blocks_of
from patchsweep.spec.spec import Request
from patchsweep.store.attributes import flat_attributes
from patchsweep.store.difference import IDENTITY, ORIGIN
from patchsweep.store.layout import Layout, Unit, Variable
from patchsweep.sweeps.identity import identity_of, request_settings


def make_layout(
    request: Request,
    choice: RunnerChoice,
    config: Mapping[str, Any],
    *,
    exact: bool = True,
    more: Sequence[Variable] = (),
    attrs: Mapping[str, Any] | None = None,
    methods: Mapping[str, Any] | None = None,
    precision: str = "model",
) -> Layout:
    """Return the run's arrays, coordinates and attributes; without times, so that reruns are equal.

    `more` and `attrs` are additional variables and attributes, such as those of attribution;
    `exact=False` omits the exact variables. `methods` maps the run's methods to their settings;
    default `exact` alone.
    """
    plans = {plan.site.name: plan for plan in request.plans}
    noise = exact and request.noisy and precision == "model"  # bf16 has them in `more`
    settings = {
        **request_settings(request),
        "methods": methods or {"exact": {}},
        "precision": precision,
        "runner": choice.runner.name,
        # it divides patches into packed batches, on which the last bits of the values depend
        "max_tokens": getattr(choice.runner, "max_tokens", None),
    }
    identity = identity_of("sweep", request.bridge, request.pairs, settings)
    return Layout(
        variables=(
            *(site_variables(request, {"": "patched metric at {}"}) if exact else ()),
            *(noise_variables(request) if noise else ()),
            *more,
        ),
        coords=_coords(request),
        attrs={
            "patchsweep_version": version("patchsweep"),
            "method": "exact",
            "direction": request.direction,
            "intervention": request.intervention.name,
            **means_attrs(request.intervention, request.pairs, request.sites),
            **({"align": END} if any(pair.aligned for pair in request.pairs) else {}),
            "precision": precision,
            **_origin(request.pairs),
            IDENTITY: identity,
            "provenance": {
                **model_provenance(request.bridge, identity),
                "runner": choice.runner.name,
                "runner_reason": choice.reason,
                "config": dict(config),
            },
            "plan": {name: plan_counts(plan) for name, plan in plans.items()},
            **(attrs or {}),
        },
    )


def analysis_attrs(
    kind: str,
    model: TransformerBridge,
    pairs: PromptPairs,
    settings: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the attributes common to the results of all analyses, known before they run."""
    check_config(config)
    identity = identity_of(kind, model, pairs, settings)
    return {
        "kind": identity["kind"],
        "patchsweep_version": version("patchsweep"),
        **_origin(pairs),
        IDENTITY: dict(identity),
        "provenance": {
            **model_provenance(model, identity),
            "config": dict(config or {}),
        },
    }


def plan_counts(plan: SitePlan) -> dict[str, int]:
    """Return the counts of a site's patches and token-layers."""
    return {
        "n_patches": plan.n_patches,
        "n_live": plan.n_live,
        "n_dead": plan.n_patches - plan.n_live,
        "token_layers": plan.token_layers,
        "loop_token_layers": plan.loop_token_layers,
    }


def model_provenance(bridge: TransformerBridge, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model's name and revision, and the main parts of the run's identity."""
    config = bridge.original_model.config
    return {
        "model": str(bridge.cfg.model_name),
        "revision": getattr(config, "_commit_hash", None),
        "weights_hash": identity["model"]["weights"],
        "dtype": str(bridge.cfg.dtype).removeprefix("torch."),
        "compute_dtype": identity["compute_dtype"],
        "fp32_products": "full",  # no TF32, no autocast: see `arithmetic`
        "versions": dict(identity["versions"]),
    }


def _origin(pairs: PromptPairs) -> dict[str, Any]:
    """Return how the pairs were made and chosen; nothing if they do not say."""
    return {ORIGIN: list(pairs.origin)} if pairs.origin else {}


def axes_of(plan: SitePlan, n_metrics: int) -> dict[str, int]:
    """Return the names and sizes of the axes of a site's values, metric included."""
    n_pairs, n_layers, n_pos, n_units = plan.shape
    axes: dict[str, int] = {"metric": n_metrics, "pair": n_pairs}
    if plan.site.layered:
        axes["layer"] = n_layers
    if plan.axes.positions is not None:
        axes["pos"] = n_pos
    if plan.axes.units is not None:
        assert plan.site.unit is not None
        axes[plan.site.unit] = n_units // (plan.axes.n_sources or 1)
    if plan.axes.n_sources:
        axes["src"] = plan.axes.n_sources
    return axes


def site_variables(request: Request, words: Mapping[str, str]) -> tuple[Variable, ...]:
    """Return variables with a value for each cell, of each site; `words`: suffix -> what one holds.

    Their shards are those of the exact variables, whose suffix is "".
    """
    blocks = blocks_of(request.plans)
    return tuple(
        _variable(plan, suffix, text, axes_of(plan, len(request.metrics)), blocks[plan.site.name])
        for plan in request.plans
        for suffix, text in words.items()
    )


def pair_variables(
    request: Request, suffix: str, text: str, n_pairs: Mapping[str, int]
) -> tuple[Variable, ...]:
    """Return a variable `[metric, pair]` for each site; `n_pairs`: site -> pairs of one shard."""
    axes = {"metric": len(request.metrics), "pair": len(request.pairs)}
    return tuple(
        _variable(plan, suffix, text, axes, (n_pairs[plan.site.name], 1)) for plan in request.plans
    )


def noise_variables(request: Request) -> tuple[Variable, ...]:
    """Return a variable `[metric, pair]` per site for its noise floor."""
    n_pairs = {name: pairs for name, (pairs, _) in blocks_of(request.plans).items()}
    return pair_variables(request, NOISE, "effects at {} below this are rounding", n_pairs)


def _variable(
    plan: SitePlan, suffix: str, text: str, axes: Mapping[str, int], unit: tuple[int, int]
) -> Variable:
    return Variable(
        name=plan.site.name + suffix,
        dims=tuple(axes),
        shape=tuple(axes.values()),
        unit=unit,
        attrs={
            "long_name": text.format(plan.site.name),
            "role": suffix.removeprefix("_") or "exact",
            "site": plan.site.name,
        },
    )


def metric_and_pair_coords(
    metrics: Sequence[Metric], pairs: PromptPairs
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the coordinates of the axes `metric` and `pair`."""
    return {
        "metric": (("metric",), strings([metric.name for metric in metrics])),
        "metric_unit": (("metric",), strings([metric.unit for metric in metrics])),
        "pair": (("pair",), np.arange(len(pairs))),
        "answer": (("pair",), strings([pair.answer_text for pair in pairs])),
        "wrong_answer": (("pair",), strings([pair.wrong_answer_text for pair in pairs])),
    }


def _coords(request: Request) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    pairs = request.pairs
    coords = metric_and_pair_coords(request.metrics, pairs)
    for plan in request.plans:
        axes = plan.axes
        if plan.site.layered:
            coords["layer"] = (("layer",), _labels(axes.layers))
        if axes.units is not None:
            assert plan.site.unit is not None
            units = axes.units[:: axes.n_sources or 1]
            coords[plan.site.unit] = ((plan.site.unit,), _labels(units))
        if axes.n_sources:
            coords["src"] = (("src",), np.arange(axes.n_sources))
    positions = request.plans[0].axes.positions
    if positions is not None:
        all_indices = all(isinstance(position, int) for position in positions)
        labels = np.array(positions) if all_indices else strings([str(p) for p in positions])
        coords["pos"] = (("pos",), labels)
    shapes = [pair_shape(pair, request.direction, request.read) for pair in pairs]
    tokens = _token_strings(request)
    width = max(len(base) for base, _ in tokens)
    for name, side in (("base_token", 0), ("source_token", 1)):
        table = [[*row[side], *[""] * (width - len(row[side]))] for row in tokens]
        if positions is None:
            coords[name] = (("pair", "token"), strings(table))
        else:
            coords[name] = (
                ("pair", "pos"),
                strings(
                    [
                        ["".join(row[slice(*span_of(p, pair))]) for p in positions]
                        for row, pair in zip(table, shapes, strict=True)
                    ]
                ),
            )
    return coords


def _token_strings(request: Request) -> list[tuple[list[str], list[str]]]:
    """Return the token strings of base and source per pair, with forced answer tokens.

    Those of the source run are at the positions of the base run that they correspond to.
    """
    tokenizer = request.bridge.tokenizer
    strings: list[tuple[list[str], list[str]]] = []
    for pair in request.pairs:
        ids = base_and_source(pair, request.direction)
        known = dict(
            zip(pair.clean + pair.corrupted, pair.clean_tokens + pair.corrupted_tokens, strict=True)
        )
        base, source = ([known.get(i) or tokenizer.decode([i]) for i in run] for run in ids)
        strings.append((base, ["" if p == NONE else source[p] for p in partners(*ids)]))
    return strings


def _labels(sets: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return indices if each set has one member, else strings such as `0+1`."""
    if all(len(members) == 1 for members in sets):
        return np.array([members[0] for members in sets])
    return strings(["+".join(map(str, members)) for members in sets])


def strings(values: Any) -> NDArray[Any]:
    """Return texts as the array of objects in which results hold them."""
    return np.array(values, dtype=object)


class Memory:
    """Results in memory, with the interface of a store."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.variables = {v.name: v for v in layout.variables}
        self._values = {v.name: np.full(v.shape, np.nan, np.float32) for v in layout.variables}
        metrics, pairs = len(layout.coords["metric"][1]), len(layout.coords["pair"][1])
        self._fixed = {
            name: np.full((metrics, pairs), np.nan, np.float32)
            for name in ("base_metric", "source_metric")
        }

    def pending(self) -> list[Unit]:
        """Return all shards of all variables."""
        return [unit for variable in self.layout.variables for unit in variable.units()]

    def write(self, unit: Unit, values: np.ndarray) -> None:
        """Set the values of one shard."""
        variable = next(v for v in self.layout.variables if v.name == unit.variable)
        self._values[unit.variable][variable.slices(unit)] = values

    def pending_pairs(self) -> list[int]:
        """Return all pairs."""
        return list(range(len(self.layout.coords["pair"][1])))

    def write_references(self, first_pair: int, base: np.ndarray, source: np.ndarray) -> None:
        """Set base and source metric `[metric, pair]` of the pairs from `first_pair` on."""
        for name, values in (("base_metric", base), ("source_metric", source)):
            self._fixed[name][:, first_pair : first_pair + values.shape[1]] = values

    def dataset(self) -> xr.Dataset:
        """Return all results, in the form of `Store.dataset`."""
        arrays: dict[str, Any] = {
            v.name: (v.dims, self._values[v.name], dict(v.attrs)) for v in self.layout.variables
        }
        for name, values in self._fixed.items():
            arrays[name] = (("metric", "pair"), values)
        return xr.Dataset(
            arrays, coords=dict(self.layout.coords), attrs=flat_attributes(self.layout.attrs)
        )
