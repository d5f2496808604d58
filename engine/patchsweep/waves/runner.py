"""`WaveRunner`: captures a batch, sends waves of patches through, reads the metrics."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.batch import Batch
from patchsweep.errors import ModelError
from patchsweep.interventions import Custom, Intervention, Spans, values_of
from patchsweep.memory import is_out_of_memory
from patchsweep.metrics import Logits, Metric, Sum, compute
from patchsweep.planner import Column, Ints, PatchSet, Plan, SitePlan
from patchsweep.sites import Site
from patchsweep.waves.arguments import dry_run
from patchsweep.waves.budget import default_cache, default_max_tokens, keep_wave_memory
from patchsweep.waves.cache import Budget, Shelf
from patchsweep.waves.capture import Run, capture, check_attention_sites, embed_to_stream
from patchsweep.waves.locate import SitePoint, locate
from patchsweep.waves.precision import use_bf16_products
from patchsweep.waves.readout import Readout
from patchsweep.waves.replay import Donors, WaveInput, run_wave
from patchsweep.waves.replica import Replica, Unsupported
from patchsweep.waves.schedule import Wave, make_waves

log = logging.getLogger("patchsweep")
Precision = Literal["model", "bf16"]


@dataclass
class Loaded:
    """A batch, captured."""

    batch: Batch
    base: Run
    donors: dict[str, Sequence[Tensor]]  # site -> per layer of writing [pair, pos, width]
    base_resid: Float[Tensor, "pair read d_model"]  # final residuals
    source_resid: Float[Tensor, "pair read d_model"]
    _logits: dict[str, Tensor] = field(default_factory=dict)  # of base and source, on demand


class WaveRunner:
    """Patches in packed waves of at most `max_tokens` tokens (None: what suits the machine).

    Activations of the present batches stay in memory up to `cache_budget` bytes (None: a share of
    what is free); what exceeds it lies in memory-mapped files, see `cache`.
    Exact in the model's own precision, or in `compute_dtype`, to which weights of 16 bits are cast
    block by block; `precision="bf16"` multiplies in bf16 (see `precision`).

    Raises:
        Unsupported: the model or one of `sites` cannot be run this way.
    """

    name = "wave"
    joins = True

    def __init__(
        self,
        bridge: TransformerBridge,
        sites: Sequence[Site],
        max_tokens: int | None = None,
        precision: Precision = "model",
        cache_budget: int | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        keep_wave_memory(bridge)
        self.replica = Replica(bridge, compute_dtype)
        if precision == "bf16":
            # in the dtype that they rest in, or cast once
            self.replica.cast_no_weights_of(use_bf16_products(self.replica.blocks))
        self.points: dict[str, SitePoint] = {s.name: locate(self.replica, s) for s in sites}
        check_attention_sites(self.replica, [*self.points.values()])
        self.readout = Readout(self.replica)
        self.max_tokens = default_max_tokens(bridge) if max_tokens is None else max_tokens
        self.budget = Budget(default_cache(bridge) if cache_budget is None else cache_budget)

    def check(self, plans: Sequence[SitePlan]) -> None:
        """See that the patches of `plans` can be run in waves, prompts of every length.

        Raises:
            Unsupported: attention patterns of several layers at once. A pattern is patched as the
                z that it makes of the base run's values; behind another patch the values differ.
                Or the longest prompts have a mask that shorter ones do not have.
        """
        dry_run(self.replica, 1, max(int(plan.full_lengths.max()) for plan in plans))
        for plan in plans:
            if plan.site.is_pattern and any(len(layers) > 1 for layers in plan.axes.layers):
                raise Unsupported(f"{plan.site.name} is patched in several layers at once")

    def activations(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        """See `Runner`."""
        run = capture(self.replica, tokens, list(self.points.values()))
        return {name: run.layers_of(name) for name in self.points}

    def load(self, batch: Batch, intervention: Intervention) -> Loaded:
        """See `Runner`. One forward pass over all base and source prompts."""
        n = len(batch.base)
        both = capture(
            self.replica,
            torch.cat([batch.base, batch.source]),
            list(self.points.values()),
            Shelf(self.budget),
        )
        base, source = both.half(slice(0, n)), both.half(slice(n, 2 * n))
        _check_finite(base, "base", batch)
        _check_finite(source, "source", batch)
        reads = list(batch.reads)
        return Loaded(
            batch=batch,
            base=base,
            donors={
                name: self._values(point, intervention, base, source, batch.spans)
                for name, point in self.points.items()
            },
            base_resid=base.resid[-1][:, reads].to(base.devices[-1]),
            source_resid=source.resid[-1][:, reads].to(base.devices[-1]),
        )

    def references(
        self, loaded: Loaded, metrics: Sequence[Metric]
    ) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """See `Runner`."""
        pair = torch.arange(len(loaded.batch.base), device=loaded.base_resid.device)
        return (
            self._metrics(loaded, loaded.base_resid, pair, metrics),
            self._metrics(loaded, loaded.source_resid, pair, metrics),
        )

    def run(
        self, loaded: Loaded, plan: SitePlan, patches: Ints, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric patch"]:
        """See `Runner`."""
        return self.run_together(loaded, [PatchSet(plan, patches)], metrics)[0]

    def run_together(
        self,
        loaded: Loaded,
        sets: Sequence[PatchSet],
        metrics: Sequence[Metric],
        null: Sequence[PatchSet] = (),
    ) -> list[Float[Tensor, "metric patch"]]:
        """See `Runner`; all sets share waves.

        `null`: sets, told of after the others, that are patched with the values that are there
        anyway, their last bit turned (see `patchsweep.noise`). What they change is rounding.
        """
        every = (*sets, *null)
        donors = [self._donors(chosen, loaded) for chosen in sets]
        donors += [Donors(self.points[chosen.plan.site.name], None) for chosen in null]
        sizes = [len(chosen.patches) for chosen in every]
        values = torch.empty(len(metrics), sum(sizes), device="cpu")
        given = WaveInput(loaded.base, donors, loaded.batch.local)
        waves = deque(make_waves(every, self.max_tokens))
        while waves:
            wave = waves.popleft()
            try:
                result = self._run_wave(loaded, wave, given, metrics)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(wave.patch) == 1:
                    raise
                # later waves are no larger; nothing that was computed is lost
                self.max_tokens = max(1, wave.n_tokens // 2)
                log.warning("out of memory: waves are halved to %d tokens", self.max_tokens)
                waiting = np.concatenate([w.place for w in (wave, *waves)])
                waves = deque(make_waves(every, self.max_tokens, waiting))
                torch.cuda.empty_cache()  # does nothing without CUDA
                continue
            values[:, wave.place] = result.cpu()
        return list(values.split(sizes, dim=1))

    def _donors(self, chosen: PatchSet, loaded: Loaded) -> Donors:
        """What the patches of `chosen` put in."""
        point = self.points[chosen.plan.site.name]
        values = loaded.donors[point.site.name]
        return Donors(point, values, _cell_rows(chosen.plan, loaded.batch))

    def _run_wave(
        self, loaded: Loaded, wave: Wave, given: WaveInput, metrics: Sequence[Metric]
    ) -> Float[Tensor, "metric row"]:
        local = loaded.batch.local
        hidden = run_wave(self.replica, wave, given)
        device = hidden.device
        pair = torch.tensor([local[p] for p in wave.pair.tolist()], device=device)
        # a row ends with the last position read; positions before its start are the base run's
        end = np.cumsum(wave.length - wave.start)
        resid = loaded.base_resid[pair]
        for i, read in enumerate(loaded.batch.reads):
            inside = np.flatnonzero(wave.start <= read)
            token = end[inside] - (wave.length - read)
            resid[torch.from_numpy(inside).to(device), i] = hidden[
                torch.from_numpy(token).to(device)
            ]
        return self._metrics(loaded, resid, pair, metrics)

    def _metrics(
        self,
        loaded: Loaded,
        resid: Float[Tensor, "row read d_model"],
        pair: Tensor,
        metrics: Sequence[Metric],
    ) -> Float[Tensor, "metric row"]:
        batch = loaded.batch
        n_reads = len(batch.reads)
        targets = torch.stack([batch.answer, batch.wrong], dim=-1).to(resid.device)
        flat = resid.flatten(0, 1)
        sums = sorted({name for metric in metrics for name in metric.sums})
        few = all(metric.needs == "answers" or metric.sums for metric in metrics)
        # every sum makes all logits again, block by block: for two, keeping them costs less
        if few and (not sums or (len(sums) == 1 and self.readout.is_direct(flat))):
            chosen = rearrange(targets[pair], "row read k -> (row read) k")
            logits = self.readout.token_logits(flat, chosen)
            both = rearrange(logits, "(row read) k -> k row read", read=n_reads)
            made = {name: self._sum(name, loaded, flat, pair).view(-1, n_reads) for name in sums}
            return compute(metrics, Logits(both[0], both[1], sums=made))
        references = any(metric.needs == "references" for metric in metrics)
        parts = []
        with self.replica.tail_at_hand():
            for rows in self.readout.chunks(len(resid), n_reads):
                full = self._full(resid[rows])
                chosen = full.gather(2, targets[pair[rows]])
                parts.append(
                    compute(
                        metrics,
                        Logits(
                            chosen[..., 0],
                            chosen[..., 1],
                            full,
                            self._reference(loaded, "base")[pair[rows]] if references else None,
                            self._reference(loaded, "source")[pair[rows]] if references else None,
                        ),
                    )
                )
        return torch.cat(parts, dim=1)

    def _sum(
        self, name: Sum, loaded: Loaded, final: Float[Tensor, "row_read d_model"], pair: Tensor
    ) -> Float[Tensor, " row_read"]:
        base = name.endswith("_base")
        reference = (loaded.base_resid if base else loaded.source_resid).flatten(0, 1)
        n_reads = len(loaded.batch.reads)
        row = pair[:, None] * n_reads + torch.arange(n_reads, device=pair.device)
        return self.readout.sum_over_vocab(name, final, reference, row.flatten())

    def _full(self, resid: Float[Tensor, "row read d_model"]) -> Float[Tensor, "row read d_vocab"]:
        logits = self.readout.logits(resid.flatten(0, 1)).float()
        return rearrange(logits, "(row read) v -> row read v", read=resid.shape[1])

    def _reference(self, loaded: Loaded, which: str) -> Tensor:
        if which not in loaded._logits:
            resid = loaded.base_resid if which == "base" else loaded.source_resid
            loaded._logits[which] = self._full(resid)
        return loaded._logits[which]

    def _values(
        self,
        point: SitePoint,
        intervention: Intervention,
        base: Run,
        source: Run,
        spans: Sequence[Spans],
    ) -> Sequence[Tensor]:
        """The values patched in, at the place where the wave writes them."""
        site = point.site
        if site.name == "result" and isinstance(intervention, Custom):
            # resample, zero and mean commute with W_O; other values need not
            raise Unsupported("custom values of result are no values of z")
        pairs = zip(base.layers_of(site.name), source.layers_of(site.name), strict=True)
        values = []
        for layer, (b, s) in enumerate(pairs):
            value = values_of(intervention, site, layer, b, s, spans)
            # the source's own values lie on its shelf already
            values.append(s if value is s else base.shelf.keep(value.contiguous()))
        if site.name == "resid_post":
            return [values[0], *values]  # written at the next block's input, never at block 0
        if site.name == "embed":
            return [embed_to_stream(self.replica, values[0])]
        if site.name == "pattern_cell":
            return _CellDonors(base.sites[site.name], values, base.values)
        if site.name == "pattern":
            # a patched pattern changes its own token's z alone, so its value is a z
            return [
                base.shelf.keep(_attend(pattern, v))
                for pattern, v in zip(values, base.values, strict=True)
            ]
        return values


def _check_finite(run: Run, name: str, batch: Batch) -> None:
    """Raises ModelError where a run's residual stream first holds NaN or infinity."""
    if bool(torch.isfinite(run.resid[-1]).all()):
        return  # nothing that is not finite leaves a stream that blocks only add to
    for layer, resid in enumerate(run.resid):
        if not bool(torch.isfinite(resid).all()):
            row, pos = torch.nonzero(~torch.isfinite(resid).all(dim=-1))[0].tolist()
            place = "the final residual" if layer == len(run.calls) else f"block {layer}'s input"
            raise ModelError(
                f"the {name} run of pair {batch.pairs[row]} holds NaN or infinity, first in "
                f"{place} at position {pos}; check the weights, or load the model in float32 "
                "or bfloat16 if float16 overflows"
            )


