"""Edge attribution patching: the first-order effect of every edge, from one backward pass.

    score(u -> v) = change of u's write to the residual stream · the metric's gradient with
                    respect to v's own input, before v's norm

(Syed et al., arXiv 2310.10348; with integrated gradients Hanna et al., arXiv 2403.17806.) The
stream is a sum, so the scores of u over all readers sum to the attribution patching estimate for
u. Each run checks this sum and refuses a model where it does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from patchsweep.analyses.circuits.edge_batch import EdgeBatch, Question
from patchsweep.arguments import whole_number
from patchsweep.attribution.quadrature import gauss
from patchsweep.errors import MethodError
from patchsweep.forward.block_args import first_of
from patchsweep.forward.trace import Trace
from patchsweep.spec.finite import check_finite, names_of
from patchsweep.spec.metrics import Metric, has_gradient

# largest rounding difference between a sender's summed edges and its own estimate, as a share of
# the largest estimate
TOLERANCE = {torch.float32: 1e-2, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.3
# most tokens of one layer's readers in one backward pass
MAX_TOKENS = 8192


@dataclass(frozen=True)
class Gradients:
    """Gradients of one metric, summed over the pairs, at the activations of a trace."""

    embed: Tensor
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp: tuple[Tensor, ...]  # output of the MLP
    mlp_out: tuple[Tensor, ...]  # output after the MLP's own norm
    final: Tensor  # output of the last block


def eap(
    edge_batch: EdgeBatch, *, steps: int | None = None, positions: bool = False
) -> Float[Tensor, "metric pair sender reader ..."]:
    """Return signed estimates of metric(patched) - metric(base); NaN where there is no edge.

    With `steps`, gradients are averaged at Gauss-Legendre nodes between the base and the source
    prompt's embeddings. With `positions` there is a last axis, the position of write and read.
    Without `steps`, the edge batch must be made with `gradient`.

    Raises:
        MethodError: the scores do not sum to the senders' estimates, so the stream is not a sum
            of the parts.
    """
    total: Tensor | None = None
    expected: Tensor | None = None
    for fraction, weight in [(0.0, 1.0)] if steps is None else zip(gauss(steps).nodes.tolist(), gauss(steps).weights[-1].tolist()):
        trace = edge_batch.base
        if steps is not None:
            stream = torch.lerp(
                edge_batch.base.resid[0].detach(), edge_batch.source.resid[0], fraction
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
    """Raise ModelError if the score of an edge is NaN or infinite."""

    def where(pair: int, sender: int, reader: int, *pos: int) -> str:
        edge = f"{edge_batch.nodes.senders[sender]}->{edge_batch.nodes.readers[reader]}"
        at = f" at position {pos[0]}" if pos else ""
        return f"the estimate of edge {edge}{at} in pair {edge_batch.batch.pairs[pair]}"

    check_finite(total.detach().cpu().numpy(), names_of(edge_batch.metrics), where)


def check_gradients(question: Question, steps: int | None) -> None:
    """Raise unless gradients can attribute every metric.

    Raises:
        MethodError: they cannot; the message names an alternative.
    """
    if steps is not None:
        whole_number("steps", steps, least=1, error=MethodError)
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
    """Return the gradients of each metric."""
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
    flat = [x for result in places.values() for x in result]
    pair = torch.arange(trace.n_pairs, device=trace.logits.device)
    with torch.enable_grad():
        scores = edge_batch.score(trace.logits, pair)
    result = []
    for i, row in enumerate(scores):
        grads = iter(
            torch.autograd.grad(
                row.sum(), flat, retain_graph=i + 1 < len(scores), materialize_grads=True
            )
        )
        by_place = {name: tuple(next(grads) for _ in xs) for name, xs in places.items()}
        (embed,), (final,) = by_place.pop("embed"), by_place.pop("final")
        result.append(Gradients(embed=embed, final=final, **by_place))
    return result


def _scores(
    edge_batch: EdgeBatch, trace: Trace, gradients: list[Gradients], positions: bool
) -> Float[Tensor, "metric pair sender reader ..."]:
    """Return the scores, from one matrix product per layer of readers; 0 where there is no edge."""
    nodes = edge_batch.nodes
    writes = edge_batch.writes(trace, exact=False)
    n_pairs, n_senders, n_pos, _ = writes.shape
    shape = (len(gradients), n_pairs, n_senders, len(nodes.readers))
    length = trace.length
    scores = writes.new_zeros((*shape, length) if positions else shape)
    for layer in range(nodes.n_layers + 1):
        readers = nodes.of_layer(layer)
        n_seen = max(nodes.n_seen(reader) for reader in nodes.readers[readers])
        for metric, reads in enumerate(_reader_gradients(edge_batch, trace, gradients, layer)):
            if positions:
                by_pos = torch.einsum("pstd,prtd->psrt", writes[:, :n_seen], reads)
                scores[metric, :, :n_seen, readers, length - n_pos :] = by_pos
            else:
                product = writes[:, :n_seen].flatten(2) @ reads.flatten(2).transpose(1, 2)
                scores[metric, :, :n_seen, readers] = product
    # the product of a layer also pairs its heads, which its MLP reads, with readers before them
    return scores.masked_fill(~_possible(edge_batch, positions), 0.0)


def _reader_gradients(
    edge_batch: EdgeBatch, trace: Trace, gradients: list[Gradients], layer: int
) -> list[Float[Tensor, "pair reader pos d_model"]]:
    """Return per metric its fp32 gradient at each reader's own input stream, from `start` on."""
    start = edge_batch.start
    if layer == edge_batch.nodes.n_layers:
        return [g.final[:, start:].unsqueeze(1).float() for g in gradients]
    all_pairs = torch.arange(trace.n_pairs, device=trace.logits.device)
    stream = trace.resid[layer].detach()[:, start:]
    with torch.enable_grad():
        x = stream.clone().requires_grad_()
        y = edge_batch.blocks.mlp_of(layer, x, trace, all_pairs, start)
    parts = [[] for _ in gradients]  # type: list[list[Tensor]]
    per_pass = max(1, MAX_TOKENS // stream[..., 0].numel())
    for part in _head_readers(edge_batch, layer, per_pass):
        for metric_parts, rows in zip(
            parts, _head_gradients(edge_batch, trace, gradients, layer, part), strict=True
        ):
            metric_parts.append(rows)
    for i, (metric_parts, g) in enumerate(zip(parts, gradients, strict=True)):
        cotangent = g.mlp[layer].reshape(trace.n_pairs, trace.length, -1)[:, start:]
        (grad,) = torch.autograd.grad(y, x, cotangent, retain_graph=i + 1 < len(gradients))
        metric_parts.append(grad.unsqueeze(1))
    return [torch.cat(metric_parts, dim=1).float() for metric_parts in parts]


def _head_readers(edge_batch: EdgeBatch, layer: int, per_pass: int) -> list[list[tuple[str, int]]]:
    """Return the attention readers of a layer, in order, in groups of `per_pass`."""
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
    """Return per metric the gradient of each reader's input, from rows of its own per reader."""
    start, n_pairs, n = edge_batch.start, trace.n_pairs, len(readers)
    pair = torch.arange(n_pairs, device=trace.logits.device).repeat(n)
    with torch.enable_grad():
        x = trace.resid[layer].detach()[pair, start:].requires_grad_()
        qkv = edge_batch.blocks.qkv_of(layer, x, trace, pair, start)
        by_kind = {kind: t.unflatten(0, (n, n_pairs)) for kind, t in zip("qkv", qkv, strict=True)}
        outputs = [by_kind[kind][i, :, head] for i, (kind, head) in enumerate(readers)]
    result = []
    for i, g in enumerate(gradients):
        gradient_of = {"q": g.q[layer], "k": g.k[layer], "v": g.v[layer]}
        cotangents = [gradient_of[kind][:, head, start:] for kind, head in readers]
        (grad,) = torch.autograd.grad(outputs, x, cotangents, retain_graph=i + 1 < len(gradients))
        result.append(grad.unflatten(0, (n, n_pairs)).transpose(0, 1))
    return result


def _atp(edge_batch: EdgeBatch, g: Gradients) -> Float[Tensor, "pair sender pos"]:
    """Return the attribution patching estimate for each sender, from gradients at its output."""
    changes, n_heads = edge_batch.changes, edge_batch.nodes.n_heads
    estimates = [(changes.embed.float() * g.embed.float()).sum(-1, keepdim=True)]
    for layer in range(edge_batch.nodes.n_layers):
        z = changes.z[layer].float() * g.z[layer].float().reshape(changes.z[layer].shape)
        estimates.append(z.unflatten(-1, (n_heads, -1)).sum(-1))
        mlp = changes.mlp[layer].float()
        estimates.append((mlp * g.mlp_out[layer].float().reshape(mlp.shape)).sum(-1, keepdim=True))
    return torch.cat(estimates, dim=-1).transpose(1, 2)


def _check_sums(
    edge_batch: EdgeBatch,
    scores: Tensor,
    expected: Float[Tensor, "metric pair sender pos"],
    positions: bool,
) -> None:
    summed = scores.sum(dim=3)
    if not positions:
        expected = expected.sum(dim=-1)
    scale = float(expected.abs().max())
    worst = float((summed - expected).abs().max())
    tolerance = TOLERANCE.get(edge_batch.base.resid[0].dtype, LOW_PRECISION_TOLERANCE)
    if not worst <= tolerance * scale:
        raise MethodError(
            f"the edges of a sender should add up to its own estimate, and differ by {worst:.2g} "
            f"where the largest estimate is {scale:.2g}: in this model something else than "
            "heads, MLPs and the logits reads or writes the residual stream; sweep its sites "
            "instead"
        )
