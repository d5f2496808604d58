"""Joint patches in packed batches: a row writes several vectors, at several layers.

A row enters at its lowest write and its first position, reads the base run's keys and values before
that, and grows where a higher layer is written at an earlier position. Rows that have their lowest
layer's writes in common share the run up to where they part: it runs once, its block inputs, keys
and values are kept, and the rows continue it as others continue the base run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from patchsweep_kernels.scatter import Targets, scatter_targets
from torch import Tensor

from patchsweep.forward.block_args import first_of
from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.memory import is_out_of_memory
from patchsweep.models.moves import Moves, move_together, on_cpu, sent
from patchsweep.runners.packed.forward import PackedBlocks
from patchsweep.runners.packed.joint_batch import JointBatch, joint_batches
from patchsweep.runners.packed.packing import Packing
from patchsweep.runners.packed.runner import Loaded, PackedRunner
from patchsweep.runners.packed.tables import (
    PackedInput,
    PatchValues,
    make_tables,
    n_units,
    tables_of,
    there,
)
from patchsweep.spec.batch import Batch
from patchsweep.spec.directions import Live, Numbered
from patchsweep.spec.interventions import Intervention, Resample
from patchsweep.spec.joint import WHOLE, JointPlan, shared_stems
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints

# most bytes of kept runs that rows continue together
STEM_BYTES = 256 * 2**20
# order in which sites are written at one block's input
_STREAM_ORDER = ("embed", "resid_post", "resid_pre")

# (site's name, intervention) -> per layer at which they are written, values [pair, pos, width]
Values = Mapping[tuple[str, int], Sequence[Tensor]]


@dataclass(frozen=True)
class JointLoaded:
    """A captured batch with the values of several interventions."""

    loaded: Loaded
    values: Values
    live: Mapping[int, Live]  # interventions that change what they meet; their values: the source's


class PackedJoint:
    """Runs joint patches on the model and in the batch size of a packed runner."""

    def __init__(self, runner: PackedRunner) -> None:
        self.runner = runner

    def load(
        self,
        batch: Batch,
        sources: Mapping[int, Batch],
        interventions: Sequence[Intervention],
        used: Sequence[tuple[str, int]],
    ) -> JointLoaded:
        """Capture a batch; make the values of each (site, intervention) in `used`.

        `sources`: intervention -> the batch whose source runs it takes instead, as shuffle does.
        """
        runner = self.runner
        loaded = runner.load(batch, interventions[0])
        others = {i: runner.load(other, interventions[i]) for i, other in sources.items()}
        values = {}
        live = {i: x for i, x in enumerate(interventions) if isinstance(x, Live)}
        for name, i in used:
            if isinstance(interventions[i], Numbered):
                continue  # it needs no values
            here = others.get(i, loaded)
            # nothing is upstream of the embeddings: what an intervention meets there is the base's
            if i in live and name != "embed":
                makes: Intervention = Resample()  # `applied` takes the source's values
            else:
                makes = interventions[i]
            if makes is interventions[i] and (i == 0 or i in others):
                values[name, i] = here.patch_values[name]
            else:
                point = runner.points[name]
                values[name, i] = runner.values(point, makes, loaded.base, here.source, batch.spans)
        return JointLoaded(loaded, values, live)

    def references(
        self, loaded: JointLoaded, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """Return the metrics of the unpatched base runs and of the source runs."""
        return self.runner.references(loaded.loaded, metrics)

    @torch.no_grad()
    def run(
        self, loaded: JointLoaded, plan: JointPlan, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric row"]:
        """Return the metrics of every row; all rows are live.

        Raises:
            Unsupported: a row patches an attention pattern beside something else.
        """
        _check_patterns(plan)
        values = torch.empty(len(metrics), plan.n_rows, device="cpu")
        base = loaded.loaded.base
        alone, stems = shared_stems(plan)
        if len(alone):
            values[:, alone] = self._run(loaded, plan.part(alone), base, plan.pair[:0], metrics)
        for stem in stems:
            size = _chunk_of(base, len(stem.plan.pair))
            for first in range(0, stem.plan.n_rows, size):
                part = stem.part(range(first, min(first + size, stem.plan.n_rows)))
                kept = self._kept(loaded, part.plan, base)
                values[:, part.rows] = self._run(loaded, part.rest, kept, part.plan.pair, metrics)
        return values

    def _kept(self, loaded: JointLoaded, plan: JointPlan, base: ActivationCache) -> ActivationCache:
        """Run the rows of `plan`; return their whole runs as a cache with one prompt a row."""
        pair = on_cpu(plan.pair)
        places = {x.device for xs in (base.resid, base.keys, base.values) for x in xs}
        at = {place: move_together([pair], place)[0] for place in places}

        def of_rows(xs: Sequence[Tensor]) -> list[Tensor]:
            return [x[at[x.device]].to(d) for x, d in zip(xs, base.devices, strict=False)]

        kept = ActivationCache(
            shape=(plan.n_rows, base.shape[1]),
            devices=base.devices,
            resid=of_rows(base.resid),
            keys=of_rows(base.keys),
            values=of_rows(base.values),
            heads=base.heads,
            calls=base.calls,
        )
        for rows in joint_batches(plan, self.runner.max_tokens):
            batch = JointBatch.of(plan, rows)
            hidden = self._blocks(loaded, batch, base, plan.pair[:0], kept)
            row, pos = batch.final_tokens()
            last = kept.resid[-1]
            at_rows, at_pos = move_together(map(on_cpu, (rows[row], pos)), last.device)
            last[at_rows, at_pos] = hidden
        return kept

    def _run(
        self,
        loaded: JointLoaded,
        plan: JointPlan,
        base: ActivationCache,
        pair_of_base: Ints,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        values = torch.empty(len(metrics), plan.n_rows, device="cpu")
        done: list[tuple[Ints, Tensor]] = []  # results stay on the device: a copy would wait
        waiting = list(joint_batches(plan, self.runner.max_tokens))
        while waiting:
            rows = waiting.pop(0)
            try:
                result = self._run_rows(
                    loaded, JointBatch.of(plan, rows), base, pair_of_base, metrics
                )
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(rows) == 1:
                    raise
                tokens = int((plan.length - plan.first[rows, -1]).sum())
                self.runner.max_tokens = max(1, tokens // 2)
                rest = np.concatenate([rows, *waiting])
                waiting = [rest[i] for i in joint_batches(plan.part(rest), self.runner.max_tokens)]
                torch.cuda.empty_cache()
                continue
            done.append((rows, result))
        if done:
            places, results = zip(*done, strict=True)
            values[:, np.concatenate(places)] = torch.cat(results, dim=1).cpu()
        return values

    def _run_rows(
        self,
        loaded: JointLoaded,
        batch: JointBatch,
        base: ActivationCache,
        pair_of_base: Ints,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        hidden = self._blocks(loaded, batch, base, pair_of_base, None)
        plan, rows = batch.plan, batch.patch
        reads = list(loaded.loaded.batch.reads)
        last = base.resid[-1].to(hidden.device)
        first = plan.first[rows, -1]
        end = np.cumsum(plan.length - first)
        inside = [np.flatnonzero(first <= read) for read in reads]
        tokens = [end[i] - (plan.length - read) for i, read in zip(inside, reads, strict=True)]
        bases, pair, *tables = move_together(
            map(on_cpu, (plan.base[rows], plan.pair[rows], *inside, *tokens)), hidden.device
        )
        resid = torch.stack([last[bases, read] for read in reads], dim=1)
        for i in range(len(reads)):
            resid[tables[i], i] = hidden[tables[len(reads) + i]]
        return self.runner.metrics_of(loaded.loaded, resid, pair, metrics)

    def _blocks(
        self,
        loaded: JointLoaded,
        batch: JointBatch,
        base: ActivationCache,
        pair_of_base: Ints,
        keep: ActivationCache | None,
    ) -> Tensor:
        """Return the final residuals `[token, d_model]` of a batch's rows, one after the other."""
        points = self.runner.points
        names = sorted(
            {batch.plan.sites[i].name for i in np.unique(batch.plan.writes.site).tolist()},
            key=lambda name: _STREAM_ORDER.index(name) if name in _STREAM_ORDER else -1,
        )
        given = PackedInput(
            base, [PatchValues(points[name], None) for name in names], _same(batch.n_pairs)
        )
        blocks = JointBlocks(self.runner, batch, given, loaded, pair_of_base, keep)
        return blocks.run()


