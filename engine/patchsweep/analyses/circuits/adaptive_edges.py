"""`AdaptiveEdges`: runs edges within two thresholds of exact, see `runners.packed.adaptive`.

A row is one edge of one pair. At its reader's block, tokens whose attention output hardly changes
are asleep; the others run the block's MLP. What leaves the block is compared with the base run, and
the later blocks run what differs noticeably from it. The rest is multiplied with the base run's
gradient.

A sample of edges decides about the thresholds, as in sweeps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from patchsweep_kernels.tokens import Tokens
from torch import Tensor

from patchsweep.analyses.circuits.eap import check_gradients
from patchsweep.analyses.circuits.edge_batch import EdgeBatch, Question
from patchsweep.analyses.circuits.exact import (
    MAX_TOKENS,
    ReaderRows,
    absent,
    check_edges,
    exact,
    rows_by_start,
)
from patchsweep.analyses.circuits.nodes import Edge, Nodes
from patchsweep.arguments import check_tolerance
from patchsweep.attribution.base_gradients import STREAM, base_gradients
from patchsweep.attribution.estimates import Work
from patchsweep.errors import ConfigError
from patchsweep.forward.capture import ActivationCache
from patchsweep.forward.grad import Activations, GradientModel, Gradients, frozen
from patchsweep.forward.trace import Part, Trace
from patchsweep.forward.unembed import Unembed
from patchsweep.models.moves import move_together, on_cpu
from patchsweep.results.tolerance import in_units
from patchsweep.runners.packed.adaptive import WAKE, AdaptiveBlocks, Thresholds
from patchsweep.runners.packed.adaptive_runner import (
    metrics_of,
    read_numbers,
    run_in_parts,
    thresholds_on,
)
from patchsweep.runners.packed.schedule import PackedBatch
from patchsweep.runners.packed.tables import PackedInput
from patchsweep.spec.plan import Bools, Ints
from patchsweep.sweeps.calibration import (
    Level,
    Ran,
    SampleSummary,
    calibrate,
    n_each,
    sampled_pairs,
)
from patchsweep.sweeps.calibration import Part as SampledPart

SITE = "edge"  # what results call the patches of all edges
# rows that one batch holds, in units of `max_tokens`: most of their tokens sleep
_FULL = 8


@dataclass(frozen=True)
class _Rows(PackedBatch):
    """Edges that run together, sorted by pair; `entry` is the block behind their readers."""

    edges: tuple[Edge, ...]
    of_layers: int
    is_read: Bools  # [pos]

    @property
    def n_layers(self) -> int:
        """Blocks of the model."""
        return self.of_layers

    @property
    def n_pairs(self) -> int:
        """Pairs of the batch."""
        return int(self.pair.max()) + 1

    @property
    def reads(self) -> Bools:
        """See `PackedBatch`."""
        return np.broadcast_to(self.is_read, (self.n_pairs, self.length))

    @cached_property
    def write_layers(self) -> Bools:
        """See `PackedBatch`: edges write nothing inside of later blocks."""
        return np.zeros((len(self.patch), self.of_layers + 1), bool)


class AdaptiveEdges:
    """Runs edges of one batch of pairs."""

    def __init__(self, edge_batch: EdgeBatch, question: Question) -> None:
        self.edge_batch = edge_batch
        self.writes = edge_batch.writes()
        self.gradients = _gradients(edge_batch, question)
        self.cache = _cache(edge_batch.base)
        self.unembed = Unembed(edge_batch.blocks.unwrapped)

    def exact_cost(self, edge: Edge) -> int:
        """Return the most token-layers that an exact run of an edge takes, in all pairs."""
        width = self.edge_batch.end - (self.edge_batch.start if edge.pos is None else edge.pos)
        n_layers = max(0, self.edge_batch.blocks.n_layers - edge.reader.layer)
        return width * n_layers * self.edge_batch.base.n_pairs

    @torch.no_grad()
    def run(
        self,
        edges: Sequence[Edge],
        theta: Float[NDArray[np.float32], "metric pair"],
        tau: float,
        max_tokens: int = MAX_TOKENS,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Return metrics and their linear parts `[metric, pair, edge]`, and token-layers.

        `theta` is in units of the metric, `tau` relative. Dead edges have the base metric. NaN
        where the prompts do not have an edge's position.
        """
        edge_batch = self.edge_batch
        base, _ = edge_batch.references()
        values = base.unsqueeze(-1).repeat(1, 1, len(edges)).cpu().numpy()
        linear, token_layers = np.zeros_like(values), np.zeros(values.shape[1:], np.int64)
        for first, rows in rows_by_start(edge_batch, edges, self.writes).items():

            def run(part: Ints, first: int = first) -> None:
                pair, edge = part[np.argsort(part[:, 0], kind="stable")].T
                values[:, pair, edge], linear[:, pair, edge], token_layers[pair, edge] = (
                    self._batch([edges[i] for i in edge], pair, first, base, theta, tau, max_tokens)
                )

            run_in_parts(rows, max(1, _FULL * max_tokens // (edge_batch.end - first)), run)
        check_edges(edge_batch, edges, values)
        values[:, :, absent(edge_batch, edges)] = np.nan
        return values, linear, token_layers

    def _batch(
        self,
        edges: Sequence[Edge],
        pair: Ints,
        start: int,
        base: Float[Tensor, "metric pair"],
        theta: NDArray[np.float32],
        tau: float,
        max_tokens: int,
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        edge_batch, n = self.edge_batch, len(edges)
        n_layers, end = edge_batch.blocks.n_layers, edge_batch.end
        is_read = np.isin(np.arange(end), edge_batch.batch.reads)
        rows = _Rows(
            sets=(),
            length=end,
            place=np.arange(n),
            which=np.zeros(n, np.int64),
            patch=np.arange(n),
            pair=pair,
            entry=np.array([min(e.reader.layer + 1, n_layers) for e in edges]),
            token_entry=np.zeros(n, bool),
            start=np.full(n, start),
            stop=np.full(n, end),
            edges=tuple(edges),
            of_layers=n_layers,
            is_read=is_read,
        )
        device = self.cache.devices[0]
        thresholds = thresholds_on(device, theta[:, pair], np.full(n, tau))
        given = PackedInput(self.cache, (), {i: i for i in range(rows.n_pairs)})
        ran = _Blocks(self, rows, given, thresholds, max_tokens).run(max_tokens, None)
        pairs, read = move_together([on_cpu(pair), on_cpu(read_numbers(edge_batch.batch))], device)
        final = self.cache.resid[-1][:, list(edge_batch.batch.reads)]
        score = partial(edge_batch.metrics_of, self.unembed)
        return metrics_of(ran, pairs, read, final, pairs, base[:, pairs], score)


class _Blocks(AdaptiveBlocks):
    """The awake tokens of edges; rows enter behind their reader's block."""

    def __init__(
        self,
        edges: AdaptiveEdges,
        rows: _Rows,
        given: PackedInput,
        thresholds: Thresholds,
        max_tokens: int,
    ) -> None:
        edge_batch = edges.edge_batch
        super().__init__(edge_batch.blocks.unwrapped, rows, given, edges.gradients, thresholds)
        self._edge_batch, self._writes_of_senders = edge_batch, edges.writes
        self._rows, self._start = rows, int(rows.start[0])
        # by the block that they enter, before the hooks of later blocks are there
        self._entered: dict[int, list[tuple[Tokens, Tensor]]] = {}
        readers = np.array([edge.reader.layer for edge in rows.edges])
        for layer in np.unique(readers).tolist():
            mine = np.flatnonzero(readers == layer)
            n_parts = -(-len(mine) * (rows.length - self._start) // max_tokens)
            entered = self._entered.setdefault(min(layer + 1, edge_batch.blocks.n_layers), [])
            for part in np.array_split(mine, n_parts):
                entered += self._enter(layer, part)

    def enter_rows(self, layer: int) -> None:
        """See `AdaptiveBlocks`."""
        for tokens, hidden in self._entered.pop(layer, ()):
            self.awake, self.hidden = self._merged(self.awake, self.hidden, tokens, hidden)

    def _enter(self, layer: int, rows: Ints) -> Iterator[tuple[Tokens, Tensor]]:
        """Yield the tokens of rows with readers at `layer` that stay awake behind their block."""
        edge_batch, device = self._edge_batch, self.device
        start = self._start
        row = torch.from_numpy(rows).to(device)
        pair = self.row_pair[row]
        edges = [self._rows.edges[i] for i in rows]
        readers = ReaderRows(edge_batch, layer, edges, pair, self._writes_of_senders, start)
        if layer == edge_batch.blocks.n_layers:
            read = torch.from_numpy(np.flatnonzero(self._rows.is_read)).to(device)
            read = read[read >= start]
            tokens = _grid(row, read, pair)
            yield tokens, readers.seen[readers.stream][:, read - start].flatten(0, 1)
            return
        for is_mlp in (False, True):
            mine = readers.rows(is_mlp)
            if len(mine):
                enter = self._mlp_left if is_mlp else self._attention_left
                yield self._sleep(layer, *enter(readers, mine, row[mine]))

    def _mlp_left(self, readers: ReaderRows, mine: Tensor, row: Tensor) -> tuple[Tokens, Tensor]:
        """Return the tokens of rows whose MLP reads a change, with the block's output."""
        single = readers.edges[0].pos is not None
        stop = readers.start + 1 if single else readers.end
        pos = torch.arange(readers.start, stop, device=self.device)
        self.token_layers[row] += len(pos)
        out = readers.behind_mlp(mine, slice(readers.start, stop))
        return _grid(row, pos, self.row_pair[row]), out.flatten(0, 1)

    def _attention_left(
        self, readers: ReaderRows, mine: Tensor, row: Tensor
    ) -> tuple[Tokens, Tensor]:
        """Return the tokens whose attention output changes noticeably; add the others."""
        edge_batch, pair, layer = self._edge_batch, self.row_pair[row], readers.layer
        blocks, base = edge_batch.blocks, edge_batch.base
        positions = slice(readers.start, readers.end)
        z, known = readers.z(mine), base.z[layer][pair, positions]
        delta = z - known
        gradient = self.gradients.z[layer].to(self.device)[:, pair, :, positions]
        heads = delta.unflatten(-1, (gradient.shape[2], -1)).transpose(1, 2)
        effect = torch.einsum("rhtd,mrhtd->mrt", heads.to(gradient), gradient)
        size = delta.norm(dim=-1) / known.norm(dim=-1).clamp(min=1e-30)
        theta, tau = self.thresholds.theta[:, row], self.thresholds.tau[row]
        wakes = (effect.abs() > theta[..., None]).any(0) | (size > WAKE * tau[:, None])
        if layer == blocks.n_layers - 1:
            here = self.reads[row][:, positions]
            wakes, effect = wakes & here, effect * here
        self.linear[:, row] += (effect * ~wakes).sum(-1).to(self.linear)
        at, pos = wakes.nonzero().unbind(1)
        tokens = Tokens(row[at], pos + readers.start, pair[at])
        given: dict[Part, Tensor] = {"attn": blocks.attention_of(layer, z[at, pos])}
        if edge_batch.nodes.parallel[layer]:  # the MLP reads nothing that changes
            given["mlp"] = base.part(layer, "mlp")[tokens.pair, tokens.pos]
        x = base.resid[layer][tokens.pair, tokens.pos]
        out = blocks.finish_tokens(layer, x, given, base, tokens.pair, tokens.pos)
        self.token_layers.index_add_(0, tokens.row, torch.ones_like(tokens.row))
        return tokens, out


def _grid(row: Tensor, pos: Tensor, pair: Tensor) -> Tokens:
    """Return the tokens at `pos` of each row."""
    n = len(pos)
    return Tokens(row.repeat_interleave(n), pos.repeat(len(row)), pair.repeat_interleave(n))


def _cache(trace: Trace) -> ActivationCache:
    """Return what adaptive blocks read of a base run."""
    cache = ActivationCache((trace.n_pairs, trace.length))
    cache.devices = [x.device for x in trace.resid]
    cache.resid = [x.detach() for x in trace.resid]
    cache.keys, cache.values, cache.calls = trace.k, trace.v, trace.calls
    cache.heads = [q.shape[1] for q in trace.q]
    cache.sites["rot_q"] = [q.transpose(1, 2).flatten(2) for q in trace.q]
    return cache


def _gradients(edge_batch: EdgeBatch, question: Question) -> Gradients:
    """Return the gradients of the metrics on the base runs."""
    unwrapped = edge_batch.blocks.unwrapped
    gradients = GradientModel(unwrapped.bridge, (), STREAM, unwrapped=unwrapped)
    source = Activations({}, edge_batch.source.logits, None)
    work = Work(gradients, edge_batch.batch, (), edge_batch.metrics, question.intervention, source)
    return base_gradients(work)[1]


def check_edge_tolerance(
    question: Question, tolerance: float | str | None, every: bool, remedy: str
) -> None:
    """Check that a run of edges can meet its tolerance; `every`: it runs all of them.

    Raises:
        ConfigError: it is no positive number, or the run is of chosen edges.
        MethodError: a metric has no gradient.
    """
    check_tolerance(tolerance)
    if tolerance is None:
        return
    if not every:
        raise ConfigError(
            f"tolerance={tolerance!r} needs a sample, which is worth its time for all edges alone; "
            f"use {remedy}, or leave the tolerance out"
        )
    check_gradients(question, None)


def calibrated(
    question: Question,
    at: Callable[[range], Sequence[AdaptiveEdges]],
    estimates: NDArray[np.float32],
    tolerance: float | str,
) -> dict[str, SampleSummary]:
    """Run a sample of edges exactly and at levels of thresholds; return what it says of them.

    `at` returns the batches of some pairs. `estimates` [metric, pair, sender, reader(, pos)] are
    first-order effects: half of the sample are the largest of them, the others are random.
    """
    pairs = sampled_pairs(len(question.pairs))
    parts = []
    with frozen(question.bridge):
        for pair in pairs:
            (run,) = at(range(pair, pair + 1))
            sample = _sample(run.edge_batch.nodes, estimates[:, pair], len(pairs))
            base, source = (x.cpu().numpy() for x in run.edge_batch.references())
            parts.append(
                SampledPart(
                    run,
                    sample,
                    np.arange(len(sample)),
                    exact(run.edge_batch, sample, writes=run.writes).cpu().numpy()[:, 0],
                    base,
                    in_units(tolerance, base, source),
                    sum(run.exact_cost(edge) for edge in sample),
                )
            )

        def run_sets(
            run: AdaptiveEdges, sets: Sequence[Sequence[Edge]], levels: Sequence[Level]
        ) -> list[Ran]:
            of_pair = [
                run_at(run, edges, tolerance, level)
                for edges, level in zip(sets, levels, strict=True)
            ]
            return [(values[:, 0], linear[:, 0], ran[0]) for values, linear, ran in of_pair]

        found = calibrate({SITE: parts}, run_sets)
    return {name: SampleSummary.of(sample) for name, sample in found.items()}


def run_at(
    run: AdaptiveEdges, edges: Sequence[Edge], tolerance: float | str, level: Level
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Return what `AdaptiveEdges.run` returns, at a level of thresholds."""
    base, source = (x.cpu().numpy() for x in run.edge_batch.references())
    theta, tau = level
    return run.run(edges, np.float32(theta) * in_units(tolerance, base, source), tau)


def _sample(nodes: Nodes, estimates: NDArray[np.float32], n_pairs: int) -> list[Edge]:
    """Return one pair's part of the sample, the same in every process."""
    strength = np.abs(np.nan_to_num(estimates)).max(axis=0)
    live = np.flatnonzero(strength)
    n = min(len(live), n_each(len(live), n_pairs))
    largest = live[np.argsort(-strength.ravel()[live], kind="stable")[:n]]
    random = np.random.default_rng(len(live)).choice(live, n, replace=False)
    at = np.unravel_index(np.union1d(largest, random), strength.shape)
    return nodes.edges_at(at)
