"""Joint patches as a request: sets of patches checked against a model, and their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import index_sets, position_axis
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PlanError
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.compute import ComputeDtype, check_compute_dtype, compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.quantised import check_each_row
from patchsweep.runners.joint import JointRunner, joint_runner
from patchsweep.runners.select import RunnerChoice, RunnerName, select_runner
from patchsweep.spec.batch import Batch, clean_prompts, make_batches, next_of_length, pair_shape
from patchsweep.spec.directions import Live, check_directions
from patchsweep.spec.finite import check_finite, check_references, names_of
from patchsweep.spec.interventions import (
    Direction,
    Intervention,
    Mean,
    Reader,
    ValueFn,
    check_constant,
    check_labels,
    get_intervention,
    shuffles,
    takes_source,
)
from patchsweep.spec.joint import WHOLE, JointPlan, Writes, overlap, plan_joint
from patchsweep.spec.metrics import Metric, MetricLike, get_metrics
from patchsweep.spec.plan import Axes, Ints, ModelShape, SitePlan
from patchsweep.spec.planner import plan_site
from patchsweep.spec.reference import MeansFrom, check_means, means_attrs, with_reference
from patchsweep.spec.sites import Site, get_sites
from patchsweep.spec.spec import check_direction, check_metrics, check_pairs, model_shape
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.identity import intervention_words


@dataclass(frozen=True)
class Patch:
    """Patch values for one site and place of a run; several patches may act in one run."""

    site: str  # such as z or mlp_out, see `patchsweep.spec.sites`
    layer: int | Sequence[int] | None = None  # several: all at once; None: a site without layers
    # a position, a label of the pairs, several of them at once, or "all"
    pos: int | str | Sequence[int | str] = "all"
    head: int | Sequence[int] | None = None  # head, key head, or neuron of mlp_post; None: all
    intervention: str | Intervention | float | Tensor | ValueFn = "resample"

    def told(self) -> dict[str, Any]:
        """Return the patch as JSON data; a custom intervention only by its name."""
        intervention = self.intervention
        name = (
            intervention
            if isinstance(intervention, str | float | int)
            else getattr(intervention, "name", "custom")
        )
        return {
            "site": self.site,
            "layer": _plain(self.layer),
            "pos": _plain(self.pos),
            "head": _plain(self.head),
            "intervention": name,
        }

    def means(self, pairs: PromptPairs) -> dict[str, Any]:
        """See `reference.means_attrs`."""
        return means_attrs(get_intervention(self.intervention), pairs, get_sites([self.site]))

    def identity(self) -> dict[str, Any]:
        """Return the patch as JSON data; values by content, or by name and version."""
        values = intervention_words(get_intervention(self.intervention))
        return {**self.told(), "intervention": values}


def _plain(given: Any) -> Any:
    return given if given is None or isinstance(given, int | str) else list(given)


@dataclass(frozen=True)
class _Checked:
    """A patch whose arguments fit the model."""

    site: int  # index into the request's sites
    layers: tuple[int, ...]
    positions: tuple[int | str, ...] | None  # None: all
    units: tuple[int, ...] | None  # None: all
    value: int  # index into the request's interventions


@dataclass(frozen=True)
class JointRequest:
    """Sets of patches checked against one model and its prompts."""

    bridge: TransformerBridge
    pairs: PromptPairs
    metrics: tuple[Metric, ...]
    direction: Direction
    read: int
    sets: tuple[tuple[_Checked, ...], ...]
    sites: tuple[Site, ...]
    interventions: tuple[Intervention, ...]
    used: tuple[tuple[str, int], ...]  # (site, intervention) that some patch has
    shape: ModelShape
    compute_dtype: torch.dtype
    source_of: Mapping[int, int] | None  # of shuffle: pair -> pair that its source is from

    def batches(self, numbers: Sequence[int]) -> list[Batch]:
        """Return the pairs `numbers` as batches, one per length."""
        device = device_of(self.bridge)
        return make_batches(self.pairs, numbers, self.direction, self.read, device)

    def sources(self, batch: Batch) -> dict[int, Batch]:
        """Return, for each intervention that takes another pair's source, a batch with that one."""
        shuffled = [i for i, x in enumerate(self.interventions) if shuffles(x)]
        if not shuffled:
            return {}
        device = device_of(self.bridge)
        (other,) = make_batches(
            self.pairs, batch.pairs, self.direction, self.read, device, self.source_of
        )
        return dict.fromkeys(shuffled, other)

    def check_overlaps(self) -> None:
        """Check that no set writes one vector twice with different values; runs nothing.

        Raises:
            PlanError: a set does.
        """
        several = [i for i, members in enumerate(self.sets) if len(members) > 1]
        for batch in self.batches(range(len(self.pairs))) if several else ():
            for first in range(0, len(several), 4096):
                self.plan(batch, several[first : first + 4096])

    def plan(self, batch: Batch, sets: Sequence[int]) -> JointPlan:
        """Return the plan of some sets on every pair of a batch; row: (pair, set) in that order.

        Raises:
            PlanError: a set writes one vector twice, with different values.
        """
        parts: dict[tuple[int, int], tuple[Ints, ...]] = {}  # (patch, pair) -> its columns
        columns: list[tuple[Ints, ...]] = []
        sizes = []
        for local in range(len(batch.pairs)):
            for number in sets:
                size = 0
                for patch in self.sets[number]:
                    key = id(patch), local
                    if key not in parts:
                        parts[key] = self._columns(patch, batch, local)
                    columns.append(parts[key])
                    size += len(parts[key][0])
                sizes.append(size)
        table = [np.concatenate([part[i] for part in columns]) for i in range(5)]
        row = np.repeat(np.arange(len(sizes)), sizes)
        writes = Writes(row, *table)
        keep, wrong = overlap(self.sites, writes)
        if wrong is not None:
            raise self._overlapping(writes, wrong, [*sets])
        pair = np.repeat(np.arange(len(batch.pairs)), len(sets))
        return plan_joint(
            self.sites,
            self.shape.n_layers,
            batch.reads,
            (batch.base != batch.source).cpu().numpy(),
            pair,
            writes.at(keep),
            np.array([x.from_source for x in self.interventions], bool),
            np.array([x.name == "base" for x in self.interventions], bool),
        )

    def _columns(self, patch: _Checked, batch: Batch, local: int) -> tuple[Ints, ...]:
        """Return site, layer, pos, unit and value of the single writes of a patch."""
        spans = batch.spans[local]
        pos: set[int] = set()
        for place in (None,) if patch.positions is None else patch.positions:
            if place is None:
                pos.update(range(batch.length))
            elif isinstance(place, str):
                pos.update(range(*spans[place]))
            else:
                pos.add(place)
        units = (WHOLE,) if patch.units is None else patch.units
        grid = np.meshgrid(patch.layers, sorted(pos), units, indexing="ij")
        layer, at, unit = (x.ravel().astype(np.int64) for x in grid)
        return np.full_like(layer, patch.site), layer, at, unit, np.full_like(layer, patch.value)

    def _overlapping(self, writes: Writes, wrong: int, sets: Sequence[int]) -> PlanError:
        site = self.sites[writes.site[wrong]]
        place = f"{site.name} at layer {writes.layer[wrong]}, position {writes.pos[wrong]}"
        if writes.unit[wrong] != WHOLE:
            place += f", {site.unit} {writes.unit[wrong]}"
        number = sets[int(writes.row[wrong]) % len(sets)]
        return PlanError(
            f"patches[{number}] gives {place} two different values; a set writes each vector "
            "once: leave one of the patches out, or give both the same intervention"
        )


