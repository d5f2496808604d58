"""Edge attribution patching: the first-order effect of every edge, from one backward pass.

    score(u -> v) = change of u's write to the residual stream · the metric's gradient with
                    respect to v's own input, before v's norm

(Syed et al., arXiv 2310.10348; with integrated gradients Hanna et al., arXiv 2403.17806.) The
stream is a sum, so the scores of u over all readers sum to the attribution patching estimate for
u. Each run checks this sum and refuses a model where it does not hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad

from patchsweep.analyses.circuits.edge_batch import EdgeBatches, Question, blocks_and_nodes
from patchsweep.analyses.circuits.edge_pass import EdgeModel, EdgePass, Gradients, run_edge_pass
from patchsweep.attribution.budget import token_layers_per_pass
from patchsweep.attribution.check import check_gradient_of
from patchsweep.attribution.estimates import Work, n_shared
from patchsweep.attribution.integral import END, Rounds, stated_error
from patchsweep.attribution.quadrature import Path
from patchsweep.errors import MethodError
from patchsweep.forward.grad import Activations
from patchsweep.forward.norms import norm_form
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.spec.batch import Batch
from patchsweep.spec.finite import check_finite, names_of
from patchsweep.spec.sites import SITES

# largest rounding difference between a sender's summed edges and its own estimate, as a share of
# the largest estimate
TOLERANCE = 1e-2  # sums are in fp32, whatever the model computes in
LOW_PRECISION_TOLERANCE = 0.3  # of 16 bits


@dataclass(frozen=True)
class EdgeEstimates:
    """Estimates of all edges of one batch; NaN where there is no edge."""

    scores: Float[Tensor, "metric pair sender reader ..."]  # signed, metric(patched) - metric(base)
    errors: Float[Tensor, "metric pair sender reader ..."]  # of the integrals; NaN: not known
    # what the scores of the embeddings add up to, minus metric(source) - metric(base)
    residual: Float[Tensor, "metric pair"]
    nodes: NDArray[np.int64]  # [pair] number of gradients
    base_logits: Float[Tensor, "pair read d_vocab"]


class EapBatches(EdgeBatches[Work]):
    """The pairs of `question` in batches, with their source runs; see `EdgeBatches`."""

    @cached_property
    def model(self) -> EdgeModel:
        """The model taken apart; the intervention is prepared with it."""
        model = EdgeModel(*blocks_and_nodes(self.question.bridge))
        self.question.prepare(lambda tokens: model.run(tokens, [-1]).sites)
        return model

    def make(self, batch: Batch) -> Work:
        """See `EdgeBatches`."""
        question, gradients = self.question, self.model.gradients
        start = n_shared(gradients, batch, question.intervention)
        source = self.model.run(batch.source, batch.reads, keep_from=start)
        return Work(gradients, batch, (), question.metrics, question.intervention, source)


def eap(
    model: EdgeModel,
    work: Work,
    path: Path | None = None,
    *,
    rules: str | None = None,
    positions: bool = False,
) -> EdgeEstimates:
    """Return signed estimates of metric(patched) - metric(base) of every edge.

    With `path`, gradients are averaged between the base and the source prompt's embeddings. With
    `rules` the backward pass is that of relp or gim. With `positions` there is a last axis, the
    position of write and read.

    Raises:
        MethodError: the scores do not sum to the senders' estimates, so the stream is not a sum
            of the parts.
    """
    sums = _Sums(model, work, path, rules, positions)
    for nodes, pairs in sums.passes():
        sums.add(nodes, pairs)
    return sums.found()


class _Sums:
    """Sums of scores by the rules of a quadrature."""

    def __init__(
        self,
        model: EdgeModel,
        work: Work,
        path: Path | None,
        rules: str | None,
        positions: bool,
    ) -> None:
        self.model, self.work, self.path, self.positions = model, work, path, positions
        self.rules = rules
        batch, nodes = work.batch, model.nodes
        self.device = batch.base.device
        n_pairs = len(batch.pairs)
        self.rounds = None if path is None else Rounds(path, 1, n_pairs)
        self.base: Activations | None = None
        if path is not None:
            self.base = model.run(batch.base, batch.reads, prefix=work.prefix)
        self.n_rules = 1 if self.rounds is None else self.rounds.quadrature.n_rules
        shape = (self.n_rules, len(work.metrics), n_pairs, len(nodes.senders))
        n_pos = (batch.length,) if positions else ()
        self.scores = torch.zeros(*shape, len(nodes.readers), *n_pos, device=self.device)
        # attribution patching of the senders: what their edges add up to
        self.senders = torch.zeros(*shape, batch.length, device=self.device)

    def passes(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield nodes and pairs of passes that fit in memory."""
        n_pairs = len(self.work.batch.pairs)
        if self.rounds is None:
            yield [0], [*range(n_pairs)]
            return
        gradients = self.work.gradients
        n_tokens = (self.work.batch.length - self.work.start) * gradients.n_layers
        most = token_layers_per_pass(gradients.bridge, self.work.batch.length)
        for chosen, open_ in self.rounds(self._converged):
            pairs = np.flatnonzero(open_[0]).tolist()
            nodes = [node for node in chosen if node != END]
            size = max(1, most // (len(pairs) * n_tokens))
            for i in range(0, len(nodes), size):
                yield nodes[i : i + size], pairs

    def add(self, nodes: list[int], pairs: list[int]) -> None:
        """Run the nodes of some pairs, and add their scores to the rules' sums."""
        work, streams = self.work.rows(pairs), None
        weights = torch.ones(1, len(nodes), device=self.device)
        if self.rounds is not None and self.base is not None:
            rules = self.rounds.quadrature
            weights, fraction = (
                torch.tensor(x, dtype=torch.float32, device=self.device)
                for x in (rules.weights[:, nodes], rules.nodes[nodes].reshape(-1, 1, 1, 1))
            )
            start = self.base.sites["embed"][0][pairs]
            streams = torch.lerp(start, work.source.sites["embed"][0], fraction.to(start)).flatten(
                0, 1
            )
        found = run_edge_pass(self.model, work, streams, len(nodes), self.rules)
        if self.base is None:
            self.base = found.activations()
        base = {name: [x[pairs] for x in xs] for name, xs in self.base.sites.items()}
        changes = {
            name: [(work.values(SITES[name], layer, x) - x).float() for layer, x in enumerate(xs)]
            for name, xs in base.items()
        }
        with torch.enable_grad():
            scores = work.score(found.logits, self.base.logits[pairs]).sum(dim=1).unbind()
        with torch.no_grad():
            gradients = [found.gradients(score) for score in scores]
            for metric, of_all in enumerate(gradients):
                own = of_all.senders(changes, weights)
                self.senders[:, metric, pairs, :, self.work.start :] += own
            if not self.model.bends:
                self._add_products(
                    pairs, _writes(self.model, changes, found, 0), gradients, weights
                )
                return
            for node in range(len(nodes)):  # a norm after attention is linearised at each node
                writes = _writes(self.model, changes, found, node)
                of_node = [of_all.of_node(node) for of_all in gradients]
                self._add_products(pairs, writes, of_node, weights[:, [node]])

    def _add_products(
        self,
        pairs: list[int],
        writes: Float[Tensor, "pair sender pos d_model"],
        gradients: Sequence[Gradients],
        weights: Float[Tensor, "rule node"],
    ) -> None:
        """Add the products of writes with the gradients of each metric's readers."""
        for metric, of_metric in enumerate(gradients):
            for layer in range(self.model.nodes.n_layers + 1):
                reads = of_metric.readers(layer, weights)
                self._add_layer(metric, pairs, layer, writes, reads)

    def _add_layer(
        self, metric: int, pairs: list[int], layer: int, writes: Tensor, reads: Tensor
    ) -> None:
        """Add the products of one layer's readers `[rule, pair, reader, pos, d_model]`."""
        nodes = self.model.nodes
        readers = nodes.of_layer(layer)
        n_seen = max(nodes.n_seen(reader) for reader in nodes.readers[readers])
        # the product also pairs heads, which the layer's MLP reads, with readers before them
        possible = self._possible()[:n_seen, readers]
        for rule in range(self.n_rules):
            if self.positions:
                product = torch.einsum("pstd,pvtd->psvt", writes[:, :n_seen], reads[rule])
                target = self.scores[rule, metric][:, :n_seen, readers, self.work.start :]
            else:
                product = writes[:, :n_seen].flatten(2) @ reads[rule].flatten(2).transpose(1, 2)
                target = self.scores[rule, metric][:, :n_seen, readers]
            target[pairs] += product * possible

    def found(self) -> EdgeEstimates:
        """Return the estimates of the finest rules that ran.

        Raises:
            MethodError: edges do not add up to their senders' estimates.
            ModelError: an estimate is NaN or infinite.
        """
        assert self.base is not None
        n_pairs = len(self.work.batch.pairs)
        level = np.zeros(n_pairs, np.int64) if self.rounds is None else self.rounds.level[0]
        rows = torch.arange(n_pairs, device=self.device)
        rule = torch.from_numpy(level).to(self.device)
        scores = self.scores.transpose(1, 2)[rule, rows].transpose(0, 1)
        senders = self.senders.transpose(1, 2)[rule, rows].transpose(0, 1)
        errors = torch.full_like(scores, float("nan"))
        if self.rounds is not None:
            coarse = self.scores.transpose(1, 2)[rule - 1, rows].transpose(0, 1)
            errors = stated_error(scores, coarse)
        _check_numbers(self.model, self.work, scores)
        self._check_sums(scores, senders)
        with torch.no_grad():
            base, source = (
                self.work.score(logits, self.base.logits)
                for logits in (self.base.logits, self.work.source.logits)
            )
        impossible = self._possible() == 0
        return EdgeEstimates(
            scores=scores.masked_fill(impossible, float("nan")),
            errors=errors.masked_fill(impossible, float("nan")),
            residual=senders[:, :, 0].sum(dim=-1) - (source - base),
            nodes=np.ones(n_pairs, np.int64) if self.rounds is None else self.rounds.counts[0],
            base_logits=self.base.logits,
        )

    def _possible(self) -> Bool[Tensor, "sender reader ..."]:
        possible = torch.from_numpy(self.model.nodes.possible).to(self.device)
        return possible.unsqueeze(-1) if self.positions else possible

    def _converged(self, rule: int) -> NDArray[np.bool_]:
        """Return `[1, pair]`: the errors of all edges are within the tolerance."""
        assert self.path is not None
        fine, coarse = (self.scores[i].flatten(2) for i in (rule, rule - 1))
        error, largest = stated_error(fine, coarse).amax(dim=2), fine.abs().amax(dim=2)
        done: NDArray[np.bool_] = (
            (error <= self.path.rtol * largest).all(dim=0, keepdim=True).cpu().numpy()
        )
        return done

    def _check_sums(self, scores: Tensor, senders: Tensor) -> None:
        summed = scores.sum(dim=3)
        expected = senders if self.positions else senders.sum(dim=-1)
        scale = float(expected.abs().max())
        worst = float((summed - expected).abs().max())
        low = self.model.blocks.unwrapped.dtype in SIXTEEN_BITS
        tolerance = LOW_PRECISION_TOLERANCE if low else TOLERANCE
        if not worst <= tolerance * scale:
            raise MethodError(
                "the edges of a sender should add up to its own estimate, and differ by "
                f"{worst:.2g} where the largest estimate is {scale:.2g}: in this model something "
                "else than heads, MLPs and the logits reads or writes the residual stream; sweep "
                "its sites instead"
            )


def _writes(
    model: EdgeModel, changes: dict[str, list[Tensor]], found: EdgePass, node: int
) -> Float[Tensor, "pair sender pos d_model"]:
    """Return what each sender's change adds to the residual stream, to first order at a node."""
    blocks, n_heads = model.blocks, model.nodes.n_heads
    parts = [changes["embed"][0].unsqueeze(1)]
    for layer, (z, mlp) in enumerate(zip(changes["z"], changes["mlp_out"], strict=True)):
        known = model.projection(layer, "z")
        if known is None:
            heads = blocks.head_writes(layer, z.to(blocks.unwrapped.dtype), n_heads).float()
            heads = heads.transpose(0, 1)
        else:
            by_head = z.unflatten(-1, (n_heads, -1))
            weight = known[0].T.unflatten(0, (n_heads, -1))
            heads = torch.einsum("pthk,hkd->phtd", by_head, weight)
        after = blocks.norm_after_attention(layer)
        if after is not None:
            at = found.by_node(found.layers[layer].writes["attn"])[node].unsqueeze(1)
            dtype = blocks.unwrapped.dtype
            with blocks.unwrapped.block_at_hand(layer), forward_ad.dual_level():
                if found.frozen_norms:
                    heads = _through_frozen(after, at.to(dtype), heads)
                else:
                    dual = forward_ad.make_dual(
                        at.expand_as(heads).to(dtype).contiguous(), heads.to(dtype)
                    )
                    heads = forward_ad.unpack_dual(after.forward(dual)).tangent.float()
        attn_scale, mlp_scale = model.scales[layer]
        parts += [heads * attn_scale, (mlp * mlp_scale).unsqueeze(1)]
    return torch.cat(parts, dim=1)


def _through_frozen(norm: nn.Module, at: Tensor, change: Tensor) -> Tensor:
    """Return what a change before a norm adds behind it, with the scale that the norm has at `at`.

    Raises:
        MethodError: the norm is neither a LayerNorm nor an RMS norm.
    """
    form = norm_form(norm, at)
    scale = form.scale(at, norm.forward(at))
    if scale is None:
        raise MethodError(
            f"{type(norm).__name__} is neither a LayerNorm nor an RMS norm, so there is no rule "
            "that freezes it; use eap"
        )
    return form.centred(change) * scale * form.weight


def _check_numbers(
    model: EdgeModel, work: Work, scores: Float[Tensor, "metric pair sender reader ..."]
) -> None:
    """Raise ModelError if the score of an edge is NaN or infinite."""

    def where(pair: int, sender: int, reader: int, *pos: int) -> str:
        edge = f"{model.nodes.senders[sender]}->{model.nodes.readers[reader]}"
        at = f" at position {pos[0]}" if pos else ""
        return f"the estimate of edge {edge}{at} in pair {work.batch.pairs[pair]}"

    check_finite(scores.cpu().numpy(), names_of(work.metrics), where)


def check_gradients(question: Question, path: Path | None) -> None:
    """Raise unless gradients can attribute every metric.

    Raises:
        MethodError: they cannot; the message names an alternative.
    """
    if path is not None and not question.intervention.from_source:
        raise MethodError(
            f"steps={path.steps} walks from the base prompt's embeddings to the source prompt's, "
            f"and intervention={question.intervention.name} has no source prompt; leave steps "
            "out, or use intervention=resample"
        )
    zeros = "every edge would get 0; use the metric logit_diff, or steps=5"
    for metric in question.metrics:
        check_gradient_of(metric, "exact_edges", zeros if path is None else "")
