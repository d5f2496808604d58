"""`AdaptiveRunner`: runs patches within two thresholds of exact, on a packed runner's model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from patchsweep.forward.grad import Gradients
from patchsweep.forward.site_locations import SiteLocation
from patchsweep.models.memory import is_out_of_memory
from patchsweep.models.moves import move_together, on_cpu, sent
from patchsweep.runners.packed.adaptive import (
    AdaptiveBlocks,
    AdaptiveRows,
    Thresholds,
    TooManyAwake,
)
from patchsweep.runners.packed.runner import Loaded, PackedRunner
from patchsweep.runners.packed.schedule import PackedBatch, make_packed_batches
from patchsweep.runners.packed.tables import PackedInput
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, PatchSet
from patchsweep.spec.sites import SITES

# awake tokens that one batch may hold, in units of `max_tokens`; a batch with more is divided
_ROOM = 8
QUERIES = (SiteLocation(SITES["rot_q"], ()),)  # what adaptive runs read besides keys and values


@dataclass(frozen=True, eq=False)
class AdaptiveSet:
    """Patches of one site, what a gradient estimates for them, and their thresholds."""

    chosen: PatchSet
    estimates: NDArray[np.float32]  # [metric, patch] metric(patched) - metric(base), first order
    theta: NDArray[np.float32]  # [metric, pair of the batch], in units of the metric
    tau: float  # relative


@dataclass(frozen=True, eq=False)
class AdaptiveValues:
    """The results for one set."""

    values: Float[NDArray[np.float32], "metric patch"]  # patched metrics
    linear: Float[NDArray[np.float32], "metric patch"]  # the part of the effects by gradients
    token_layers: Int[NDArray[np.int64], " patch"]  # tokens times blocks that ran; 0: none did


class AdaptiveRunner:
    """Runs what a patch changes, and takes the rest to first order, see `adaptive`."""

    def __init__(self, packed: PackedRunner) -> None:
        self.packed = packed

    def load(self, batch: Batch, intervention: Intervention) -> Loaded:
        """Return what `PackedRunner.load` returns, with the base run's queries."""
        return self.packed.load(batch, intervention, keep=QUERIES)

    def run(
        self,
        loaded: Loaded,
        gradients: Gradients,
        sets: Sequence[AdaptiveSet],
        metrics: Sequence[Metric],
    ) -> list[AdaptiveValues]:
        """Return the values of each of `sets`, which share batches."""
        chosen = [adaptive.chosen for adaptive in sets]
        local = loaded.batch.local
        references = self.packed.references(loaded, metrics)[0]
        base = references.cpu().numpy()  # [metric, pair]
        pair = [
            np.array([local[p] for p in s.plan.pair[s.patches].tolist()], np.int64) for s in chosen
        ]
        linear = np.concatenate([s.estimates for s in sets], axis=1)
        values = np.concatenate([base[:, p] for p in pair], axis=1) + linear
        token_layers = np.zeros(values.shape[1], np.int64)
        theta = np.concatenate([s.theta[:, p] for s, p in zip(sets, pair, strict=True)], axis=1)
        tau = np.repeat([s.tau for s in sets], [len(s.patches) for s in chosen])
        sizes = np.concatenate(
            [self._relative_change(loaded, s, p) for s, p in zip(chosen, pair, strict=True)]
        )
        starts = np.flatnonzero((np.abs(linear) > theta).any(axis=0) | (sizes > tau))
        given = PackedInput(
            loaded.base, [self.packed.patch_values(s, loaded) for s in chosen], local
        )
        entry = np.concatenate([s.plan.entry[s.patches] for s in chosen])[starts]

        def run(places: Ints) -> None:
            for packed in make_packed_batches(chosen, np.iinfo(np.int64).max, places):
                at = packed.place
                values[:, at], linear[:, at], token_layers[at] = self._run_batch(
                    loaded, packed, given, gradients, theta[:, at], tau[at], references, metrics
                )

        run_in_parts(starts[np.argsort(entry, kind="stable")], self.packed.max_tokens, run)
        ends = np.cumsum([len(s.patches) for s in chosen])[:-1]
        return [
            AdaptiveValues(*parts)
            for parts in zip(
                np.split(values.astype(np.float32), ends, axis=1),
                np.split(linear.astype(np.float32), ends, axis=1),
                np.split(token_layers, ends),
                strict=True,
            )
        ]

    def _run_batch(
        self,
        loaded: Loaded,
        packed: PackedBatch,
        given: PackedInput,
        gradients: Gradients,
        theta: NDArray[np.float32],
        tau: NDArray[np.float64],
        base: Float[Tensor, "metric pair"],
        metrics: Sequence[Metric],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Return values, linear parts and token-layers of the rows of one batch."""
        device = loaded.base_resid.device
        pair, read = move_together(
            [
                on_cpu([loaded.batch.local[p] for p in packed.pair.tolist()]),
                on_cpu(read_numbers(loaded.batch)),
            ],
            device,
        )
        thresholds = thresholds_on(device, theta, tau)
        blocks = AdaptiveBlocks(self.packed.unwrapped, packed, given, gradients, thresholds)
        rows = blocks.run(self.packed.max_tokens, room_of(self.packed.max_tokens, packed))
        values = base.to(device)[:, pair]

        def score(resid: Tensor, pairs: Tensor) -> Tensor:
            return self.packed.metrics_of(loaded, resid, pairs, metrics)

        return metrics_of(rows, pair, read, loaded.base_resid, pair, values, score)

    @staticmethod
    def _relative_change(loaded: Loaded, chosen: PatchSet, pair: Ints) -> NDArray[np.float64]:
        """Return, per patch, the norm of the replaced value's change relative to the value's.

        Patch i is of `pair[i]` of the batch. Infinite where it is unknown: such patches always
        start.
        """
        plan, base = chosen.plan, loaded.base
        site = plan.site
        cells = plan.cells(chosen.patches)
        single = cells.stop == cells.start + 1
        sizes = np.full(len(chosen.patches), np.inf)
        if site.is_pattern or site.unit == "neuron" or (site.in_stream and not site.layered):
            return sizes
        for number, layers in enumerate(plan.axes.layers):
            of_layer = np.flatnonzero(single & (cells.layer_set == number))
            if not len(of_layer):
                continue
            written = layers[0] + site.shift
            old = base.resid[written] if site.in_stream else base.sites[site.name][written]
            new = loaded.patch_values[site.name][written].to(old)
            units = plan.axes.units
            if units is not None:
                # a query is as wide as a key, and z as a value
                like = (base.keys if site.side in ("query", "key") else base.values)[written]
                n = old.shape[-1] // like.shape[-1]
                old, new = (x.unflatten(-1, (n, -1)) for x in (old, new))
            else:
                old, new = (x.unsqueeze(-2) for x in (old, new))
            ratio = (new - old).norm(dim=-1) / old.norm(dim=-1).clamp_(min=1e-30)
            table = ratio.double().cpu().numpy()  # [pair, pos, unit]
            if units is not None:
                table = np.stack([table[..., list(members)].max(-1) for members in units], axis=-1)
            unit = cells.unit_set[of_layer]
            sizes[of_layer] = table[pair[of_layer], cells.start[of_layer], unit]
        return sizes


def thresholds_on(
    device: torch.device, theta: NDArray[np.float32], tau: NDArray[np.float64]
) -> Thresholds:
    """Return the thresholds `[metric, row]` and `[row]` of a batch on its device."""
    return Thresholds(*(sent(torch.from_numpy(x).float(), device) for x in (theta, tau)))


def room_of(max_tokens: int, packed: PackedBatch) -> int | None:
    """Return how many tokens of a batch may be awake at once; one row cannot be divided."""
    return _ROOM * max_tokens if len(packed.patch) > 1 else None


def read_numbers(batch: Batch) -> Ints:
    """Return `[pos]` which of the batch's reads a position is; 0 where nothing is read."""
    numbers = np.zeros(batch.length, np.int64)
    numbers[list(batch.reads)] = np.arange(len(batch.reads))
    return numbers


def metrics_of(
    rows: AdaptiveRows,
    pair: Int[Tensor, " row"],
    read: Int[Tensor, " pos"],
    resid: Float[Tensor, "run read d_model"],
    run: Int[Tensor, " row"],
    values: Float[Tensor, "metric row"],
    score: Callable[[Tensor, Tensor], Tensor],
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Return values, linear parts and token-layers of the rows of one batch.

    `resid` holds final residuals of the runs that the rows continue, row i of them `run[i]`;
    `values`, which this changes, the metrics of each row's run; `read`: see `read_numbers`.
    `score` returns the metrics `[metric, row]` of final residuals and their pairs.
    """
    awake, row = rows.row.unique_consecutive(return_inverse=True)
    if len(awake):
        pairs = pair[awake]
        own = resid[pairs if run is pair else run[awake]]
        own[row, read[rows.pos]] = rows.resid.to(own)
        values[:, awake] = score(own, pairs)
    linear = rows.linear.to(values)
    both = torch.stack((values + linear, linear)).cpu().numpy()
    return both[0], both[1], rows.token_layers.cpu().numpy()


def run_in_parts(places: Ints, most: int, run: Callable[[Ints], None]) -> None:
    """Call `run` with `places` in parts of at most `most`.

    A part in which too many tokens wake, or that does not fit in memory, is divided.
    """
    waiting = _divided(places, most)
    while waiting:
        part = waiting.pop(0)
        try:
            run(part)
            continue
        except (TooManyAwake, RuntimeError, MemoryError) as error:
            if len(part) == 1 or not (isinstance(error, TooManyAwake) or is_out_of_memory(error)):
                raise
        # here the error is gone, and with it its traceback, which held the batch's tensors
        torch.cuda.empty_cache()  # does nothing without CUDA
        waiting[:0] = _divided(part, -(-len(part) // 2))


def _divided(places: Ints, most: int) -> list[Ints]:
    """Return `places` in parts of equal size, at most `most` each."""
    if not len(places):
        return []
    return np.array_split(places, -(-len(places) // most))
