"""Cells within a tolerance: what a patch changes is run, the rest is taken to first order."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.ActivationCache import ActivationCache
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attribution.base_gradients import STREAM
from patchsweep.errors import ConfigError
from patchsweep.forward.grad import GradientModel, Gradients
from patchsweep.results.tolerance import in_units
from patchsweep.runners.packed.adaptive import AdaptiveBlocks, Thresholds
from patchsweep.runners.packed.adaptive_runner import room_of, run_in_parts
from patchsweep.runners.packed.schedule import make_packed_batches
from patchsweep.spec.plan import Bools, Ints, PatchSet
from patchsweep.spec.sites import SITES
from patchsweep.sweeps.calibration import EXACTLY, Level, Part, Ran, calibrate, n_each
from patchsweep.transformer_lens.gradients import Metric, base_gradients
from patchsweep.transformer_lens.packed import (
    MAX_TOKENS,
    PackedCells,
    PrecomputedModel,
    Written,
    groups,
)

log = logging.getLogger("patchsweep")

ROWS = 1024  # of one batch
LINEARLY = (math.inf, math.inf)

# what is written over the base run's logits, and what is added to the metrics, `[metric, prompt]`
Patched = tuple[list[Written], Tensor]


class AdaptiveCells:
    """Runs cells of `exact` within thresholds.

    `reads` `[prompt, pos]` says which logits the metrics read; `tolerance` is in their units.
    """

    def __init__(
        self,
        exact: PackedCells,
        gradients: Gradients,
        reads: Bools,
        tolerance: Float[Tensor, "metric prompt"],
    ) -> None:
        self.exact, self.gradients, self.tolerance = exact, gradients, tolerance
        length = int(np.flatnonzero(reads.any(axis=0)).max()) + 1
        self.plan = replace(exact.plan, lengths=np.full(len(reads), length), reads=reads)
        matters = exact.rows.start < length
        self._rows = [
            np.flatnonzero(matters[rows]) + rows.start
            for rows in map(exact.rows.of, range(len(exact.cells)))
        ]
        self.live = np.flatnonzero([len(rows) > 0 for rows in self._rows])  # cells

    def patched(self, cells: Sequence[int], levels: Sequence[Level]) -> Iterator[Patched]:
        """Yield each of `cells`, run at its level."""
        for group in groups([len(self._rows[cell]) for cell in cells], ROWS):
            rows = [self._rows[cells[i]] for i in group]
            sizes = [len(x) for x in rows]
            level = np.repeat(np.array([levels[i] for i in group]), sizes, axis=0)
            yield from self._of_group(np.concatenate(rows), level, np.cumsum([0, *sizes]))

    def sizes(self, cells: Ints) -> NDArray[np.float32]:
        """Return the sizes of the first-order effects `[metric, cell]`, summed over prompts.

        Each row runs its first block, and all that it changes there is taken to first order.
        """
        rows = np.concatenate([self._rows[cell] for cell in cells])
        cell = np.repeat(np.arange(len(cells)), [len(self._rows[cell]) for cell in cells])
        parts = []
        for part in np.array_split(np.arange(len(rows)), -(-len(rows) // ROWS)):
            row, pos, resid, linear = self._run(rows[part], np.full((len(part), 2), math.inf))
            prompt = self._prompts(rows[part])[row]
            change = resid - self.exact.run.resid[-1].to(resid)[prompt, pos]
            last = self.gradients.stream[-1].to(resid)[:, prompt, pos]
            linear.index_add_(1, row, torch.einsum("tc,mtc->mt", change, last))
            parts.append(linear.abs())
        linear = torch.cat(parts, dim=1)
        totals = linear.new_zeros(len(linear), len(cells))
        totals.index_add_(1, torch.from_numpy(cell).to(linear.device), linear)
        return totals.cpu().numpy()

    @torch.no_grad()
    def _of_group(self, rows: Ints, level: NDArray[np.float64], first: Ints) -> Iterator[Patched]:
        """Yield cells; cell i has `rows[first[i] : first[i + 1]]`."""
        row, pos, resid, linear = self._run(rows, level)
        prompt = self._prompts(rows)
        ends = torch.searchsorted(row, torch.from_numpy(first).to(row)).tolist()
        for part in groups(np.diff(ends).tolist(), self.exact.unembed.chunk_rows()):
            low, high = ends[part[0]], ends[part[-1] + 1]
            logits = self.exact.unembed.logits(resid[low:high]) if high > low else resid[:0]
            for i in part:
                tokens = slice(ends[i], ends[i + 1])
                where = prompt[row[tokens]], pos[tokens]
                own = slice(int(first[i]), int(first[i + 1]))
                of_prompts = linear.new_zeros(len(linear), len(self.plan.lengths))
                of_prompts.index_add_(1, prompt[own], linear[:, own])
                written = [(where, logits[ends[i] - low : ends[i + 1] - low])]
                yield written if ends[i + 1] > ends[i] else [], of_prompts

    @torch.no_grad()
    def _run(self, rows: Ints, level: NDArray[np.float64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return row, position and final residual of each awake token, and the linear parts.

        Tokens are sorted by row, an index into `rows`; linear parts are `[metric, row]`.
        """
        theta_of, tau_of = torch.from_numpy(level).float().to(self.tolerance.device).unbind(1)
        theta = theta_of * self.tolerance[:, self._prompts(rows)]
        linear = torch.zeros_like(theta)
        base = self.exact.run.resid[-1]
        none = torch.zeros(0, dtype=torch.int64, device=base.device)
        parts = [(none, none, base.new_zeros(0, base.shape[-1]))]
        packed_input = self.exact.packed_input(rows)

        def run(places: Ints) -> None:
            (packed,) = make_packed_batches(
                [PatchSet(self.plan, rows)], np.iinfo(np.int64).max, places
            )
            place = torch.from_numpy(packed.place).to(theta.device)
            blocks = AdaptiveBlocks(
                self.exact.unwrapped,
                packed,
                packed_input,
                self.gradients,
                Thresholds(theta[:, place], tau_of[place]),
            )
            ran = blocks.run(MAX_TOKENS, room_of(MAX_TOKENS, packed))
            linear[:, place] = ran.linear
            parts.append((place[ran.row], ran.pos, ran.resid))

        run_in_parts(np.arange(len(rows)), len(rows), run)
        row, pos, resid = (torch.cat(x) for x in zip(*parts, strict=True))
        order = torch.argsort(row, stable=True)
        return row[order], pos[order], resid[order], linear

    def _prompts(self, rows: Ints) -> Tensor:
        return torch.from_numpy(self.exact.rows.prompt[rows]).to(self.tolerance.device)


