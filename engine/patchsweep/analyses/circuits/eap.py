"""Edge attribution patching: the first-order effect of every edge, from one backward pass.

    score(u -> v) = what u's change adds to the residual stream · the metric's gradient with
                    respect to v's input alone, taken before v's norm

(Syed et al., arXiv 2310.10348; with integrated gradients Hanna et al., arXiv 2403.17806.) The
stream is a sum, so the scores of u over all readers add up to attribution patching's estimate
for u itself. Each run checks that, and refuses a model where it does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchsweep.analyses.circuits.edge_batch import EdgeBatch, Question
from patchsweep.attribution.integrated import nodes as quadrature
from patchsweep.errors import MethodError
from patchsweep.forward.block_args import first_of
from patchsweep.forward.blockwise import Trace
from patchsweep.spec.finite import check_finite, names_of
from patchsweep.spec.metrics import Metric, has_gradient

# largest difference between a sender's summed edges and its own estimate, as a share of the
# largest estimate, that rounding may explain
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.3
# tokens of one layer's readers in one backward pass
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Gradients:
    """Of one metric, summed over the pairs, at the places of a trace."""

    embed: Tensor
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]  # where the MLP ends
    mlp_out: tuple[Tensor, ...]  # after a norm of its own
    final: Tensor  # the last block's output


def eap(
    edge_batch: EdgeBatch, *, steps: int | None = None, positions: bool = False
) -> Float[Tensor, "metric pair sender reader ..."]:
    """Signed estimates of metric(patched) - metric(base); NaN where there is no edge.

    With `steps`, gradients are averaged at Gauss-Legendre nodes on the way from the base to the
    source prompt's embeddings. With `positions` there is a last axis, the position where the
    edge is read and written. Needs a scene made with `gradient`, unless `steps` are given.

    Raises:
        MethodError: the scores do not add up, so that the model is not a sum of its parts.
    """
    total: Tensor | None = None
    expected: Tensor | None = None
    for share, weight in [(0.0, 1.0)] if steps is None else quadrature(steps):
        trace = edge_batch.base
        if steps is not None:
            stream = torch.lerp(
                edge_batch.base.resid[0].detach(), edge_batch.source.resid[0], share
            )
            trace = edge_batch.blocks.trace(
                edge_batch.batch.base, edge_batch.batch.reads, stream=stream, gradient=True
            )
        gradients = _gradients(edge_batch, trace)
        scores = weight * _scores(edge_batch, trace, gradients, positions)
        nodewise = weight * torch.stack([_atp(edge_batch, g) for g in gradients])
        total = scores if total is None else total + scores
        expected = nodewise if expected is None else expected + nodewise
    assert total is not None
    assert expected is not None
    impossible = ~_possible(edge_batch, positions)
    _check_numbers(edge_batch, total.masked_fill(impossible, 0.0))
    _check_sums(edge_batch, total, expected, positions)
    return total.masked_fill(impossible, float("nan"))


def _check_numbers(
    edge_batch: EdgeBatch, total: Float[Tensor, "metric pair sender reader ..."]
) -> None:
    """Raises ModelError if the score of an edge is NaN or infinite."""

    def where(pair: int, sender: int, reader: int, *pos: int) -> str:
        edge = f"{edge_batch.nodes.senders[sender]}->{edge_batch.nodes.readers[reader]}"
        at = f" at position {pos[0]}" if pos else ""
        return f"the estimate of edge {edge}{at} in pair {edge_batch.batch.pairs[pair]}"

    check_finite(total.detach().cpu().numpy(), names_of(edge_batch.metrics), where)


def check_gradients(question: Question, steps: int | None) -> None:
    """Pass if gradients say something about every metric.

    Raises:
        MethodError: with what to use in its place.
    """
    if steps is not None:
        quadrature(steps)
        if not question.intervention.from_source:
            raise MethodError(
                f"steps={steps} walks from the base prompt's embeddings to the source prompt's, "
                f"and intervention={question.intervention.name} has no source prompt; leave "
                "steps out, or use intervention=resample"
            )
    for metric in question.metrics:
        _check_metric(metric, steps)


def _check_metric(metric: Metric, steps: int | None) -> None:
    if not metric.smooth:
        raise MethodError(
            f"metric {metric.name} changes by jumps, so its gradient is zero or undefined; use "
            "logit_diff, or exact_edges"
        )
    if metric.flat_at_base and steps is None:
        raise MethodError(
            f"metric {metric.name} is smallest at the base run, where its gradient is zero, so "
            "every edge would get 0; use the metric logit_diff, or steps=5"
        )
    if not has_gradient(metric):
        raise MethodError(
            f"metric {metric.name} returns numbers that have no gradient; write it in torch "
            "operations that keep one (no argmax, item or detach), or use exact_edges"
        )


def _possible(edge_batch: EdgeBatch, positions: bool) -> Bool[Tensor, "sender reader ..."]:
    possible = torch.from_numpy(edge_batch.nodes.possible).to(edge_batch.batch.base.device)
    return possible.unsqueeze(-1) if positions else possible


def _gradients(edge_batch: EdgeBatch, trace: Trace) -> list[Gradients]:
    """One for each metric."""
    n_layers = edge_batch.nodes.n_layers
    places = {
        "embed": [trace.resid[0]],
        "q": trace.q,
        "k": trace.k,
        "v": trace.v,
        "z": trace.z,
        "mlp": [first_of(trace.parts[layer, "mlp"]) for layer in range(n_layers)],
        "mlp_out": [first_of(trace.parts[layer, "mlp_out"]) for layer in range(n_layers)],
        "final": [trace.resid[-1]],
    }
    flat = [x for found in places.values() for x in found]
    pair = torch.arange(trace.n_pairs, device=trace.logits.device)
    with torch.enable_grad():
        scores = edge_batch.score(trace.logits, pair)
    found = []
    for i, row in enumerate(scores):
        grads = iter(
            torch.autograd.grad(
                row.sum(), flat, retain_graph=i + 1 < len(scores), materialize_grads=True
            )
        )
        by_place = {name: tuple(next(grads) for _ in xs) for name, xs in places.items()}
        (embed,), (final,) = by_place.pop("embed"), by_place.pop("final")
        found.append(Gradients(embed=embed, final=final, **by_place))
    return found


def _scores(
    edge_batch: EdgeBatch, trace: Trace, gradients: list[Gradients], positions: bool
) -> Float[Tensor, "metric pair sender reader ..."]:
    """One matrix product for the readers of each layer; 0 where there is no edge."""
    nodes = edge_batch.nodes
    writes = edge_batch.writes(trace, exact=False)
    n_pairs, n_senders, n_pos, _ = writes.shape
    shape = (len(gradients), n_pairs, n_senders, len(nodes.readers))
    length = trace.length
    scores = writes.new_zeros((*shape, length) if positions else shape)
    for layer in range(nodes.n_layers + 1):
        which = nodes.of_layer(layer)
        seen = max(nodes.n_seen(reader) for reader in nodes.readers[which])
        for metric, reads in enumerate(_reader_gradients(edge_batch, trace, gradients, layer)):
            if positions:
                by_pos = torch.einsum("pstd,prtd->psrt", writes[:, :seen], reads)
                scores[metric, :, :seen, which, length - n_pos :] = by_pos
            else:
                product = writes[:, :seen].flatten(2) @ reads.flatten(2).transpose(1, 2)
                scores[metric, :, :seen, which] = product
    # heads of a layer meet its MLP, and so the other readers in that product, which precede them
    return scores.masked_fill(~_possible(edge_batch, positions), 0.0)


def _reader_gradients(
    edge_batch: EdgeBatch, trace: Trace, gradients: list[Gradients], layer: int
) -> list[Float[Tensor, "pair reader pos d_model"]]:
    """Per metric its gradient at each reader's own copy of the stream, from the start on, fp32."""
    start = edge_batch.start
    if layer == edge_batch.nodes.n_layers:
        return [g.final[:, start:].unsqueeze(1).float() for g in gradients]
    every = torch.arange(trace.n_pairs, device=trace.logits.device)
    stream = trace.resid[layer].detach()[:, start:]
    with torch.enable_grad():
        x = stream.clone().requires_grad_()
        y = edge_batch.blocks.mlp_of(layer, x, trace, every, start)
    found = [[] for _ in gradients]  # type: list[list[Tensor]]
    per_pass = max(1, MAX_TOKENS // stream[..., 0].numel())
    for part in _head_readers(edge_batch, layer, per_pass):
        for kept, rows in zip(
            found, _head_gradients(edge_batch, trace, gradients, layer, part), strict=True
        ):
            kept.append(rows)
    for i, (kept, g) in enumerate(zip(found, gradients, strict=True)):
        cotangent = g.mlp[layer].reshape(trace.n_pairs, trace.length, -1)[:, start:]
        (grad,) = torch.autograd.grad(y, x, cotangent, retain_graph=i + 1 < len(gradients))
        kept.append(grad.unsqueeze(1))
    return [torch.cat(kept, dim=1).float() for kept in found]


def _head_readers(edge_batch: EdgeBatch, layer: int, per_pass: int) -> list[list[tuple[str, int]]]:
    """The attention readers of a layer in their order, some for each pass."""
    readers = edge_batch.nodes.readers[edge_batch.nodes.of_layer(layer)]
    heads = [(r.kind, r.head) for r in readers if r.head is not None]
    return [[*heads[i : i + per_pass]] for i in range(0, len(heads), per_pass)]


def _head_gradients(
    edge_batch: EdgeBatch,
    trace: Trace,
    gradients: list[Gradients],
    layer: int,
    readers: list[tuple[str, int]],
) -> list[Float[Tensor, "pair reader pos d_model"]]:
    """Every reader has rows of its own, through which one head's gradient alone goes back."""
    start, n_pairs, n = edge_batch.start, trace.n_pairs, len(readers)
    pair = torch.arange(n_pairs, device=trace.logits.device).repeat(n)
    with torch.enable_grad():
        x = trace.resid[layer].detach()[pair, start:].requires_grad_()
        qkv = edge_batch.blocks.qkv_of(layer, x, trace, pair, start)
        by_kind = {kind: t.unflatten(0, (n, n_pairs)) for kind, t in zip("qkv", qkv, strict=True)}
        own = [by_kind[kind][i, :, head] for i, (kind, head) in enumerate(readers)]
    found = []
    for i, g in enumerate(gradients):
        at = {"q": g.q[layer], "k": g.k[layer], "v": g.v[layer]}
        cotangents = [at[kind][:, head, start:] for kind, head in readers]
        (grad,) = torch.autograd.grad(own, x, cotangents, retain_graph=i + 1 < len(gradients))
        found.append(grad.unflatten(0, (n, n_pairs)).transpose(0, 1))
    return found


def _atp(edge_batch: EdgeBatch, g: Gradients) -> Float[Tensor, "pair sender pos"]:
    """Attribution patching's estimate for each sender, from gradients where it ends."""
    changes, n_heads = edge_batch.changes, edge_batch.nodes.n_heads
    found = [(changes.embed.float() * g.embed.float()).sum(-1, keepdim=True)]
    for layer in range(edge_batch.nodes.n_layers):
        z = changes.z[layer].float() * g.z[layer].float().reshape(changes.z[layer].shape)
        found.append(z.unflatten(-1, (n_heads, -1)).sum(-1))
        mlp = changes.mlp[layer].float()
        found.append((mlp * g.mlp_out[layer].float().reshape(mlp.shape)).sum(-1, keepdim=True))
    return torch.cat(found, dim=-1).transpose(1, 2)


def _check_sums(
    edge_batch: EdgeBatch,
    scores: Tensor,
    expected: Float[Tensor, "metric pair sender pos"],
    positions: bool,
) -> None:
    found = scores.sum(dim=3)
    if not positions:
        expected = expected.sum(dim=-1)
    scale = float(expected.abs().max())
    worst = float((found - expected).abs().max())
    tolerance = TOLERANCE.get(edge_batch.base.resid[0].dtype, LOW_PRECISION_TOLERANCE)
    if not worst <= tolerance * scale:
        raise MethodError(
            f"the edges of a sender should add up to its own estimate, and differ by {worst:.2g} "
            f"where the largest estimate is {scale:.2g}: in this model something else than "
            "heads, MLPs and the logits reads or writes the residual stream; sweep its sites "
            "instead"
        )
