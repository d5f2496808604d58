"""Joint patches in packed batches: a row writes several vectors, at several layers.

A row enters at its lowest write and its first position, reads the base run's keys and values before
that, and grows where a higher layer is written at an earlier position. Rows that have their lowest
layer's writes in common share the run up to where they part: it runs once, its block inputs, keys
and values are kept, and the rows continue it as others continue the base run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.site_locations import SiteLocation
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.moves import Moves, move_together, on_cpu
from patchsweep.runners.packed.forward import PackedBlocks
from patchsweep.runners.packed.joint_batch import (
    JointBatch,
    JointLoaded,
    JointTargets,
    JointWrites,
    joint_batches,
)
from patchsweep.runners.packed.runner import PackedRunner, read_of
from patchsweep.runners.packed.schedule import Packing, pack
from patchsweep.runners.packed.tables import BlockTables, PackedInput, PatchValues, make_tables
from patchsweep.spec.batch import Batch
from patchsweep.spec.directions import Live, Numbered
from patchsweep.spec.interventions import Intervention, Resample
from patchsweep.spec.joint import JointPlan, Stem, shared_stems
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints

# most bytes of kept runs that rows continue together
STEM_BYTES = 256 * 2**20
# order in which sites are written at one block's input
_STREAM_ORDER = ("embed", "resid_post", "resid_pre")


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
        keep: Sequence[SiteLocation] = (),
    ) -> JointLoaded:
        """Capture a batch; make the values of each (site, intervention) in `used`.

        `sources`: intervention -> the batch whose source runs it takes instead, as shuffle does.
        `keep`: see `PackedRunner.load`.
        """
        runner = self.runner
        loaded = runner.load(batch, interventions[0], keep)
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
        check_patterns(plan)
        values = torch.empty(len(metrics), plan.n_rows, device="cpu")
        alone, stems = shared_stems(plan)
        if len(alone):
            part, base = plan.part(alone), loaded.loaded.base
            values[:, alone] = self._run(loaded, part, base, metrics)
        for stem, kept in self.kept_stems(loaded, stems):
            values[:, stem.rows] = self._run(loaded, stem.rest, kept, metrics)
        return values

    def kept_stems(
        self, loaded: JointLoaded, stems: Sequence[Stem], n_parts: int = 1
    ) -> Iterator[tuple[Stem, ActivationCache]]:
        """Yield parts of `stems` with their runs: as many as fit `STEM_BYTES`, in `n_parts`."""
        base = loaded.loaded.base
        one = sum(x[:1].numel() * x.element_size() for x in (*base.resid, *base.keys, *base.values))
        for stem in stems:
            size = max(1, min(stem.plan.n_rows, STEM_BYTES // one) // n_parts)
            for first in range(0, stem.plan.n_rows, size):
                part = stem.part(range(first, min(first + size, stem.plan.n_rows)))
                yield part, self.kept(loaded, part.plan)

    @torch.no_grad()
    def kept(self, loaded: JointLoaded, plan: JointPlan) -> ActivationCache:
        """Run the rows of `plan`; return their whole runs as a cache with one prompt a row.

        It holds queries after rotary if the base run's cache does.
        """
        base = loaded.loaded.base
        pair = on_cpu(plan.pair)
        places = {x.device for xs in (base.resid, base.keys, base.values) for x in xs}
        at = {place: move_together([pair], place)[0] for place in {*places, base.devices[-1]}}
        queries = {name: xs for name, xs in base.sites.items() if name == "rot_q"}
        kept = replace(base, sites=queries, captured=at[base.devices[-1]]).taken(
            plan.n_rows,
            lambda xs: [x[at[x.device]].to(d) for x, d in zip(xs, base.devices, strict=False)],
        )
        for batch in joint_batches(plan, self.runner.max_tokens):
            JointBlocks(self.runner, batch, base, loaded, kept).run()
        return kept

    def _run(
        self, loaded: JointLoaded, plan: JointPlan, base: ActivationCache, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric row"]:
        values = torch.empty(len(metrics), plan.n_rows, device="cpu")
        done = self.runner.run_batches(
            lambda rows: joint_batches(plan, self.runner.max_tokens, rows),
            lambda batch: self._run_rows(loaded, batch, base, metrics),
        )
        places, results = zip(*done, strict=True)
        values[:, np.concatenate(places)] = torch.cat(results, dim=1).cpu()
        return values

    def _run_rows(
        self,
        loaded: JointLoaded,
        batch: JointBatch,
        base: ActivationCache,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        hidden = JointBlocks(self.runner, batch, base, loaded).run()
        resid = read_of(base.resid[-1].to(hidden.device), loaded.loaded.batch.reads)
        run, pair = on_cpu(batch.pair), on_cpu(batch.plan.pair[batch.patch])
        return self.runner.read(loaded.loaded, batch, hidden, resid, run, pair, metrics)


def joint_input(runner: PackedRunner, batch: JointBatch, base: ActivationCache) -> PackedInput:
    """Return the inputs of a batch's rows, which continue the runs in `base`."""
    names = sorted(
        {batch.plan.sites[i].name for i in np.unique(batch.plan.writes.site).tolist()},
        key=lambda name: _STREAM_ORDER.index(name) if name in _STREAM_ORDER else -1,
    )
    values = [PatchValues(runner.points[name], None) for name in names]
    return PackedInput(base, values, {i: i for i in range(batch.n_pairs)})