def joint_request(
    model: TransformerBridge,
    pairs: PromptPairs,
    patches: Iterable[Patch | Sequence[Patch]],
    metrics: MetricLike | Sequence[MetricLike],
    *,
    direction: Direction | None,
    read: int,
    means_from: MeansFrom,
    compute_dtype: ComputeDtype,
) -> JointRequest:
    """Check sets of patches against a model and its pairs.

    Raises:
        PatchsweepError: an argument breaks a rule; the text says which, and what to do.
    """
    shape = model_shape(model)
    check_pairs(model, pairs)
    check_each_row(model)
    chosen_metrics = get_metrics(metrics)
    check_metrics(model, pairs, chosen_metrics)
    check_direction(direction)
    check_compute_dtype(compute_dtype)
    checking = _Checking(model, pairs, shape, means_from)
    sets = tuple(checking.patch_set(i, given) for i, given in enumerate(_listed(patches)))
    if not sets:
        raise PlanError("patches is empty; give at least one Patch, or one list of them")
    interventions = tuple(checking.interventions)
    chosen = _direction(interventions, direction)
    for pair in pairs:
        pair_shape(pair, chosen, read)
    checking.check_values(chosen)
    return JointRequest(
        bridge=model,
        pairs=pairs,
        metrics=chosen_metrics,
        direction=chosen,
        read=read,
        sets=sets,
        sites=tuple(checking.sites.values()),
        interventions=interventions,
        used=tuple(checking.used),
        shape=shape,
        compute_dtype=compute_dtype_of(model, compute_dtype),
        source_of=next_of_length(pairs) if any(map(shuffles, interventions)) else None,
    )


