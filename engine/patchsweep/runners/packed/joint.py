"""Joint patches in packed batches: a row writes several vectors, at several layers.

A row enters at its lowest write and its first position, reads the base run's keys and values before
that, and grows where a higher layer is written at an earlier position. Rows that have their lowest
layer's writes in common share the run up to where they part: it runs once, its block inputs, keys
and values are kept, and the rows continue it as others continue the base run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from patchsweep_kernels.scatter import scatter_patch
from torch import Tensor

from patchsweep.forward.block_args import first_of
from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.memory import is_out_of_memory
from patchsweep.runners.packed.forward import PackedBlocks
from patchsweep.runners.packed.joint_batch import JointBatch, joint_batches
from patchsweep.runners.packed.packing import Packing
from patchsweep.runners.packed.runner import Loaded, PackedRunner
from patchsweep.runners.packed.tables import PackedInput, PatchValues, make_tables, n_units
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
        pair = torch.from_numpy(plan.pair)
        kept = ActivationCache(
            shape=(plan.n_rows, base.shape[1]),
            devices=base.devices,
            resid=[
                x[pair.to(x.device)].to(d) for x, d in zip(base.resid, base.devices, strict=True)
            ],
            keys=[
                x[pair.to(x.device)].to(d) for x, d in zip(base.keys, base.devices, strict=False)
            ],
            values=[
                x[pair.to(x.device)].to(d) for x, d in zip(base.values, base.devices, strict=False)
            ],
            heads=base.heads,
            calls=base.calls,
        )
        for rows in joint_batches(plan, self.runner.max_tokens):
            batch = JointBatch.of(plan, rows)
            hidden = self._blocks(loaded, batch, base, plan.pair[:0], kept)
            row, pos = batch.final_tokens()
            last = kept.resid[-1]
            last[_index(rows[row], last), _index(pos, last)] = hidden
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
            values[:, rows] = result.cpu()
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
        resid = last[_index(plan.base[rows], hidden)][:, reads]
        first = plan.first[rows, -1]
        end = np.cumsum(plan.length - first)
        for i, read in enumerate(reads):
            inside = np.flatnonzero(first <= read)
            token = end[inside] - (plan.length - read)
            resid[_index(inside, hidden), i] = hidden[_index(token, hidden)]
        pair = _index(plan.pair[rows], hidden)
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
        self.pair_of_base = torch.from_numpy(pair_of_base)
        names = [site.name for site in batch.plan.sites]
        self.cells: dict[tuple[str, int], dict[int, Ints]] = {}  # site, layer -> value -> writes
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
            for packing in packings:
                self.packing = packing
                self.offsets = np.zeros(len(self.batch.patch), np.int64)
                self.offsets[packing.rows] = packing.offsets[:-1]
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
        tables = self.tables
        pair = self.pair_of_base.to(tables.token_pair.device)[tables.token_pair]
        block_args = self.given.base.calls[layer].at(pair, tables.token_pos)
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
        packing = self.packing
        counts = np.diff(packing.offsets)
        row = np.repeat(self.batch.patch[packing.rows], counts)
        into = kept[packing.layer]
        into[_index(row, into), _index(packing.token_pos, into)] = x.to(into)

    def write(self, x: Tensor, *sites: str) -> None:
        """Write the patches at `sites` into `x` `[.., token, width]`, in place."""
        for name in sites:
            for value, cells in self.cells.get((name, self.packing.layer), {}).items():
                self._write_cells(x, name, value, cells)

    def _write_cells(self, x: Tensor, name: str, value: int, cells: Ints) -> None:
        """Write the values of one intervention at one site: whole vectors, then single heads."""
        batch, layer = self.batch, self.packing.layer
        writes, plan = batch.plan.writes.at(cells), batch.plan
        pos = writes.pos
        token = self.offsets[self.row_of[writes.row]] + pos - plan.first[writes.row, layer]
        flat = x.view(-1, x.shape[-1])
        given = self.loaded.live.get(value)
        if isinstance(given, Numbered):
            met = flat[_index(token, flat)]
            new = met + given.vectors(_table(writes.unit)).to(met)
            scatter_patch(flat, new, _table(token))
            return
        layer_values = self.loaded.values[name, value][layer].to(x)
        length, width = layer_values.shape[-2:]
        source = plan.pair[writes.row] * length + pos
        values = layer_values.reshape(-1, width)
        site = next(site for site in plan.sites if site.name == name)
        live = given if name != "embed" else None
        whole = writes.unit == WHOLE
        for part in (whole, ~whole):
            if not part.any():
                continue
            target, cell, unit = token[part], source[part], writes.unit[part]
            if part is not whole:
                units = n_units(self.given.base, site, layer, x.shape[-1])
                flat = flat.view(len(flat), units, -1)
                values = values.view(len(values) * units, -1)
                cell = cell * units + unit
            head = None if part is whole else _table(unit)
            if live is None:
                scatter_patch(flat, values, _table(target), source=_table(cell), head=head)
                continue
            at = _index(target, flat)
            met = flat[at] if head is None else flat[at, head.to(at.device)]
            new = live.applied(site, layer - site.shift, met, values[_index(cell, values)])
            scatter_patch(flat, new, _table(target), head=head)


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


def _index(array: Ints, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)


def _table(array: Ints) -> Tensor:
    """Return `array` as a CPU tensor, which `scatter_patch` checks without waiting for the GPU."""
    return torch.from_numpy(np.ascontiguousarray(array))