@dataclass(frozen=True, eq=False)
class _Tables:
    """What joint rows need at one layer besides their `BlockTables`."""

    targets: dict[str, list[JointTargets]]  # site -> where values are written
    row: Tensor | None  # [token] row of the plan; None: no runs are kept


class JointBlocks(PackedBlocks):
    """The packed rows of joint patches at their current block; they continue the runs in `base`.

    `keep`: a cache of the rows' own runs, which is filled in.
    """

    def __init__(
        self,
        runner: PackedRunner,
        batch: JointBatch,
        base: ActivationCache,
        loaded: JointLoaded,
        keep: ActivationCache | None = None,
    ) -> None:
        given = joint_input(runner, batch, base)
        super().__init__(runner.unwrapped, batch, given)
        self.batch, self.keep = batch, keep
        self.writes = JointWrites(batch, given, loaded)
        self.made: dict[int, _Tables] = {}  # by layer, before the first block runs

    def run(self) -> Tensor:
        """Return the final residuals `[token, d_model]` of all rows."""
        packings = list(pack(self.batch))
        tables = make_tables(self.batch, self.given, packings)
        self._make_tables(packings)
        return self.run_through(tables)

    def enter(self, tables: BlockTables, carried: Tensor | None) -> Tensor:
        """See `PackedBlocks`."""
        hidden = super().enter(tables, carried)
        if self.keep is not None:
            self._keep_tokens(self.keep.resid, hidden)
        return hidden

    def attended(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """See `PackedBlocks`."""
        if self.keep is not None:
            self._keep_tokens([x.transpose(1, 2) for x in self.keep.keys], k)
            self._keep_tokens([x.transpose(1, 2) for x in self.keep.values], v)
            if "rot_q" in self.keep.sites:
                self._keep_tokens(self.keep.sites["rot_q"], q.flatten(1))
        return super().attended(layer, q, k, v, settings)

    def _keep_tokens(self, kept: Sequence[Tensor], x: Tensor) -> None:
        """Write `x` `[token, ...]` into this layer of `kept`, `[row, pos, ...]` each."""
        into = kept[self.tables.layer]
        into[self.made[self.tables.layer].row, self.tables.token_pos] = x.to(into)

    def write(self, x: Tensor, *sites: str) -> None:
        """Write the patches at `sites` into `x` `[.., token, width]`, in place."""
        self.writes.write(x, self.tables.layer, self.made[self.tables.layer].targets, sites)

    def _make_tables(self, packings: Sequence[Packing]) -> None:
        """Make the tables of all blocks and move them in one copy a device."""
        devices = self.given.base.devices
        moves: dict[torch.device, Moves] = defaultdict(Moves)
        for packing in packings:
            layer, row = packing.layer, None
            before = -self.batch.plan.first[self.batch.patch, layer]
            before[packing.rows] += packing.offsets[:-1]

            def token(row: Ints, pos: Ints, before: Ints = before) -> Ints:
                at: Ints = before[row] + pos
                return at

            if self.keep is not None:
                counts = np.diff(packing.offsets)
                row = on_cpu(np.repeat(self.batch.patch[packing.rows], counts))
            self.made[layer] = _Tables(self.writes.at(layer, token), row)
            moves[devices[layer]].add(self.made[layer])
        for device, to_device in moves.items():
            to_device.start(device)
        self.made = {layer: moves[devices[layer]].there(x) for layer, x in self.made.items()}


def check_patterns(plan: JointPlan) -> None:
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