class AdaptiveModel(PrecomputedModel):
    """A model that knows the logits of all cells within a tolerance; `metrics` add what they lack.

    `level` holds the thresholds; None: none kept the tolerance on a sample, so all cells run
    exactly.
    """

    def __init__(
        self,
        model: TransformerBridge,
        base: Tensor,
        cells: AdaptiveCells,
        metrics: Mapping[str, Metric],
    ) -> None:
        super().__init__(model, base, self._cells(cells))
        self.linear = torch.zeros_like(cells.tolerance)  # of the cell that ran last
        self._base_values = [
            torch.as_tensor(metric(base.clone())).detach() for metric in metrics.values()
        ]
        self.metrics = {
            name: self._with_linear(i, metric) for i, (name, metric) in enumerate(metrics.items())
        }
        self.level, self.n_sample = self._calibrate(cells)

    def _cells(self, cells: AdaptiveCells) -> Iterator[list[Written]]:
        cells_of_sweep = range(len(cells.exact.cells))
        if self.level is None:
            yield from cells.exact.written(cells_of_sweep)
            return
        for written, linear in cells.patched(cells_of_sweep, [self.level] * len(cells_of_sweep)):
            self.linear = linear
            yield written

    def patched(self, written: Sequence[Written]) -> Tensor:
        """Return the base run's logits with `written` over them; the base run's own for none."""
        return super().patched(written) if written else self._base

    def _with_linear(self, number: int, metric: Metric) -> Metric:
        def corrected(logits: Tensor) -> Tensor:
            # most cells write nothing: their metric is known, and needs no copy of all logits
            known = logits is self._base
            value = self._base_values[number] if known else torch.as_tensor(metric(logits))
            linear = self.linear[number]
            return value + (linear if value.ndim else linear.sum()).to(value)

        return corrected

    def _calibrate(self, cells: AdaptiveCells) -> tuple[Level | None, int]:
        """Return the loosest level whose errors on a sample are within the tolerance."""
        if not len(cells.live):
            return LINEARLY, 0
        n = n_each(len(cells.live), 1)
        sizes = cells.sizes(cells.live).max(axis=0)
        largest = cells.live[np.argsort(-sizes, kind="stable")[:n]]
        random = np.random.default_rng(0).choice(cells.live, min(n, len(cells.live)), replace=False)
        sample = np.unique(np.concatenate([largest, random])).tolist()
        zero = torch.zeros_like(self.linear)
        exact = self._values((written, zero) for written in cells.exact.written(sample))
        n_numbers = len(exact) // len(self.metrics)  # one, or one a prompt
        tolerance = cells.tolerance[:, :n_numbers].reshape(-1, 1).cpu().numpy()
        part = Part(None, sample, np.array(sample), exact, exact, tolerance, token_layers=0)

        def run(_: Any, chosen: Sequence[list[int]], levels: Sequence[Level]) -> list[Ran]:
            of_each = [level for level in levels for _ in sample]
            values = self._values(cells.patched(sample * len(levels), of_each))
            nothing = np.zeros(len(sample), np.int64)
            return [(x, x, nothing) for x in np.split(values, len(levels), axis=1)]

        found = calibrate({"cells": [part]}, run)["cells"]
        if found.level == EXACTLY:
            return None, len(sample)
        log.info(
            "on a sample of %d cells run both ways the largest error is %.2g",
            len(sample),
            np.abs(found.error).max(),
        )
        return found.level, len(sample)

    @torch.no_grad()
    def _values(self, cells: Iterator[Patched]) -> Float[NDArray[np.float32], "number cell"]:
        """Return the metrics of cells, of each metric one number or one for each prompt."""
        values = []
        for written, linear in cells:
            self.linear, logits = linear, self.patched(written)
            values.append(torch.cat([f(logits).float().reshape(-1) for f in self.metrics.values()]))
        self.linear = torch.zeros_like(self.linear)
        return torch.stack(values, dim=1).cpu().numpy()


