"""`EdgeBatch`: base and source runs of a batch of pairs, and the changes of all senders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.analyses.stages import Computed, Stages, empty
from patchsweep.attribution.check import check_model
from patchsweep.attribution.estimates import Work
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PatchsweepError
from patchsweep.forward.block_structure import parallel_blocks
from patchsweep.forward.blockwise import Blocks, unfit
from patchsweep.forward.grad import frozen
from patchsweep.forward.trace import Trace
from patchsweep.forward.unembed import Unembed
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.runners.packed.budget import keep_batch_memory
from patchsweep.spec.batch import Batch, clean_prompts, make_batches
from patchsweep.spec.directions import Live
from patchsweep.spec.finite import check_references
from patchsweep.spec.interventions import (
    Activations,
    Direction,
    Intervention,
    Spans,
    ValueFn,
    shuffles,
    values_of,
)
from patchsweep.spec.metrics import Logits, Metric, MetricLike, compute
from patchsweep.spec.reference import MeansFrom, means_attrs
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import Experiment, SweepSpec, make_experiment, model_shape
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.identity import question_settings

# most bytes of the writes of all senders of one batch
WRITE_BYTES = 512 * 2**20
# most that attention's output may differ from its heads times W_O, as a share of the largest
_APART = 1e-3
_APART_WORDS = "attention of block {layer} puts out something else than its heads times W_O"
SENDER_SITES = ("embed", "z", "mlp_out")  # sites of the senders' values


@dataclass(frozen=True)
class Question(Experiment):
    """The checked arguments of an edge analysis: model, pairs, metrics and intervention."""

    def batches(self, pairs: range) -> list[Batch]:
        """Return pairs as batches, one per length."""
        device = device_of(self.bridge)
        return make_batches(self.pairs, pairs, self.direction, self.read, device)

    def prepare(self, activations: Activations) -> None:
        """Prepare the intervention (means, for example) on the clean prompts."""
        prompts = clean_prompts(self.batches(range(len(self.pairs))), self.direction)
        self.intervention.prepare(prompts, activations)

    def means_attrs(self) -> dict[str, Any]:
        """See `reference.means_attrs`."""
        return means_attrs(self.intervention, self.pairs, [SITES[name] for name in SENDER_SITES])


def ask(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    direction: Direction | None = SweepSpec.direction,
    intervention: str | Intervention | float | Tensor | ValueFn = SweepSpec.intervention,
    read: int = SweepSpec.read,
    means_from: MeansFrom = SweepSpec.means_from,
) -> Question:
    """Check the arguments that all edge analyses share.

    Raises:
        PatchsweepError: an argument breaks a rule; the text states the rule and a remedy.
    """
    spec = SweepSpec(
        metrics=metrics,
        direction=direction,
        intervention=intervention,
        read=read,
        means_from=means_from,
    )
    experiment = make_experiment(model, pairs, spec, [SITES[name] for name in SENDER_SITES])
    if shuffles(experiment.intervention):
        raise MethodError(
            f"intervention={experiment.intervention.name} mixes the pairs of a batch, and edges "
            "take each pair by itself; use resample with other pairs, zero or mean"
        )
    if isinstance(experiment.intervention, Live):
        raise MethodError(
            f"intervention={experiment.intervention.name} changes vectors of one width, and the "
            "senders of edges have several; use resample, zero or mean"
        )
    check_model(model)
    return Question(**vars(experiment))


def ablation_settings(question: Question) -> dict[str, Any]:
    """Return `question_settings`, in the words of circuits: an intervention is an ablation."""
    experiment = question_settings(question)
    return {"ablation": experiment.pop("intervention"), **experiment}


def nodes_of(model: TransformerBridge, parallel: tuple[bool, ...] | None = None) -> Nodes:
    """Return the senders and readers of `model`; without `parallel`, no block is parallel."""
    shape = model_shape(model)
    return Nodes(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        parallel=parallel or (False,) * shape.n_layers,
    )


# new value minus base value of every sender, at its output `[pair, pos, width]`: embed (the first
# block's input), and per layer z (before W_O) and mlp_out (after the MLP's own norm)
Changes = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class EdgeBatch:
    """One batch of pairs with its unpatched runs and the changes of all senders."""

    blocks: Blocks
    nodes: Nodes
    batch: Batch
    metrics: tuple[Metric, ...]
    base: Trace
    source: Trace
    changes: Changes
    start: int  # first position at which any sender changes

    @property
    def end(self) -> int:
        """Number of positions up to the last one that is read."""
        return self.batch.reads[-1] + 1

    @property
    def reads(self) -> list[int]:
        """The positions read, counted from `start`."""
        return [read - self.start for read in self.batch.reads]

    def score(
        self, logits: Float[Tensor, "row read d_vocab"], pair: Tensor
    ) -> Float[Tensor, "metric row"]:
        """Return every metric of every row; row i is a run of `pair[i]`."""
        answer, wrong = (
            logits.gather(2, x[pair].unsqueeze(-1)).squeeze(-1)
            for x in (self.batch.answer, self.batch.wrong)
        )
        base, source = (x.logits.detach()[pair] for x in (self.base, self.source))
        return compute(self.metrics, Logits(answer, wrong, logits, base, source))

    @torch.no_grad()
    def metrics_of(
        self,
        unembed: Unembed,
        final: Float[Tensor, "row read d_model"],
        pair: Tensor,
        *,
        all_logits: bool = False,
    ) -> Float[Tensor, "metric row"]:
        """Return every metric of runs with these final residuals; row i is of `pair[i]`.

        Metrics that need the answers' logits alone get those alone, without `all_logits`.
        """
        n_reads = final.shape[1]
        if not all_logits and all(metric.needs == "answers" for metric in self.metrics):
            targets = torch.stack([self.batch.answer, self.batch.wrong], dim=-1)[pair]
            logits = unembed.token_logits(final.flatten(0, 1), targets.flatten(0, 1))
            answer, wrong = logits.unflatten(0, (-1, n_reads)).unbind(-1)
            return compute(self.metrics, Logits(answer, wrong))
        parts = []
        for rows in unembed.chunks(len(final), n_reads):
            full = unembed.logits(final[rows].flatten(0, 1)).float()
            parts.append(self.score(full.unflatten(0, (-1, n_reads)), pair[rows]))
        return torch.cat(parts, dim=1)

    def computed(self, name: str, values: Values) -> Computed:
        """Return `values` as the variable `name`, with the unpatched metrics; see `run_batches`."""
        return {name: values}, np.stack([x.cpu().numpy() for x in self.references()])

    @torch.no_grad()
    def references(self) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """Return the metrics of the base run and of the source run.

        Raises:
            ModelError: a metric is NaN or infinite.
        """
        pair = torch.arange(self.base.n_pairs, device=self.batch.base.device)
        base, source = (
            self.score(self.base.logits.detach(), pair),
            self.score(self.source.logits, pair),
        )
        check_references(base.cpu().numpy(), source.cpu().numpy(), self.batch.pairs, self.metrics)
        return base, source

    @torch.no_grad()
    def writes(self) -> Float[Tensor, "pair sender pos d_model"]:
        """Return what each sender's change adds to the residual stream, from `start` on, fp32."""
        trace = self.base
        n_pairs, n_heads = trace.n_pairs, self.nodes.n_heads
        all_pairs = torch.arange(n_pairs, device=trace.resid[0].device)
        rows = all_pairs.repeat(n_heads)
        parts = [self.changes["embed"][0].unsqueeze(1)]
        for layer in range(self.nodes.n_layers):
            gained = self.blocks.head_writes(layer, self.changes["z"][layer], n_heads).flatten(0, 1)
            heads = self.blocks.exact_head_writes(layer, gained, trace, rows)
            parts.append(heads.unflatten(0, (n_heads, n_pairs)).transpose(0, 1))
            mlp = self.changes["mlp_out"][layer]
            mlp = self.blocks.push(layer, "mlp_out", mlp, trace, all_pairs)
            parts.append(mlp.unsqueeze(1))
        return torch.cat([x[:, :, self.start :].float() for x in parts], dim=1)