def _listed(patches: Any) -> list[Any]:
    if isinstance(patches, Patch):
        raise PlanError(
            f"patches={patches!r} is one Patch; give a list: each entry is a Patch, or a list of "
            "patches that act together"
        )
    if isinstance(patches, str | Mapping) or not isinstance(patches, Iterable):
        raise PlanError(f"patches={patches!r} must be a list of Patch, or of lists of them")
    return list(patches)


def _direction(interventions: Sequence[Intervention], direction: Direction | None) -> Direction:
    if direction is not None:
        return direction
    wanted = {x.default_direction for x in interventions if x.name != "base"}
    if len(wanted) > 1:
        raise ConfigError(
            "the patches' interventions have different default directions; give "
            "direction='denoising' (base is the corrupted prompt) or 'noising' (the clean one)"
        )
    return wanted.pop() if wanted else "denoising"


class _Checking:
    """Checks patches one by one; equal sites and interventions are kept once."""

    def __init__(
        self,
        model: TransformerBridge,
        pairs: PromptPairs,
        shape: ModelShape,
        means_from: MeansFrom,
    ) -> None:
        self.model, self.pairs, self.shape, self.means_from = model, pairs, shape, means_from
        self.sites: dict[str, Site] = {}
        self.interventions: list[Intervention] = []
        self.used: dict[tuple[str, int], None] = {}
        self._layers_of: dict[tuple[str, int], set[int]] = {}
        self._values: dict[Any, int] = {}
        self._kept: list[Any] = []  # keeps what `_values` and `_patches` name by id alive
        self._patches: dict[int, _Checked] = {}
        self._labels = set.intersection(*(set(pair.labels) for pair in pairs))
        self._shortest = min(len(pair) + len(pair.answer) - 1 for pair in pairs)

    def patch_set(self, number: int, given: Any) -> tuple[_Checked, ...]:
        """Return one set of patches, checked."""
        members = [given] if isinstance(given, Patch) else given
        if isinstance(members, str) or not isinstance(members, Sequence) or not members:
            raise PlanError(f"patches[{number}]={given!r} must be a Patch or a list of them")
        return tuple(self._patch(number, patch) for patch in members)

    def _patch(self, number: int, patch: Any) -> _Checked:
        if id(patch) in self._patches:
            return self._patches[id(patch)]
        if not isinstance(patch, Patch):
            raise PlanError(
                f"patches[{number}] holds {patch!r}, which is no Patch; write "
                "Patch(site='z', layer=3, head=1)"
            )
        (site,) = get_sites([patch.site])
        if site.cells:
            raise PlanError("joint patches take rows of a pattern, not cells; use site='pattern'")
        self.sites.setdefault(site.name, site)
        index = [*self.sites].index(site.name)
        value = self._value(patch.intervention)
        self.used[site.name, value] = None
        self._kept.append(patch)
        layers = self._layers(site, patch.layer)
        self._layers_of.setdefault((site.name, value), set()).update(layers)
        checked = _Checked(
            site=index,
            layers=layers,
            positions=self._positions(patch.pos),
            units=self._units(site, patch.head),
            value=value,
        )
        self._patches[id(patch)] = checked
        return checked

    def _layers(self, site: Site, layer: Any) -> tuple[int, ...]:
        if not site.layered:
            if layer is not None:
                raise PlanError(f"site {site.name} has no layers; leave layer out for it")
            return (0,)
        if layer is None:
            raise PlanError(f"a patch of {site.name} needs a layer; give one, such as layer=3")
        return _indices("layer", layer, self.shape.n_layers)

    def _units(self, site: Site, head: Any) -> tuple[int, ...] | None:
        if head is None:
            return None
        if site.unit is None:
            raise PlanError(f"site {site.name} has no heads; leave head out for it")
        return _indices("head", head, self.shape.n_units(site))

    def _positions(self, pos: Any) -> tuple[int | str, ...] | None:
        if isinstance(pos, str) and pos == "all":
            return None
        places = position_axis([pos] if isinstance(pos, str) else pos)
        if not places:
            raise PlanError("pos is empty; choose at least one, or 'all'")
        for place in places:
            if isinstance(place, str) and place not in self._labels:
                known = ", ".join(sorted(self._labels))
                remedy = f"use one of {known}" if known else "use positions, or label the pairs"
                raise PlanError(f"pos={place!r} is no label that every pair carries; {remedy}")
            if not isinstance(place, str) and not 0 <= place < self._shortest:
                raise PlanError(
                    f"pos={place} is no position of the shortest prompt; use "
                    f"0..{self._shortest - 1}, or a label"
                )
        return places

    def _value(self, given: Any) -> int:
        plain = isinstance(given, str | int | float) and not isinstance(given, bool)
        key = given if plain else id(given)
        if key not in self._values:
            intervention = get_intervention(given)
            if isinstance(intervention, Mean) and self.means_from is not None:
                intervention = with_reference(intervention, self.means_from, self.model)
            self._values[key] = len(self.interventions)
            self._kept.append(given)
            self.interventions.append(intervention)
        return self._values[key]

    def check_values(self, direction: Direction) -> None:
        """Check that each intervention fits the sites that it is used at."""
        means = [isinstance(x, Mean) for x in self.interventions]
        if self.means_from is not None and not any(means):
            raise ConfigError(
                "means_from is for the interventions mean, mean_all and mean_label; leave it out"
            )
        lengths = {pair_shape(pair, direction, -1).length for pair in self.pairs}
        for i, intervention in enumerate(self.interventions):
            sites = [self.sites[name] for name, value in self.used if value == i]
            if self.means_from is None:
                check_labels(intervention, [pair.labels for pair in self.pairs])
            check_means(intervention, self.pairs, sites)
            for site in sites:
                shapes = [found for n in lengths if (found := self.shape.values(site, n))]
                check_constant(intervention, site, shapes)
                layers = [[*self._layers_of[site.name, i]]]
                check_directions(intervention, site, shapes, self.shape.d_head, layers)


