"""The hooked runner: full batched forward passes through the bridge, patched by its hooks.

Slower than packed batches, but correct for every model that the bridge supports. It is also the
reference for the packed runner's self-test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.forward.casting import cast_while
from patchsweep.models.arithmetic import last_bit_turned
from patchsweep.models.quantised import check_hooks
from patchsweep.runners.base import Runner
from patchsweep.runners.hook_points import (
    Hook,
    by_setting,
    check_names,
    forward,
    hooks_of,
    keeping,
    refusals,
    refused,
    write_units,
    writing,
)
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention, values_of
from patchsweep.spec.metrics import Logits, Metric, compute
from patchsweep.spec.plan import Ints, PatchSet, Plan
from patchsweep.spec.sites import Site
from patchsweep.spec.spec import model_shape

# the logits of one batched forward pass stay within this many bytes
LOGIT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Loaded:
    """A batch with its patch values and unpatched logits."""

    batch: Batch
    # patch values: site -> per layer [pair, pos, width] (pattern: [pair, head, dest, src])
    patch_values: dict[str, list[Tensor]]
    base_logits: Float[Tensor, "pair read d_vocab"]
    source_logits: Float[Tensor, "pair read d_vocab"]


class _Write(NamedTuple):
    """The part of a forward pass that one patch replaces."""

    row: int  # row of the forward pass
    pair: int  # row of the batch with the patch values
    unit_set: int
    span: slice  # positions


class HookedRunner(Runner):
    """Runs exact patches by hooks: each row of a forward pass is one patch.

    16-bit weights are cast to `compute_dtype` (None: the model's own), each block's while it runs.

    Raises:
        SiteError: the model has no hook for one of `sites`, or lacks the setting that it needs.
        ConfigError: the bridge cannot run the model.
    """

    name = "hooked"
    joins = False

    def __init__(
        self,
        bridge: TransformerBridge,
        sites: Sequence[Site],
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        check_hooks(bridge)
        self.bridge = bridge
        self.compute_dtype = bridge.cfg.dtype if compute_dtype is None else compute_dtype
        self.sites = tuple(sites)
        self.shape = model_shape(bridge)
        check_names(bridge, sites)
        self._groups = by_setting(bridge, sites)  # sites of a group share forward passes

    def check(self, tokens: Tensor) -> None:
        """Check that patches at the sites work in this model.

        Raises:
            SiteError: a hook does not fire once per pass on `[batch, pos, ...]`, or a new value at
                it changes no logit.
        """
        with cast_while(self.bridge, self.compute_dtype):
            for site, reason in refusals(self.bridge, self.sites, self.shape, tokens).items():
                raise refused(site, reason)

    @torch.no_grad()
    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """See `Runner`."""
        self.check(tokens)
        return self._run(tokens)[1]

    def source(self, batch: Batch) -> dict[str, list[Tensor]]:
        """Return the source run's activations by site and layer, at the base run's positions."""
        return _at_base(batch, self.activations(batch.source))

    def rows_of(self, length: int) -> int:
        """Return how many prompts of that length have logits within `LOGIT_BYTES`."""
        return max(1, LOGIT_BYTES // (4 * length * self.bridge.cfg.d_vocab))

    def _run(
        self, tokens: Tensor, reads: Sequence[int] = ()
    ) -> tuple[Float[Tensor, "row read d_vocab"], dict[str, list[Tensor]]]:
        """Return fp32 logits at `reads` and the sites' activations; runs some prompts at a time."""
        logits: list[Tensor] = []
        kept: dict[str, list[Tensor]] = defaultdict(list)
        for prompts in tokens.split(self.rows_of(tokens.shape[1])):
            for i, group in enumerate(self._groups):
                # sites may share a hook, as pattern and pattern_cell do
                names = dict.fromkeys(n for site in group for n in hooks_of(self.bridge, site))
                seen, hooks = keeping(names)
                with cast_while(self.bridge, self.compute_dtype):
                    output = forward(self.bridge, prompts, (), hooks)
                for name, x in seen.items():
                    kept[name].append(x)
                if not i:
                    logits.append(output[:, list(reads)].float())
        activations = {}
        for site in self.sites:
            layers = [torch.cat(kept[name]) for name in hooks_of(self.bridge, site)]
            if not site.is_pattern:
                layers = [x.reshape(*tokens.shape, -1) for x in layers]
            activations[site.name] = layers
        return torch.cat(logits), activations

    @torch.no_grad()
    def load(self, batch: Batch, intervention: Intervention) -> Loaded:
        """See `Runner`."""
        self.check(batch.base)
        base_logits, base, source_logits, source = self._base_and_source(batch)
        return Loaded(
            batch=batch,
            patch_values={
                site.name: [
                    values_of(intervention, site, layer, b, s, batch.spans)
                    for layer, (b, s) in enumerate(
                        zip(base[site.name], source[site.name], strict=True)
                    )
                ]
                for site in self.sites
            },
            base_logits=base_logits,
            source_logits=source_logits,
        )

    def _base_and_source(
        self, batch: Batch
    ) -> tuple[Tensor, dict[str, list[Tensor]], Tensor, dict[str, list[Tensor]]]:
        """Return logits and activations of base and source runs, at the base run's positions."""
        if batch.partner is not None:
            base_logits, base = self._run(batch.base, batch.reads)
            source_logits, source = self._run(batch.source, batch.source_reads)
            return base_logits, base, source_logits, _at_base(batch, source)
        n = len(batch.base)
        logits, both = self._run(torch.cat([batch.base, batch.source]), batch.reads)
        base, source = (
            {name: [x[rows] for x in xs] for name, xs in both.items()}
            for rows in (slice(n), slice(n, None))
        )
        return logits[:n], base, logits[n:], source

    def references(
        self, loaded: Loaded, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """See `Runner`."""
        pair = torch.arange(len(loaded.batch.base), device=loaded.base_logits.device)
        return (
            self.metrics_of(loaded, loaded.base_logits, pair, metrics),
            self.metrics_of(loaded, loaded.source_logits, pair, metrics),
        )

    @torch.no_grad()
    def run_together(
        self,
        loaded: Loaded,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> list[Float[Tensor, "metric patch"]]:
        """See `Runner`; each row of a forward pass is one patch of any site and layer."""
        n_sets = len(sets)
        sets = (*sets, *null)
        sizes = [len(patch_set.patches) for patch_set in sets]
        set_of = np.repeat(np.arange(len(sets)), sizes)  # [patch of all sets] index of its set
        patch = np.concatenate([patch_set.patches for patch_set in sets])
        values = torch.empty(len(metrics), len(patch), device="cpu")
        size = self.rows_of(loaded.batch.length)
        for group in self._groups:
            members = [i for i, patch_set in enumerate(sets) if patch_set.plan.site in group]
            rows = np.flatnonzero(np.isin(set_of, members))
            for first in range(0, len(rows), size):
                part = rows[first : first + size]
                values[:, part] = self._run_part(
                    loaded, sets, n_sets, set_of[part], patch[part], metrics
                )
        return list(values.split(sizes, dim=1))

    def _run_part(
        self,
        loaded: Loaded,
        sets: Sequence[PatchSet],
        n_sets: int,
        which: Ints,
        patch: Ints,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        """Run one forward pass whose row i is patch `patch[i]` of the set `which[i]`.

        Sets from `n_sets` on are identity patches.
        """
        local = loaded.batch.local
        hooks: list[Hook] = []
        pair = np.empty(len(patch), dtype=np.int64)  # row of the batch
        for i in np.unique(which).tolist():
            rows = np.flatnonzero(which == i)
            plan, patches = sets[i].plan, patch[rows]
            pair[rows] = [local[p] for p in plan.pair[patches].tolist()]
            values = loaded.patch_values[plan.site.name]
            hooks += self.patch_hooks(loaded.batch, values, plan, patches, rows, null=i >= n_sets)
        return self.run_rows(loaded, pair, hooks, metrics)

    def run_rows(
        self, loaded: Loaded, pair: Ints, hooks: Sequence[Hook], metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric row"]:
        """Return the metrics of one forward pass under `hooks`; row i is of `pair[i]`."""
        batch = loaded.batch
        index = torch.from_numpy(pair).to(batch.base.device)
        with cast_while(self.bridge, self.compute_dtype):
            logits = forward(self.bridge, batch.base[index], hooks)
        read = logits[:, list(batch.reads)].float()
        return self.metrics_of(loaded, read, index, metrics).cpu()

    def patch_hooks(
        self,
        batch: Batch,
        values: Sequence[Tensor],
        plan: Plan,
        patches: Ints,
        rows: Ints,
        *,
        null: bool = False,
    ) -> list[Hook]:
        """Return hooks that write patch `patches[i]` of `plan` into row `rows[i]` of a pass.

        `values`: patch values of the batch's pairs, per layer; with `null`, patches write back what
        they find.
        """
        local = batch.local
        by_layer: dict[int, list[_Write]] = {}
        cells = zip(rows.tolist(), *(x.tolist() for x in plan.cells(patches)), strict=True)
        for row, pair, layer_set, unit_set, start, stop in cells:
            write = _Write(row, local[pair], unit_set, slice(start, stop))
            for layer in plan.axes.layers[layer_set]:
                by_layer.setdefault(layer, []).append(write)
        return [
            writing(plan.site.hook_name(layer), self._write(values[layer], plan, written, null))
            for layer, written in by_layer.items()
        ]

    def _write(
        self, values: Tensor, plan: Plan, written: Sequence[_Write], null: bool
    ) -> Callable[[Tensor], None]:
        """Return a function that writes the patches `written` into a site's tensor, in place."""
        units, is_pattern = plan.axes.units, plan.site.is_pattern
        n_units = 1 if units is None else self.shape.n_units(plan.site)

        def write(x: Tensor) -> None:
            for row, pair, unit_set, span in written:
                unit_index = slice(None) if units is None else list(units[unit_set])
                new = last_bit_turned(x[row]) if null else values[pair].to(x)
                if new.ndim > 2 and not is_pattern:
                    new = new.flatten(1)
                if plan.axes.n_sources:
                    src = unit_set % plan.axes.n_sources
                    x[row, unit_index, span, src] = new[unit_index, span, src]
                elif is_pattern:
                    x[row, unit_index, span] = new[unit_index, span]
                else:
                    write_units(x, row, new, span, unit_index, n_units)

        return write

    def metrics_of(
        self,
        loaded: Loaded,
        full: Float[Tensor, "row read d_vocab"],
        pair: Tensor,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        """Return the metrics of rows with the logits `full`; row i is of `pair[i]`."""
        batch = loaded.batch
        answer = full.gather(2, batch.answer[pair].unsqueeze(-1)).squeeze(-1)
        wrong = full.gather(2, batch.wrong[pair].unsqueeze(-1)).squeeze(-1)
        base, source = loaded.base_logits[pair], loaded.source_logits[pair]
        return compute(metrics, Logits(answer, wrong, full, base, source))


def _at_base(batch: Batch, activations: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """Return a source run's activations at the base run's positions."""
    return {name: [batch.at_base(x) for x in layers] for name, layers in activations.items()}