class _CellDonors(Sequence[Tensor]):
    """Per layer `[cell, width]`: z of a token in which one cell (dest, src) of the pattern is new.

    Cells are in the order pair, dest, src. A layer's are made when they are asked for: all
    layers' would be `[layer, pos, pos, width]`.
    """

    def __init__(self, base: list[Tensor], new: list[Tensor], values: list[Tensor]) -> None:
        self._base, self._new, self._values = base, new, values

    def __len__(self) -> int:
        return len(self._base)

    def __getitem__(self, layer: Any) -> Any:
        v = self._values[layer]
        z = _attend(self._base[layer], v)
        groups = self._base[layer].shape[1] // v.shape[1]
        v = repeat(v, "pair kv src d -> pair (kv g) src d", g=groups)
        change = (self._new[layer] - self._base[layer]).to(v)
        change = einsum(change, v, "pair head dest src, pair head src d -> pair dest src head d")
        rows = rearrange(change, "pair dest src head d -> pair dest src (head d)") + z[:, :, None]
        return rows.flatten(0, 2)


def _cell_rows(plan: Plan, batch: Batch) -> Column | None:
    """[patch] the row of `_CellDonors` that it takes; None for sites other than pattern_cell."""
    if not plan.axes.n_sources:
        return None
    local = np.array([batch.local.get(pair, 0) for pair in range(plan.shape[0])])

    def of(patches: Ints) -> Ints:
        cells = plan.cells(patches)
        # sources past the end of a shorter prompt are dead, so their rows are never asked for
        source = cells.unit_set % plan.axes.n_sources
        return (local[cells.pair] * batch.length + cells.start) * batch.length + source

    return Column(of)


def _attend(
    pattern: Float[Tensor, "pair head dest src"], v: Float[Tensor, "pair kv_head src d"]
) -> Float[Tensor, "pair dest width"]:
    groups = pattern.shape[1] // v.shape[1]
    v = repeat(v, "pair kv src d -> pair (kv g) src d", g=groups)
    return rearrange(pattern.to(v) @ v, "pair head dest d -> pair dest (head d)")
