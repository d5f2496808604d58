"""Joint patches as a request: sets of patches checked against a model, and their metrics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PlanError
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.compute import ComputeDtype, check_compute_dtype, compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.models.quantised import check_each_row
from patchsweep.runners.joint import JointRunner, joint_runner
from patchsweep.runners.select import RunnerChoice, RunnerName, select_runner
from patchsweep.spec.batch import Batch, clean_prompts, make_batches, pair_shape, sources_of
from patchsweep.spec.directions import Live
from patchsweep.spec.finite import check_finite, check_references, names_of
from patchsweep.spec.interventions import (
    Direction,
    Intervention,
    Reader,
    shuffles,
    takes_source,
)
from patchsweep.spec.joint import WHOLE, JointPlan, Writes, overlap, plan_joint
from patchsweep.spec.metrics import Metric, MetricLike, get_metrics
from patchsweep.spec.plan import Axes, Ints, ModelShape, PairShape, SitePlan
from patchsweep.spec.planner import plan_site
from patchsweep.spec.reference import MeansFrom
from patchsweep.spec.sites import Site
from patchsweep.spec.spec import (
    check_aligned,
    check_direction,
    check_metrics,
    check_pairs,
    model_shape,
)
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.patches import CheckedPatch, Patch, PatchChecks, listed


@dataclass(frozen=True)
class JointRequest:
    """Sets of patches checked against one model and its prompts."""

    bridge: TransformerBridge
    pairs: PromptPairs
    metrics: tuple[Metric, ...]
    direction: Direction
    read: int
    sets: tuple[tuple[CheckedPatch, ...], ...]
    sites: tuple[Site, ...]
    interventions: tuple[Intervention, ...]
    used: tuple[tuple[str, int], ...]  # (site, intervention) that some patch has
    shape: ModelShape
    compute_dtype: torch.dtype
    source_of: Mapping[int, int] | None  # of shuffle: pair -> pair that its source is from

    @cached_property
    def shapes(self) -> tuple[PairShape, ...]:
        """The facts about each pair that say where its patches lie."""
        return tuple(pair_shape(pair, self.direction, self.read) for pair in self.pairs)

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
            batch.differs.cpu().numpy(),
            pair,
            writes.at(keep),
            np.array([x.from_source for x in self.interventions], bool),
            np.array([x.name == "base" for x in self.interventions], bool),
        )

    def _columns(self, patch: CheckedPatch, batch: Batch, local: int) -> tuple[Ints, ...]:
        """Return site, layer, pos, unit and value of the single writes of a patch."""
        pair = self.shapes[batch.pairs[local]]
        pos = patch.positions_in(pair)
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
    check_pairs(model, pairs, aligned=True)
    check_each_row(model)
    chosen_metrics = get_metrics(metrics)
    check_metrics(model, pairs, chosen_metrics)
    check_direction(direction)
    check_compute_dtype(compute_dtype)
    checking = PatchChecks(model, pairs, shape, means_from)
    sets = tuple(checking.patch_set(i, given) for i, given in enumerate(listed(patches)))
    if not sets:
        raise PlanError("patches is empty; give at least one Patch, or one list of them")
    interventions = tuple(checking.interventions)
    if any(pair.aligned for pair in pairs):
        for name, value in checking.used:
            check_aligned([checking.sites[name]], interventions[value])
    chosen = _direction(interventions, direction)
    checking.check_positions([pair_shape(pair, chosen, read) for pair in pairs])
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
        source_of=sources_of(pairs, interventions),
    )


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
        if runner != "hooked" and any(map(self._needs_hooks, request.sets)):
            if runner == "packed":
                raise ConfigError(
                    "runner=packed cannot run this: an attention pattern is patched beside "
                    "something else, or result by what it meets; use runner=auto or runner=hooked"
                )
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

    def _needs_hooks(self, patches: Sequence[CheckedPatch]) -> bool:
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
        values = np.empty((self.n_columns, len(pairs), len(sets)), np.float32)
        references = np.empty((2, n_metrics, len(pairs)), np.float32)
        for batch in request.batches(pairs):
            loaded, base, source = self._of(batch)
            columns = [pair - pairs.start for pair in batch.pairs]
            references[0][:, columns], references[1][:, columns] = base, source
            plan = request.plan(batch, sets)
            found = np.zeros((len(values), plan.n_rows), np.float32)
            found[:n_metrics] = np.repeat(base, len(sets), axis=1)
            live = np.flatnonzero(plan.live)
            if len(live):
                part = plan.part(live)
                first, of = part.distinct()
                numbers = np.array(sets)[live[first] % len(sets)]
                try:
                    rows = self.rows(loaded, part.part(first), numbers)
                except Unsupported as error:
                    raise ConfigError(
                        f"runner={self.choice.runner.name} cannot run this: {error.reason}; use "
                        "runner=hooked"
                    ) from error
                found[:, live] = rows[:, of]

            def where(row: int, batch: Batch = batch) -> str:
                return f"patches[{sets[row % len(sets)]}] in pair {batch.pairs[row // len(sets)]}"

            check_finite(found[:n_metrics], names_of(request.metrics), where)
            values[:, columns] = found.reshape(len(found), len(columns), len(sets))
        return values, references

    @property
    def n_columns(self) -> int:
        """Numbers of each set on a pair: its metrics, and what a subclass adds."""
        return len(self.request.metrics)

    def rows(self, loaded: Any, plan: JointPlan, numbers: Ints | None = None) -> Values:
        """Return `[column, row]` of rows that are all live; `numbers`: of their sets."""
        found: Values = self.runner.run(loaded, plan, self.request.metrics).numpy()
        return found

    def load(
        self,
        batch: Batch,
        sources: Mapping[int, Batch],
        interventions: Sequence[Intervention],
        used: Sequence[tuple[str, int]],
    ) -> tuple[Any, Values, Values]:
        """Return a captured batch, and the metrics `[metric, pair]` of base and source runs."""
        loaded = self.runner.load(batch, sources, interventions, used)
        base, source = self.runner.references(loaded, self.request.metrics)
        return loaded, base.cpu().numpy(), source.cpu().numpy()

    def _of(self, batch: Batch) -> tuple[Any, Values, Values]:
        """Return a captured batch and its references; the last batches are kept."""
        if batch.pairs not in self._captured:
            request = self.request
            loaded, base, source = self.load(
                batch, request.sources(batch), request.interventions, request.used
            )
            check_references(base, source, batch.pairs, request.metrics)
            self._captured = {batch.pairs: (loaded, base, source)}
        found: tuple[Any, Values, Values] = self._captured[batch.pairs]
        return found


def _test_plan(request: JointRequest, site: Site) -> SitePlan:
    """Return a plan of `site` for the self-test: one patch over all layers at once."""
    layers = range(request.shape.n_layers) if site.layered else range(1)
    together = tuple((i,) for i in layers) if site.is_pattern else (tuple(layers),)
    pairs = [replace(pair, alone=()) for pair in request.shapes]
    return plan_site(site, Axes(together, None, None), request.shape, pairs)