def within(
    tolerance: float | str,
    model: TransformerBridge,
    tokens: Tensor,
    clean_cache: ActivationCache,
    base: Float[Tensor, "prompt pos d_vocab"],
    exact: PackedCells,
    metrics: Mapping[str, Metric],
) -> AdaptiveModel:
    """Return a model that knows the logits of all cells of `exact` within `tolerance`.

    Raises:
        ConfigError: a metric has no gradient at the base run, or a share needs the clean run's
            metric and `clean_cache` does not hold the last residual.
    """
    with torch.inference_mode(False):
        own = GradientModel(model, (), STREAM, tokens.shape[1], unwrapped=exact.unwrapped)
        gradients, reads = base_gradients(tolerance, metrics, own, tokens.clone())
    with torch.no_grad():
        of_base = of_clean = _all(metrics, base)
        if isinstance(tolerance, str):
            of_clean = _all(metrics, _clean_logits(tolerance, exact, clean_cache, base))
    allowed = torch.from_numpy(in_units(tolerance, of_base, of_clean)).to(base.device)
    cells = AdaptiveCells(exact, gradients, reads.cpu().numpy(), allowed.expand(-1, len(base)))
    return AdaptiveModel(model, base, cells, metrics)


def _all(metrics: Mapping[str, Metric], logits: Tensor) -> NDArray[np.float32]:
    """Return the metrics `[metric, prompt]`; those of one number have one prompt."""
    values = [torch.as_tensor(metric(logits.clone())).reshape(-1) for metric in metrics.values()]
    return torch.stack(values).float().cpu().numpy()


def _clean_logits(
    tolerance: str, exact: PackedCells, cache: ActivationCache, base: Tensor
) -> Tensor:
    """Return the clean run's logits, from the last residual in its cache."""
    name = SITES["resid_post"].hook_name(exact.unwrapped.n_layers - 1)
    try:
        resid = cache[name].to(base.device).expand(*base.shape[:2], -1)
    except (KeyError, RuntimeError) as error:
        raise ConfigError(
            f"tolerance={tolerance!r} is a share of |clean - corrupted|, and clean_cache has "
            f"nothing that fits {name}, which gives the clean run's metric; give a number in units "
            "of the metric, such as 0.01"
        ) from error
    flat = resid.reshape(-1, resid.shape[-1])
    parts = [exact.unembed.logits(flat[rows]) for rows in exact.unembed.chunks(len(flat))]
    return torch.cat(parts).view_as(base)