def _indices(name: str, given: Any, n: int) -> tuple[int, ...]:
    """Return one set of indices below `n`."""
    (chosen,) = index_sets(name, [given])
    if not chosen:
        raise PlanError(f"{name} is empty; choose at least one")
    for index in chosen:
        if not 0 <= index < n:
            raise PlanError(f"{name}={index} is none of the {n} that the model has; use 0..{n - 1}")
    return chosen


class JointPatches:
    """Runs the sets of a request."""

    def __init__(
        self,
        request: JointRequest,
        runner: RunnerName,
        max_tokens: int | None,
        cache_budget: int | None = None,
    ) -> None:
        self.request = request
        self.choice = self._choice(runner, max_tokens, cache_budget)
        self.runner: JointRunner = joint_runner(self.choice.runner)
        batches = request.batches(range(len(request.pairs)))
        reader = Reader(self.choice.runner.name, request.sites, self.choice.runner.activations)
        for intervention in request.interventions:
            intervention.prepare(clean_prompts(batches, request.direction), reader)
        self._captured: dict[tuple[int, ...], Any] = {}

    def _choice(
        self, runner: RunnerName, max_tokens: int | None, cache_budget: int | None
    ) -> RunnerChoice:
        request = self.request
        if runner == "auto" and any(map(self._needs_hooks, request.sets)):
            runner = "hooked"
        others = [x for x in request.interventions if not takes_source(x)]
        intervention = others[0] if others else request.interventions[0]
        return select_runner(
            request.bridge,
            [_test_plan(request, site) for site in request.sites],
            intervention,
            wanted=runner,
            max_tokens=max_tokens,
            cache_budget=cache_budget,
            compute_dtype=request.compute_dtype,
        )

    def _needs_hooks(self, patches: Sequence[_Checked]) -> bool:
        """Whether packed batches cannot run a set: they write an attention pattern as z with the
        base run's values, and `result` as the z that its values determine."""
        sites, interventions = self.request.sites, self.request.interventions
        places = {(patch.site, layer) for patch in patches for layer in patch.layers}
        beside = len(places) > 1 and any(sites[site].is_pattern for site, _ in places)
        return beside or any(
            sites[patch.site].written_as and isinstance(interventions[patch.value], Live)
            for patch in patches
        )

    def run(self, pairs: range, sets: Sequence[int]) -> tuple[Values, Values]:
        """Return the metrics `[metric, pair, set]` of some sets, and `[2, metric, pair]` of base
        and source runs.

        Raises:
            ModelError: a metric is NaN or infinite.
        """
        request = self.request
        n_metrics = len(request.metrics)
        values = np.empty((n_metrics, len(pairs), len(sets)), np.float32)
        references = np.empty((2, n_metrics, len(pairs)), np.float32)
        for batch in request.batches(pairs):
            loaded, base, source = self._of(batch)
            columns = [pair - pairs.start for pair in batch.pairs]
            references[0][:, columns], references[1][:, columns] = base, source
            plan = request.plan(batch, sets)
            found = np.repeat(base, len(sets), axis=1)
            live = np.flatnonzero(plan.live)
            if len(live):
                found[:, live] = self._metrics(loaded, plan.part(live))

            def where(row: int, batch: Batch = batch) -> str:
                return f"patches[{sets[row % len(sets)]}] in pair {batch.pairs[row // len(sets)]}"

            check_finite(found, names_of(request.metrics), where)
            values[:, columns] = found.reshape(n_metrics, len(columns), len(sets))
        return values, references

    def _metrics(self, loaded: Any, plan: JointPlan) -> Values:
        try:
            found: Values = self.runner.run(loaded, plan, self.request.metrics).numpy()
        except Unsupported as error:
            raise ConfigError(
                f"runner={self.choice.runner.name} cannot run this: {error.reason}; use "
                "runner=hooked"
            ) from error
        return found

    def _of(self, batch: Batch) -> tuple[Any, Values, Values]:
        """Return a captured batch and its references; the last batches are kept."""
        if batch.pairs not in self._captured:
            request = self.request
            loaded = self.runner.load(
                batch, request.sources(batch), request.interventions, request.used
            )
            base, source = (
                x.cpu().numpy() for x in self.runner.references(loaded, request.metrics)
            )
            check_references(base, source, batch.pairs, request.metrics)
            self._captured = {batch.pairs: (loaded, base, source)}
        found: tuple[Any, Values, Values] = self._captured[batch.pairs]
        return found


def _test_plan(request: JointRequest, site: Site) -> SitePlan:
    """Return a plan of `site` for the self-test: one patch over all layers at once."""
    layers = range(request.shape.n_layers) if site.layered else range(1)
    together = tuple((i,) for i in layers) if site.is_pattern else (tuple(layers),)
    pairs = [pair_shape(pair, request.direction, request.read) for pair in request.pairs]
    return plan_site(site, Axes(together, None, None), request.shape, pairs)
