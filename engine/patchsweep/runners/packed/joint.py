"""Joint patches in packed batches: a row writes several vectors, at several layers.

A row enters at its lowest write and its first position, reads the base run's keys and values before
that, and grows where a higher layer is written at an earlier position. Rows that have their lowest
layer's writes in common share the run up to where they part: it runs once, its block inputs, keys
and values are kept, and the rows continue it as others continue the base run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from patchsweep.runners.packed.joint_batch import JointBatch, joint_batches
from patchsweep.runners.packed.joint_writes import JointLoaded, JointTargets, JointWrites
from patchsweep.runners.packed.packing import Packing
from patchsweep.runners.packed.runner import PackedRunner, read_of
from patchsweep.runners.packed.tables import (
    PackedInput,
    PatchValues,
    make_tables,
)
from patchsweep.spec.batch import Batch
from patchsweep.spec.directions import Live, Numbered
from patchsweep.spec.interventions import Intervention, Resample
from patchsweep.spec.joint import JointPlan, shared_stems
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
        base = loaded.loaded.base
        alone, stems = shared_stems(plan)
        if len(alone):
            values[:, alone] = self._run(loaded, plan.part(alone), base, plan.pair[:0], metrics)
        for stem in stems:
            size = chunk_of(base, len(stem.plan.pair))
            for first in range(0, stem.plan.n_rows, size):
                part = stem.part(range(first, min(first + size, stem.plan.n_rows)))
                kept = self.kept(loaded, part.plan)
                values[:, part.rows] = self._run(loaded, part.rest, kept, part.plan.pair, metrics)
        return values

    @torch.no_grad()
    def kept(self, loaded: JointLoaded, plan: JointPlan) -> ActivationCache:
        """Run the rows of `plan`; return their whole runs as a cache with one prompt a row.

        It holds queries after rotary if the base run's cache does.
        """
        base = loaded.loaded.base
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
            sites={name: of_rows(xs) for name, xs in base.sites.items() if name == "rot_q"},
        )
        for batch in joint_batches(plan, self.runner.max_tokens):
            hidden = self._blocks(loaded, batch, base, plan.pair[:0], kept)
            row, pos = batch.final_tokens()
            last = kept.resid[-1]
            at_rows, at_pos = move_together(map(on_cpu, (batch.patch[row], pos)), last.device)
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
        done = self.runner.run_batches(
            lambda rows: joint_batches(plan, self.runner.max_tokens, rows),
            lambda batch: self._run_rows(loaded, batch, base, pair_of_base, metrics),
        )
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
        resid = read_of(base.resid[-1].to(hidden.device), loaded.loaded.batch.reads)
        run, pair = on_cpu(batch.pair), on_cpu(batch.plan.pair[batch.patch])
        return self.runner.read(loaded.loaded, batch, hidden, resid, run, pair, metrics)

    def _blocks(
        self,
        loaded: JointLoaded,
        batch: JointBatch,
        base: ActivationCache,
        pair_of_base: Ints,
        keep: ActivationCache | None,
    ) -> Tensor:
        """Return the final residuals `[token, d_model]` of a batch's rows, one after the other."""
        given = joint_input(self.runner, batch, base)
        blocks = JointBlocks(self.runner, batch, given, loaded, pair_of_base, keep)
        return blocks.run()


def joint_input(runner: PackedRunner, batch: JointBatch, base: ActivationCache) -> PackedInput:
    """Return the inputs of a batch's rows, which continue the runs in `base`."""
    names = sorted(
        {batch.plan.sites[i].name for i in np.unique(batch.plan.writes.site).tolist()},
        key=lambda name: _STREAM_ORDER.index(name) if name in _STREAM_ORDER else -1,
    )
    values = [PatchValues(runner.points[name], None) for name in names]
    return PackedInput(base, values, {i: i for i in range(batch.n_pairs)})


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
        self.writes = JointWrites(batch, given, loaded)
        # site, layer -> the tables of what is written, made before the first block
        self.targets: dict[tuple[str, int], list[JointTargets]] = {}
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> row and position of each token
        self.pairs: dict[int, Tensor] = {}  # layer -> pair of the captured batch of each token

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

    def captured_pair(self) -> Tensor:
        """See `PackedBlocks`."""
        return self.pairs.get(self.packing.layer, self.tables.token_pair)

    def attended(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """See `PackedBlocks`."""
        if self.keep is not None:
            self._keep_tokens([x.transpose(1, 2) for x in self.keep.keys], k)
            self._keep_tokens([x.transpose(1, 2) for x in self.keep.values], v)
            self._keep_tokens(self.keep.sites.get("rot_q"), q.flatten(1))
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
                self.writes.write(x, name, self.packing.layer, targets)

    def _make_tables(self, packings: Sequence[Packing]) -> None:
        """Make the tables of all blocks and move them in one copy a device."""
        devices = self.given.base.devices
        moves: dict[torch.device, Moves] = defaultdict(Moves)
        on_host: dict[tuple[str, int], list[JointTargets]] = {}
        kept: dict[int, tuple[Tensor, ...]] = {}
        for packing in packings:
            layer, to_device = packing.layer, moves[devices[packing.layer]]
            before = -self.batch.plan.first[self.batch.patch, layer]
            before[packing.rows] += packing.offsets[:-1]
            for name in self.writes.sites_at(layer):

                def token(row: Ints, pos: Ints, before: Ints = before) -> Ints:
                    at: Ints = before[row] + pos
                    return at

                on_host[name, layer] = [*self.writes.targets(name, layer, token)]
                to_device.add(on_host[name, layer])
            rows: list[Ints] = []
            if self.keep is not None:
                counts = np.diff(packing.offsets)
                rows = [np.repeat(self.batch.patch[packing.rows], counts), packing.token_pos]
            if len(self.pair_of_base):
                rows.append(self.pair_of_base[packing.token_pair])
            kept[layer] = tuple(map(on_cpu, rows))
            to_device.add(kept[layer])
        for device, to_device in moves.items():
            to_device.start(device)
        for (name, layer), made in on_host.items():
            self.targets[name, layer] = moves[devices[layer]].there(made)
        for layer, tables in kept.items():
            moved = moves[devices[layer]].there(tables)
            if self.keep is not None:
                self.kept[layer] = (moved[0], moved[1])
            if len(self.pair_of_base):
                self.pairs[layer] = moved[-1]


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


def chunk_of(base: ActivationCache, n_rows: int) -> int:
    """Return how many kept runs fit `STEM_BYTES`."""
    one = sum(x[:1].numel() * x.element_size() for x in (*base.resid, *base.keys, *base.values))
    return max(1, min(n_rows, STEM_BYTES // one))
