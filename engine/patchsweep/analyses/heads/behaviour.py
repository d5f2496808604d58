"""Behaviour of heads on a task with names: attention from the last token, and effects of paths.

Pairs need the labels IO, S2 and end, as in the task `ioi`. The metric is the logit of the clean
answer minus that of the corrupted answer. Path patching (Wang et al. 2022, arXiv:2211.00593) puts
the corrupted prompt's values into paths of the clean run, so that behaviour common to both prompts
does not count. An effect is clean minus patched: the contribution of the path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.analyses.circuits import exact_edges
from patchsweep.analyses.circuits.edge_batch import Changes, EdgeBatch, blocks_and_nodes
from patchsweep.analyses.circuits.exact import exact
from patchsweep.analyses.circuits.nodes import Edge, Reader
from patchsweep.analyses.heads.optimal import Head
from patchsweep.data.pairs import PromptPairs
from patchsweep.forward.capture import capture, watch
from patchsweep.forward.grad import frozen
from patchsweep.forward.site_locations import resolve_site
from patchsweep.forward.trace import Trace
from patchsweep.models.offload import device_of
from patchsweep.spec.batch import Batch, make_batches
from patchsweep.spec.metrics import METRICS
from patchsweep.spec.sites import SITES

LABELS = ("IO", "S2", "end")
PLACES = ("IO", "S2")  # labels whose attention from `end` is measured
METRIC = "logit_diff"
PAIRS_AT_ONCE = 16
Values = NDArray[np.float32]


def has_labels(pairs: PromptPairs) -> bool:
    """Whether every pair has the labels `LABELS`."""
    return all(label in pair.labels for pair in pairs for label in LABELS)


class Behaviour:
    """Measures heads on one task.

    Raises:
        MethodError: the model's blocks cannot be split at the residual stream.
    """

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, read: int) -> None:
        self.model, self.pairs, self.read = model, pairs, read
        self.blocks, self.nodes = blocks_and_nodes(model)
        self.shape = (len(pairs), self.nodes.n_layers, self.nodes.n_heads)
        self.points = resolve_site(self.blocks.unwrapped, SITES["z"]).points

    @torch.no_grad()
    def attention(self) -> Values:
        """Return [place, pair, layer, head]: the attention from `end` to IO and to S2."""
        pattern = resolve_site(self.blocks.unwrapped, SITES["pattern"])
        attention_to = np.full((len(PLACES), *self.shape), np.nan, np.float32)
        for batch in self._batches():
            run = capture(self.blocks.unwrapped, batch.base, [pattern])
            layers = torch.stack(run.sites["pattern"]).float().cpu().numpy()  # [layer, pair, ...]
            for row, (pair, spans) in enumerate(zip(batch.pairs, batch.spans, strict=True)):
                last = layers[:, row, :, spans["end"][1] - 1]  # [layer, head, src]
                for i, place in enumerate(PLACES):
                    attention_to[i, pair] = last[..., slice(*spans[place])].sum(axis=-1)
        return attention_to

    @torch.no_grad()
    def mean_z(self) -> list[Tensor]:
        """Return per layer [head, d_head] the mean of z over all positions of clean prompts."""
        point = resolve_site(self.blocks.unwrapped, SITES["z"])
        sums: list[Tensor] = []
        count = 0
        for batch in self._batches():
            z = capture(self.blocks.unwrapped, batch.base, [point]).sites["z"]
            batch_sums = [x.double().sum(dim=(0, 1)) for x in z]
            sums = (
                batch_sums if not sums else [a + b for a, b in zip(sums, batch_sums, strict=True)]
            )
            count += batch.base.numel()
        return [x.div(count).unflatten(-1, (self.nodes.n_heads, -1)) for x in sums]

    def direct(self, without: Sequence[Head] = ()) -> tuple[Values, Values]:
        """Return each head's direct effect on the logits, and the unpatched metrics.

        Effects are [pair, layer, head]; metrics are [run, pair], clean then corrupted. Heads in
        `without` have their mean z in both runs, at all positions.
        """
        values = np.full(self.shape, np.nan, np.float32)
        metric = np.full((2, len(self.pairs)), np.nan, np.float32)
        logits = Reader("logits", self.nodes.n_layers)
        heads = [sender for sender in self.nodes.senders if sender.kind == "head"]
        means = self.mean_z() if without else []
        with frozen(self.model):
            for batch in self._batches():
                with self._held(without, means):
                    base, source = (
                        self.blocks.trace(tokens, batch.reads)
                        for tokens in (batch.base, batch.source)
                    )
                edge_batch = self._edge_batch(batch, base, source)
                patched = exact(edge_batch, [Edge(head, logits) for head in heads])[0]
                ends = torch.stack([x[0] for x in edge_batch.references()])
                effect = (ends[0].unsqueeze(1) - patched).float().cpu().numpy()
                values[list(batch.pairs)] = effect.reshape(-1, *self.shape[1:])
                metric[:, list(batch.pairs)] = ends.float().cpu().numpy()
        return values, metric

    def through_queries(self, heads: Sequence[Head], movers: Sequence[Head]) -> Values:
        """Return the effects [pair, layer, head] of `heads` through the queries of later `movers`.

        Each is a sum over single paths to one mover's query; 0 without a later mover, NaN for
        heads that are not in `heads`.
        """
        values = np.full(self.shape, np.nan, np.float32)
        edges = []
        for layer, head in heads:
            values[:, layer, head] = 0
            edges += [
                (f"a{layer}.h{head}", f"a{at}.h{mover}.q") for at, mover in movers if at > layer
            ]
        if not edges:
            return values
        ds = exact_edges(self.model, self.pairs, edges, METRIC, direction="noising", read=self.read)
        effect = (ds["base_metric"] - ds["edge"]).isel(metric=0).transpose("pair", ...).values
        for i, (sender, _) in enumerate(edges):
            layer, head = (int(n) for n in sender[1:].split(".h"))
            values[:, layer, head] += effect[:, i]
        return values

    def _batches(self) -> Iterator[Batch]:
        for first in range(0, len(self.pairs), PAIRS_AT_ONCE):
            numbers = range(first, min(first + PAIRS_AT_ONCE, len(self.pairs)))
            yield from make_batches(
                self.pairs, numbers, "noising", self.read, device_of(self.model)
            )

    @contextmanager
    def _held(self, heads: Sequence[Head], means: Sequence[Tensor]) -> Iterator[None]:
        """Hold z of `heads` at their means in all runs inside this context."""

        def hold(layer: int, head: int, x: Tensor) -> None:
            mean = means[layer][head].to(x)
            size = len(mean)
            x[..., head * size : (head + 1) * size] = mean

        with ExitStack() as stack:
            for layer, head in heads:

                def visit(x: Tensor, layer: int = layer, head: int = head) -> None:
                    hold(layer, head, x)

                stack.enter_context(watch(self.points[layer], visit))
            yield

    def _edge_batch(self, batch: Batch, base: Trace, source: Trace) -> EdgeBatch:
        layers = range(self.nodes.n_layers)
        return EdgeBatch(
            blocks=self.blocks,
            nodes=self.nodes,
            batch=batch,
            metrics=(METRICS[METRIC],),
            base=base,
            source=source,
            changes=Changes(
                embed=torch.zeros_like(base.resid[0]),
                z=tuple(source.z[i] - base.z[i] for i in layers),
                mlp=tuple(torch.zeros_like(base.part(i, "mlp_out")) for i in layers),
            ),
            start=int((batch.base != batch.source).any(dim=0).int().argmax()),
        )