Made = TypeVar("Made", EdgeBatch, Work)  # what a batch of pairs is made into


class EdgeBatches(ABC, Generic[Made]):
    """The pairs of `question` in batches; the writes of `block` pairs fit `WRITE_BYTES`."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.longest = max(len(pair) for pair in question.pairs)
        n_senders = len(nodes_of(question.bridge).senders)
        size = 4 * n_senders * self.longest * int(question.bridge.cfg.d_model)
        self.block = max(1, WRITE_BYTES // size)

    @abstractmethod
    def make(self, batch: Batch) -> Made:
        """Run a batch's prompts; the first time, take the model apart."""

    def of(self, pairs: range) -> Iterator[Made]:
        """Yield the batches of `pairs`, at most `block` of them.

        Raises:
            MethodError: the model's blocks cannot be split at the residual stream.
        """
        try:
            for batch in self.question.batches(pairs):
                yield self.make(batch)
        except Unsupported as error:
            raise unfit(self.question.bridge, error) from error


class ExactBatches(EdgeBatches[EdgeBatch]):
    """Batches with the changes of all senders, for exact runs."""

    @cached_property
    def parts(self) -> tuple[Blocks, Nodes]:
        """The model's blocks and nodes; the intervention is prepared with them.

        Raises:
            MethodError: the model's blocks cannot be split at the residual stream.
        """
        keep_batch_memory(self.question.bridge)
        blocks, nodes = blocks_and_nodes(self.question.bridge)
        self.question.prepare(lambda tokens: _activations(blocks.trace(tokens, [-1])))
        return blocks, nodes

    @property
    def nodes(self) -> Nodes:
        """The model's nodes."""
        return self.parts[1]

    def make(self, batch: Batch) -> EdgeBatch:
        """See `EdgeBatches`."""
        return _edge_batch(self.question, *self.parts, batch)