@dataclass(frozen=True, eq=False)
class JointTargets:
    """Where the values of one intervention are written at one site and layer."""

    value: int  # the intervention
    to: Targets
    n_units: int = 0  # units of a vector; 0: whole vectors are written
    numbers: Tensor | None = None  # of a `Numbered` intervention's vectors, on the CPU


class JointBlocks(PackedBlocks):
    """The packed rows of joint patches at their current block."""

    def __init__(
        self,
        runner: PackedRunner,
        batch: JointBatch,
        given: PackedInput,
        loaded: JointLoaded,
        pair_of_base: Ints,
        keep: ActivationCache | None,
    ) -> None:
        super().__init__(runner.unwrapped, batch, given)
        self.batch, self.loaded, self.keep = batch, loaded, keep
        self.packing: Packing
        # pair of the captured batch of each base run; empty: they are the same
        self.pair_of_base = pair_of_base
        names = [site.name for site in batch.plan.sites]
        self.cells: dict[tuple[str, int], dict[int, Ints]] = {}  # site, layer -> value -> writes
        # site, layer -> the tables of `cells`, made before the first block
        self.targets: dict[tuple[str, int], list[JointTargets]] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> row and position of each token
        self.pairs: dict[int, Tensor] = {}  # layer -> pair of the captured batch of each token
        self.row_of = np.full(batch.plan.n_rows, -1, np.int64)
        self.row_of[batch.patch] = np.arange(len(batch.patch))
        writes, write_layer = batch.plan.writes, batch.plan.write_layer
        mine = batch.writes_of
        order = mine[np.lexsort((writes.value[mine], write_layer[mine], writes.site[mine]))]
        key = np.stack([writes.site, write_layer, writes.value])[:, order]
        cuts = np.flatnonzero((key[:, 1:] != key[:, :-1]).any(axis=0)) + 1
        for part in np.split(order, cuts) if len(order) else ():
            i = part[0]
            at = self.cells.setdefault((names[writes.site[i]], int(write_layer[i])), {})
            at[int(writes.value[i])] = part

    def run(self) -> Tensor:
        """Return the final residuals `[token, d_model]` of all rows."""
        hidden: Tensor | None = None
        with ExitStack() as stack:
            stack.enter_context(self.hooks())
            packings = list(self.batch.packings())
            tables = make_tables(self.batch, self.given, packings)
            self._make_tables(packings)
            for packing in packings:
                self.packing = packing
                hidden = self.enter(tables.popleft(), hidden)
                if packing.layer < self.unwrapped.n_layers:
                    self._keep_tokens(None if self.keep is None else self.keep.resid, hidden)
                    hidden = self.replay(hidden)
        assert hidden is not None
        return hidden

    def replay(self, hidden: Tensor) -> Tensor:
        """See `PackedBlocks`; a block's arguments are those of the captured batch's pairs."""
        if not len(self.pair_of_base):
            return super().replay(hidden)
        layer = self.packing.layer
        block_args = self.given.base.calls[layer].at(self.pairs[layer], self.tables.token_pos)
        output = self.unwrapped.blocks[layer](
            hidden.unsqueeze(0), *block_args.args, **block_args.kwargs
        )
        return first_of(output).squeeze(0)

    def attended(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """See `PackedBlocks`."""
        if self.keep is not None:
            self._keep_tokens([x.transpose(1, 2) for x in self.keep.keys], k)
            self._keep_tokens([x.transpose(1, 2) for x in self.keep.values], v)
        return super().attended(layer, q, k, v, settings)

    def _keep_tokens(self, kept: Sequence[Tensor] | None, x: Tensor) -> None:
        """Write `x` `[token, ...]` into this layer of `kept`, `[row, pos, ...]` each."""
        if kept is None:
            return
        into = kept[self.packing.layer]
        into[self.kept[self.packing.layer]] = x.to(into)

    def write(self, x: Tensor, *sites: str) -> None:
        """Write the patches at `sites` into `x` `[.., token, width]`, in place."""
        for name in sites:
            for targets in self.targets.get((name, self.packing.layer), ()):
                self._write_cells(x, name, targets)

    def _write_cells(self, x: Tensor, name: str, targets: JointTargets) -> None:
        """Write the values of one intervention at one site: whole vectors, or single units."""
        layer, to = self.packing.layer, targets.to
        given = self.loaded.live.get(targets.value)
        if isinstance(given, Numbered):
            assert targets.numbers is not None
            flat = x.view(-1, x.shape[-1])
            added = sent(given.vectors(targets.numbers), x.device).to(x)
            scatter_targets(flat, flat[to.token] + added, to)
            return
        layer_values = self.loaded.values[name, targets.value][layer].to(x)
        flat, values = x.view(-1, x.shape[-1]), layer_values.reshape(-1, layer_values.shape[-1])
        if to.head is not None:
            flat = flat.view(len(flat), targets.n_units, -1)
            values = values.view(len(values) * targets.n_units, -1)
        live = given if name != "embed" else None
        if live is None:
            scatter_targets(flat, values, to)
            return
        site = next(site for site in self.batch.plan.sites if site.name == name)
        met = flat[to.token] if to.head is None else flat[to.token, to.head]
        new = live.applied(site, layer - site.shift, met, values[to.source])
        scatter_targets(flat, new, replace(to, source=None, n_cells=len(new)))

    def _make_tables(self, packings: Sequence[Packing]) -> None:
        """Make the tables of all blocks and move them in one copy a device."""
        devices = self.given.base.devices
        moves: dict[torch.device, Moves] = defaultdict(Moves)
        on_host: dict[tuple[str, int], list[JointTargets]] = {}
        kept: dict[int, tuple[Tensor, ...]] = {}
        for packing in packings:
            layer, to_device = packing.layer, moves[devices[packing.layer]]
            offsets = np.zeros(len(self.batch.patch), np.int64)
            offsets[packing.rows] = packing.offsets[:-1]
            for (name, at), by_value in self.cells.items():
                if at == layer:
                    on_host[name, at] = [
                        targets
                        for value, cells in by_value.items()
                        for targets in self._targets(name, layer, value, cells, offsets)
                    ]
                    to_device.add(*(t for made in on_host[name, at] for t in tables_of(made.to)))
            rows: list[Ints] = []
            if self.keep is not None:
                counts = np.diff(packing.offsets)
                rows = [np.repeat(self.batch.patch[packing.rows], counts), packing.token_pos]
            if len(self.pair_of_base):
                rows.append(self.pair_of_base[packing.token_pair])
            kept[layer] = tuple(map(on_cpu, rows))
            to_device.add(*kept[layer])
        for device, to_device in moves.items():
            to_device.start(device)
        for (name, layer), made in on_host.items():
            here = moves[devices[layer]]
            self.targets[name, layer] = [replace(t, to=there(t.to, here)) for t in made]
        for layer, tables in kept.items():
            moved = [moves[devices[layer]][table] for table in tables]
            if self.keep is not None:
                self.kept[layer] = (moved[0], moved[1])
            if len(self.pair_of_base):
                self.pairs[layer] = moved[-1]

    def _targets(
        self, name: str, layer: int, value: int, cells: Ints, offsets: Ints
    ) -> Iterator[JointTargets]:
        """Yield where one intervention's values go, on the CPU: whole vectors, then units."""
        plan = self.batch.plan
        writes = plan.writes.at(cells)
        token = offsets[self.row_of[writes.row]] + writes.pos - plan.first[writes.row, layer]
        if isinstance(self.loaded.live.get(value), Numbered):
            yield JointTargets(value, Targets.of(on_cpu(token)), numbers=on_cpu(writes.unit))
            return
        length, width = self.loaded.values[name, value][layer].shape[-2:]
        source = plan.pair[writes.row] * length + writes.pos
        whole = writes.unit == WHOLE
        if whole.any():
            yield JointTargets(value, Targets.of(on_cpu(token[whole]), on_cpu(source[whole])))
        if not whole.all():
            site = next(site for site in plan.sites if site.name == name)
            n = n_units(self.given.base, site, layer, width)
            unit = writes.unit[~whole]
            to = Targets.of(on_cpu(token[~whole]), on_cpu(source[~whole] * n + unit), on_cpu(unit))
            yield JointTargets(value, to, n)


def _check_patterns(plan: JointPlan) -> None:
    """Raise for patterns beside other patches: they are written as z with the base run's values."""
    patterns = np.array([site.is_pattern for site in plan.sites], bool)
    if not patterns.any():
        return
    of = patterns[plan.writes.site]
    rows = np.zeros(plan.n_rows, bool)
    rows[plan.writes.row[of]] = True
    layers = np.full(plan.n_rows, -1, np.int64)
    np.maximum.at(layers, plan.writes.row, plan.write_layer)
    beside = rows[plan.writes.row] & (~of | (plan.write_layer != layers[plan.writes.row]))
    if beside.any():
        raise Unsupported("an attention pattern is patched beside something else")


def _chunk_of(base: ActivationCache, n_rows: int) -> int:
    """Return how many kept runs fit `STEM_BYTES`."""
    one = sum(x[:1].numel() * x.element_size() for x in (*base.resid, *base.keys, *base.values))
    return max(1, min(n_rows, STEM_BYTES // one))


def _same(n: int) -> dict[int, int]:
    return {i: i for i in range(n)}
