"""What edges of one batch of pairs share: the base and source runs, and what senders gain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.attribution.check import check_model
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PatchsweepError
from patchsweep.forward.blockwise import Blocks, Trace, unfit
from patchsweep.forward.unwrapped import Unsupported
from patchsweep.models.compute import compute_dtype_of
from patchsweep.models.offload import device_of
from patchsweep.spec.batch import Batch, clean_prompts, make_batches
from patchsweep.spec.finite import check_references
from patchsweep.spec.interventions import (
    Intervention,
    Spans,
    values_of,
)
from patchsweep.spec.metrics import Logits, Metric, compute
from patchsweep.spec.reference import means_attrs
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import Experiment, SweepSpec, make_experiment, model_shape

# what all senders of one batch write stays within this many bytes
WRITE_BYTES = 512 * 2**20
SENDER_SITES = ("embed", "z", "mlp_out")  # whose values senders take


@dataclass(frozen=True)
class Question(Experiment):
    """Whose edges, on which prompts, by which metrics; checked, nothing run."""

    def means_attrs(self) -> dict[str, Any]:
        """See `reference.means_attrs`."""
        return means_attrs(self.intervention, self.pairs, [SITES[name] for name in SENDER_SITES])


def ask(model: TransformerBridge, pairs: PromptPairs, spec: SweepSpec) -> Question:
    """The arguments that all kinds of edges share, checked.

    Raises:
        PatchsweepError: an argument breaks a rule; the text says which, and what to do.
    """
    found = make_experiment(model, pairs, spec, [SITES[name] for name in SENDER_SITES])
    if found.intervention.name == "shuffle":
        raise MethodError(
            "intervention=shuffle mixes the pairs of a batch, and edges take each pair by "
            "itself; use resample with other pairs, zero or mean"
        )
    check_model(model)
    return Question(**vars(found))


def nodes_of(model: TransformerBridge, parallel: tuple[bool, ...] | None = None) -> Nodes:
    """The senders and readers of `model`; unless `parallel` is known, no block counts as such."""
    shape = model_shape(model)
    return Nodes(
        n_layers=shape.n_layers,
        n_heads=shape.n_heads,
        n_kv_heads=shape.n_kv_heads,
        parallel=parallel or (False,) * shape.n_layers,
    )


@dataclass(frozen=True)
class Changes:
    """New value minus base value of every sender, where it leaves the sender."""

    embed: Float[Tensor, "pair pos d_model"]  # what enters the first block
    z: tuple[Float[Tensor, "pair pos width"], ...]  # per layer, before W_O
    mlp: tuple[Float[Tensor, "pair pos d_model"], ...]  # per layer, after a norm of its own


@dataclass(frozen=True)
class EdgeBatch:
    """One batch of pairs, its unpatched runs done."""

    blocks: Blocks
    nodes: Nodes
    batch: Batch
    metrics: tuple[Metric, ...]
    base: Trace
    source: Trace
    changes: Changes
    start: int  # the first position where any sender gains anything

    def score(
        self, logits: Float[Tensor, "row read d_vocab"], pair: Tensor
    ) -> Float[Tensor, "metric row"]:
        """Every metric of every row; row i is a run of `pair[i]`."""
        answer, wrong = (
            logits.gather(2, x[pair].unsqueeze(-1)).squeeze(-1)
            for x in (self.batch.answer, self.batch.wrong)
        )
        base, source = (x.logits.detach()[pair] for x in (self.base, self.source))
        return compute(self.metrics, Logits(answer, wrong, logits, base, source))

    @torch.no_grad()
    def references(self) -> tuple[Float[Tensor, "metric pair"], Float[Tensor, "metric pair"]]:
        """The metrics of the base and of the source runs.

        Raises:
            ModelError: one is NaN or infinite.
        """
        pair = torch.arange(self.base.n_pairs, device=self.batch.base.device)
        base, source = (
            self.score(self.base.logits.detach(), pair),
            self.score(self.source.logits, pair),
        )
        check_references(base.cpu().numpy(), source.cpu().numpy(), self.batch.pairs, self.metrics)
        return base, source

    @torch.no_grad()
    def writes(self, trace: Trace, *, exact: bool) -> Float[Tensor, "pair sender pos d_model"]:
        """What the residual stream gains by each sender's change, from `start` on, fp32.

        `exact`: through a norm after attention as it is, else linearised at `trace`. Without
        such a norm there is no difference.
        """
        n_pairs, n_heads = trace.n_pairs, self.nodes.n_heads
        every = torch.arange(n_pairs, device=trace.resid[0].device)
        rows = every.repeat(n_heads)
        found = [self.changes.embed.unsqueeze(1)]
        for layer in range(self.nodes.n_layers):
            gained = self.blocks.head_writes(layer, self.changes.z[layer], n_heads).flatten(0, 1)
            heads = (
                self.blocks.exact_head_writes(layer, gained, trace, rows)
                if exact
                else self.blocks.push(layer, "attn", gained, trace, rows)
            )
            found.append(heads.unflatten(0, (n_heads, n_pairs)).transpose(0, 1))
            mlp = self.blocks.push(layer, "mlp_out", self.changes.mlp[layer], trace, every)
            found.append(mlp.unsqueeze(1))
        return torch.cat([x[:, :, self.start :].float() for x in found], dim=1)


def edge_batches(question: Question, *, gradient: bool = False) -> Iterator[EdgeBatch]:
    """The pairs of `question` in batches whose writes fit the memory.

    With `gradient` the base run is part of a graph that starts where the first block does.

    Raises:
        MethodError: the model's blocks cannot be taken apart.
    """
    bridge = question.bridge
    try:
        blocks = Blocks(bridge, compute_dtype_of(bridge))
        nodes = nodes_of(bridge, blocks.parallel())
    except Unsupported as error:
        raise unfit(bridge, error) from error
    except PatchsweepError:
        raise
    except Exception as error:  # blocks of an unknown kind may break in any way here
        raise unfit(bridge, error) from error
    try:
        yield from _batches(question, blocks, nodes, gradient)
    except Unsupported as error:
        raise unfit(bridge, error) from error


def _batches(
    question: Question, blocks: Blocks, nodes: Nodes, gradient: bool
) -> Iterator[EdgeBatch]:
    _prepare(question, blocks)
    device = device_of(question.bridge)
    longest = max(len(pair) for pair in question.pairs)
    size = 4 * len(nodes.senders) * longest * int(question.bridge.cfg.d_model)
    n_pairs = max(1, WRITE_BYTES // size)
    for first in range(0, len(question.pairs), n_pairs):
        numbers = range(first, min(first + n_pairs, len(question.pairs)))
        for batch in make_batches(
            question.pairs, numbers, question.direction, question.read, device
        ):
            yield _edge_batch(question, blocks, nodes, batch, gradient)


def _edge_batch(
    question: Question, blocks: Blocks, nodes: Nodes, batch: Batch, gradient: bool
) -> EdgeBatch:
    base = blocks.trace(batch.base, batch.reads, gradient=gradient)
    source = blocks.trace(batch.source, batch.reads)
    if base.q[0].shape[1] != nodes.n_heads or base.k[0].shape[1] != nodes.n_kv_heads:
        raise MethodError(
            f"attention of {question.bridge.cfg.model_name} has {base.q[0].shape[1]} query and "
            f"{base.k[0].shape[1]} key heads where its configuration says {nodes.n_heads} and "
            f"{nodes.n_kv_heads}; sweep its sites with method=exact instead"
        )
    start = 0
    if question.intervention.from_source:
        start = int((batch.base != batch.source).any(dim=0).int().argmax())
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
def _changes(
    intervention: Intervention, base: Trace, source: Trace, spans: Sequence[Spans]
) -> Changes:
    b, s = _activations(base), _activations(source)

    def change(site: str, layer: int) -> Tensor:
        old = b[site][layer]
        return values_of(intervention, SITES[site], layer, old, s[site][layer], spans) - old

    layers = range(len(base.z))
    return Changes(
        embed=change("embed", 0),
        z=tuple(change("z", layer) for layer in layers),
        mlp=tuple(change("mlp_out", layer) for layer in layers),
    )


def _activations(trace: Trace) -> Mapping[str, Sequence[Tensor]]:
    layers = range(len(trace.z))
    return {
        "embed": [trace.resid[0].detach()],
        "z": [z.detach() for z in trace.z],
        "mlp_out": [trace.part(layer, "mlp_out").detach() for layer in layers],
    }


def _prepare(question: Question, blocks: Blocks) -> None:
    """Let the intervention see the clean prompts."""
    batches = make_batches(
        question.pairs,
        range(len(question.pairs)),
        question.direction,
        question.read,
        device_of(question.bridge),
    )
    question.intervention.prepare(
        clean_prompts(batches, question.direction),
        lambda tokens: _activations(blocks.trace(tokens, [-1])),
    )