def blocks_and_nodes(bridge: TransformerBridge) -> tuple[Blocks, Nodes]:
    """Return the model's blocks, which run part by part, and its nodes.

    Raises:
        MethodError: the blocks cannot be split at the residual stream.
    """
    try:
        blocks = Blocks(bridge, compute_dtype_of(bridge))
        return blocks, nodes_of(bridge, parallel_blocks(blocks))
    except Unsupported as error:
        raise unfit(bridge, error) from error
    except PatchsweepError:
        raise
    except Exception as error:  # blocks of an unknown kind may raise anything
        raise unfit(bridge, error) from error


def run_batches(
    stages: Stages,
    name: str,
    batches: EdgeBatches[Made],
    dims: Mapping[str, Mapping[str, int]],
    compute: Callable[[Made], Computed],
    attrs: Mapping[str, Any] | None = None,
) -> xr.Dataset:
    """Run `compute` on all batches as the stage `name`; see `Stages.run`.

    `dims` are the axes of each variable besides metric and pair. `compute` returns the variables
    `[metric, pair, ...]` of a batch, and its base and source metrics. The Dataset holds NaN beyond
    the last axis of what `compute` returns.
    """
    question = batches.question
    n_metrics = len(question.metrics)
    shapes = {
        variable: {"metric": n_metrics, "pair": len(question.pairs), **more}
        for variable, more in dims.items()
    }

    def block(pairs: range) -> Computed:
        cells = empty(shapes, pairs)
        references = np.full((2, n_metrics, len(pairs)), np.nan, np.float32)
        with frozen(question.bridge):
            for edge_batch in batches.of(pairs):
                rows = [pair - pairs.start for pair in edge_batch.batch.pairs]
                values, references[:, :, rows] = compute(edge_batch)
                for variable, array in values.items():
                    if array.ndim > 2:
                        cells[variable][:, rows, ..., : array.shape[-1]] = array
                    else:
                        cells[variable][:, rows] = array
        return cells, references

    return stages.run(
        name,
        shapes,
        batches.block,
        block,
        cost=int(question.bridge.cfg.n_layers) * batches.longest,
        metrics=[metric.name for metric in question.metrics],
        attrs=attrs,
    )


def _edge_batch(question: Question, blocks: Blocks, nodes: Nodes, batch: Batch) -> EdgeBatch:
    base = blocks.trace(batch.base, batch.reads)
    source = blocks.trace(batch.source, batch.reads)
    _check_attention(blocks, base)
    if base.q[0].shape[1] != nodes.n_heads or base.k[0].shape[1] != nodes.n_kv_heads:
        raise MethodError(
            f"attention of {question.bridge.cfg.model_name} has {base.q[0].shape[1]} query and "
            f"{base.k[0].shape[1]} key heads where its configuration says {nodes.n_heads} and "
            f"{nodes.n_kv_heads}; sweep its sites with method=exact instead"
        )
    start = 0
    if question.intervention.from_source:
        start = int(batch.differs.any(dim=0).int().argmax())
    return EdgeBatch(
        blocks=blocks,
        nodes=nodes,
        batch=batch,
        metrics=question.metrics,
        base=base,
        source=source,
        changes=_changes(question.intervention, base, source, batch.spans),
        start=start,
    )


@torch.no_grad()
def _check_attention(blocks: Blocks, trace: Trace) -> None:
    """Raise unless what attention puts out is its heads' output times W_O, and a bias.

    Raises:
        Unsupported: something changes it behind W_O.
    """
    apart = []  # per layer, on the device: each one read by itself would wait for it
    for layer, z in enumerate(trace.z):
        known, found = trace.part(layer, "attn"), blocks.attention_of(layer, z)
        if known.shape != found.shape:
            raise Unsupported(_APART_WORDS.format(layer=layer))
        wide = known.dtype in (torch.float32, torch.float64)
        allowed = (_APART if wide else 0.1) * known.abs().max().clamp(min=1e-6)
        apart.append(~((found - known).abs().max() <= allowed))  # NaN is apart too
    wrong = np.flatnonzero(torch.stack([x.to(apart[0].device) for x in apart]).cpu().numpy())
    if len(wrong):
        raise Unsupported(_APART_WORDS.format(layer=wrong[0]))


@torch.no_grad()
def _changes(
    intervention: Intervention, base: Trace, source: Trace, spans: Sequence[Spans]
) -> Changes:
    new = _activations(source)
    return {
        name: [
            values_of(intervention, SITES[name], layer, old, new[name][layer], spans) - old
            for layer, old in enumerate(of_site)
        ]
        for name, of_site in _activations(base).items()
    }


def _activations(trace: Trace) -> Mapping[str, Sequence[Tensor]]:
    layers = range(len(trace.z))
    return {
        "embed": [trace.resid[0].detach()],
        "z": [z.detach() for z in trace.z],
        "mlp_out": [trace.part(layer, "mlp_out").detach() for layer in layers],
    }
