"""One differentiable pass for all edges: what every reader reads, and the gradient there.

A reader's gradient at its own input stream goes through its norm and its projection only. Both are
known in closed form (`forward.norms`, a weight matrix), so that no reader needs a backward pass of
its own. With xc the stream (centred, for a LayerNorm) and g the gradient at the projection's output
out = scale * W (weight * xc) + b, the gradient at the stream is

    scale * weight * W^T g - xc * scale^2 / d * (g . (out - b)),

centred in turn. Sums over nodes come before the products. Readers without a closed form (quantised
weights, other norms) take one backward pass each, through the same graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from patchsweep.analyses.circuits.nodes import Nodes
from patchsweep.attribution import RULES
from patchsweep.attribution.estimates import Work
from patchsweep.forward.block_structure import write_scales
from patchsweep.forward.blockwise import Blocks
from patchsweep.forward.capture import watch
from patchsweep.forward.grad import Activations, GradientModel, Place
from patchsweep.forward.norms import NormForm, is_norm, norm_form
from patchsweep.forward.pattern import Prefix
from patchsweep.forward.unwrapped import HookLocation
from patchsweep.spec.sites import SITES

PROJECTED = ("q", "k", "v")


@dataclass(eq=False)
class _Norm:
    """A norm's call, or none: then the output is the input."""

    x: Tensor  # [row, pos, d_model], part of the graph
    y: Tensor
    module: nn.Module | None = None
    form: NormForm | None = None
    scale: Tensor | None = None  # [row, pos, 1]; None: it has no closed form

    @property
    def is_closed(self) -> bool:
        return self.module is None or self.scale is not None


@dataclass(eq=False)
class _Layer:
    """What one block's readers read, and its writes. Tensors are part of the graph."""

    stream: Tensor  # [row, pos, d_model]
    norms: list[_Norm] = field(default_factory=list)  # in the order of their calls
    reads: dict[str, _Norm] = field(default_factory=dict)  # q, k, v, mlp -> the norm before it
    outputs: dict[str, Tensor] = field(default_factory=dict)  # q, k, v; mlp: the MLP's own input
    writes: dict[str, Tensor] = field(default_factory=dict)  # z, attn (before its norm), mlp_out
    mlp: Tensor | None = None  # output of an MLP that is no module with one input


class EdgeModel:
    """A model whose readers and writers are known. `blocks` and `nodes` are its own."""

    def __init__(self, blocks: Blocks, nodes: Nodes) -> None:
        self.blocks, self.nodes = blocks, nodes
        own = [SITES[name] for name in PROJECTED]
        self.gradients = GradientModel(blocks.unwrapped.bridge, (), own, unwrapped=blocks.unwrapped)
        self.scales = write_scales(blocks)
        self._forms: dict[nn.Module, NormForm] = {}
        self._weights: dict[tuple[int, str], tuple[Tensor, Tensor] | None] = {}
        # a norm after attention, so that a write is not linear in z
        self.bends = any(
            blocks.norm_after_attention(layer) is not None for layer in range(nodes.n_layers)
        )

    def run(
        self,
        tokens: Int[Tensor, "row pos"],
        reads: Sequence[int],
        *,
        prefix: Prefix | None = None,
        keep_from: int = 0,
    ) -> Activations:
        """Return the senders' activations `embed`, `z` and `mlp_out`; see `GradientModel`."""
        kept: dict[str, list[Tensor]] = {"embed": [], "z": [], "mlp_out": []}
        skipped = keep_from if prefix is None else 0

        def keep(name: str, x: Tensor) -> None:
            flat = x.reshape(len(tokens), -1, x.shape[-1])
            kept[name].append(flat[:, skipped:].clone() if skipped else flat)

        def hooks() -> AbstractContextManager[Any]:
            stack = ExitStack()
            first = HookLocation(self.blocks.unwrapped.blocks[0], "in")
            stack.enter_context(watch(first, partial(keep, "embed")))
            for layer in range(self.nodes.n_layers):
                points = self.blocks.write_points(layer)
                for name in ("z", "mlp_out"):
                    stack.enter_context(watch(points[name], partial(keep, name)))
            return stack

        run = self.gradients.activations(
            tokens, reads, (), prefix=prefix, keep_from=keep_from, after=hooks
        )
        return replace(run, sites=kept)

    def form(self, module: nn.Module, like: Tensor) -> NormForm:
        """Return the closed form of a norm of the running block."""
        if module not in self._forms:
            self._forms[module] = norm_form(module, like)
        return self._forms[module]

    def projection(self, layer: int, kind: str) -> tuple[Tensor, Tensor] | None:
        """Return weight `[out, in]` and bias `[out]`, fp32; z: W_O; None: unknown."""
        key = (layer, kind)
        if key not in self._weights:
            points: Sequence[HookLocation]
            if kind == "z":
                points = (HookLocation(self.blocks.write_points(layer)["z"].module, "out"),)
            else:
                points = self.gradients.points[kind].points[layer : layer + 1]
            self._weights[key] = self._linear(*points) if points else None
        return self._weights[key]

    def _linear(self, point: HookLocation) -> tuple[Tensor, Tensor] | None:
        module = point.module
        if point.side != "out" or not isinstance(module, nn.Linear | Conv1D):
            return None
        weight = self.blocks.unwrapped.values_of(module, "weight")
        if weight is None or not weight.is_floating_point():  # quantised
            return None
        weight = weight.T if isinstance(module, Conv1D) else weight
        bias = self.blocks.unwrapped.values_of(module, "bias")
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if point.columns is not None:
            columns = point.columns.to(weight.device)
            weight, bias = weight[columns], bias[columns]
        return weight.float(), bias.float()


@dataclass(eq=False)
class EdgePass:
    """A pass over rows `[node, pair]`, with its graph. Readers' gradients come from `gradients`."""

    model: EdgeModel
    n_nodes: int
    layers: list[_Layer]
    final: Tensor  # [row, pos, d_model] output of the last block
    logits: Float[Tensor, "row read d_vocab"]
    frozen_norms: bool = False  # scales of norms are constants

    def gradients(self, score: Float[Tensor, ""]) -> Gradients:
        """Return the gradients of one number."""
        named = [
            ((layer, name), x)
            for layer, of_layer in enumerate(self.layers)
            for group in (of_layer.outputs, of_layer.writes)
            for name, x in group.items()
        ]
        for layer, of_layer in enumerate(self.layers):
            if of_layer.mlp is not None:
                named.append(((layer, "mlp_raw"), of_layer.mlp))
        named += [((0, "embed"), self.layers[0].stream), ((len(self.layers), "final"), self.final)]
        found = torch.autograd.grad(
            score, [x for _, x in named], retain_graph=True, materialize_grads=True
        )
        return Gradients(self, {key: grad for (key, _), grad in zip(named, found, strict=True)})

    def activations(self) -> Activations:
        """Return the senders' activations of a pass over one node."""
        sites = {name: [x.writes[name].detach() for x in self.layers] for name in ("z", "mlp_out")}
        rows = len(self.logits)
        sites = {name: [x.reshape(rows, -1, x.shape[-1]) for x in xs] for name, xs in sites.items()}
        return Activations(
            {"embed": [self.layers[0].stream.detach()], **sites}, self.logits.detach(), None
        )

    def by_node(self, x: Tensor) -> Tensor:
        """Return `[node, pair, pos, width]` of `[row, pos, width]`, fp32."""
        n_pairs = len(self.logits) // self.n_nodes
        return x.detach().float().reshape(self.n_nodes, n_pairs, -1, x.shape[-1])


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients of one metric at a pass's activations."""

    of: EdgePass
    at: Mapping[tuple[int, str], Tensor]
    node: int | None = None  # the one node that counts, and has a weight; None: all

    def by_node(self, x: Tensor) -> Tensor:
        """Return `[node, pair, pos, width]` of the nodes that count; see `EdgePass.by_node`."""
        found = self.of.by_node(x)
        return found if self.node is None else found[self.node : self.node + 1]

    def of_node(self, node: int) -> Gradients:
        """Return the gradients of one node."""
        return replace(self, node=node)

    def senders(
        self, changes: Mapping[str, Sequence[Tensor]], weights: Float[Tensor, "rule node"]
    ) -> Float[Tensor, "rule pair sender pos"]:
        """Return change times gradient at each sender's own output, summed over nodes."""

        def along(name: str, layer: int, change: Tensor, n_units: int) -> Tensor:
            grad = torch.einsum("rn,nptd->rptd", weights, self.by_node(self.at[layer, name]))
            return (grad * change).unflatten(-1, (n_units, -1)).sum(dim=-1)

        n_heads = self.of.model.nodes.n_heads
        parts = [along("embed", 0, changes["embed"][0], 1)]
        for layer, (z, mlp) in enumerate(zip(changes["z"], changes["mlp_out"], strict=True)):
            parts += [along("z", layer, z, n_heads), along("mlp_out", layer, mlp, 1)]
        return torch.cat(parts, dim=-1).transpose(2, 3)

    def readers(
        self, layer: int, weights: Float[Tensor, "rule node"]
    ) -> Float[Tensor, "rule pair reader pos d_model"]:
        """Return the gradients at the readers' own streams, summed over nodes, in reader order."""
        if layer == len(self.of.layers):
            final = self.by_node(self.at[layer, "final"])
            return torch.einsum("rn,nptd->rptd", weights, final).unsqueeze(2)
        parts = [self._projected(layer, kind, weights) for kind in PROJECTED]
        return torch.cat([*parts, self._mlp(layer, weights)], dim=2)

    def _projected(self, layer: int, kind: str, weights: Tensor) -> Tensor:
        here, model = self.of.layers[layer], self.of.model
        n_heads = model.nodes.n_heads if kind == "q" else model.nodes.n_kv_heads
        matrix, norm = model.projection(layer, kind), here.reads.get(kind)
        grad, out = self.at[layer, kind], here.outputs[kind]
        if matrix is None or norm is None or not (norm.is_closed and _same(norm.x, here.stream)):
            each = [
                self._autograd(out, _of_head(grad, head, n_heads), here.stream, weights)
                for head in range(n_heads)
            ]
            return torch.cat(each, dim=2)
        weight, bias = matrix
        by_head = weight.unflatten(0, (n_heads, -1))

        def back(x: Tensor) -> Tensor:  # [..., width] -> [..., head, d_model]
            return torch.einsum("...hk,hkd->...hd", x.unflatten(-1, (n_heads, -1)), by_head)

        def shares(x: Tensor) -> Tensor:
            return x.unflatten(-1, (n_heads, -1)).sum(dim=-1)

        shift = bias if norm.form is None else bias + weight @ norm.form.bias
        return self._through(norm, grad, out, shift, weights, back, shares)

    def _mlp(self, layer: int, weights: Tensor) -> Tensor:
        here = self.of.layers[layer]
        norm = here.reads.get("mlp")
        if norm is None:
            assert here.mlp is not None
            parallel = self.of.model.nodes.parallel[layer]
            own = [norm.x for norm in here.norms if not _same(norm.x, here.stream)]
            start = here.stream if parallel or not own else own[-1]
            return self._autograd(here.mlp, self.at[layer, "mlp_raw"], start, weights)
        grad, out = self.at[layer, "mlp"], here.outputs["mlp"]
        if not norm.is_closed:
            return self._autograd(out, grad, norm.x, weights)
        shift = torch.zeros((), device=grad.device) if norm.form is None else norm.form.bias
        return self._through(
            norm, grad, out, shift, weights, lambda x: x.unsqueeze(-2), lambda x: x.sum(-1, True)
        )

    def _through(
        self,
        norm: _Norm,
        grad: Tensor,
        out: Tensor,
        shift: Tensor,
        weights: Tensor,
        back: Callable[[Tensor], Tensor],
        shares: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Return the gradients before a norm and a linear map `back`, see the module's text."""
        g = self.by_node(grad)
        if norm.form is None or norm.scale is None:
            return back(torch.einsum("rn,nptw->rptw", weights, g)).transpose(2, 3)
        scale = self.by_node(norm.scale)
        x = norm.form.centred(self.by_node(norm.x))
        first = back(torch.einsum("rn,nptw->rptw", weights, g * scale)) * norm.form.weight
        if self.of.frozen_norms:
            return norm.form.centred(first).transpose(2, 3)
        share = shares(g * (self.by_node(out) - shift)) * scale.square() / x.shape[-1]
        second = torch.einsum("rn,npth,nptd->rpthd", weights, share, x)
        return norm.form.centred(first - second).transpose(2, 3)

    def _autograd(self, out: Tensor, grad: Tensor, start: Tensor, weights: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(out, start, grad, retain_graph=True, materialize_grads=True)
        return torch.einsum("rn,nptd->rptd", weights, self.by_node(found)).unsqueeze(2)


def run_edge_pass(
    model: EdgeModel,
    work: Work,
    streams: Float[Tensor, "row pos d_model"] | None,
    n_nodes: int,
    rules: str | None = None,
) -> EdgePass:
    """Run the base prompts, or `streams` `[(node, pair), ...]` that enter at block 0.

    `rules` names the rules of the backward pass (`attribution.RULES`); None: ordinary gradients.
    """
    n_layers = model.nodes.n_layers
    layers: list[_Layer] = []
    final: list[Tensor] = []

    def stream(x: Tensor) -> None:
        layers.append(_Layer(x))

    def visit(place: Place, x: Tensor) -> None:
        if place.site.projected:
            layers[place.layer].outputs[place.site.name] = x

    def enter(layer: int, kind: str, x: Tensor) -> None:
        here = layers[layer]
        norm = next((norm for norm in here.norms if _same(norm.y, x)), _Norm(x, x))
        if norm.module is not None and norm.form is None:
            norm.form = model.form(norm.module, norm.x.detach())
            norm.scale = norm.form.scale(norm.x.detach(), norm.y.detach())
        here.reads[kind] = norm

    def enter_mlp(layer: int, x: Tensor) -> Tensor:
        enter(layer, "mlp", x)
        layers[layer].outputs["mlp"] = own = x.view_as(x)  # its gradient is the MLP's alone
        return own

    def leave_mlp(layer: int, x: Tensor) -> None:
        layers[layer].mlp = x

    def write(layer: int, name: str, x: Tensor) -> None:
        layers[layer].writes[name] = x

    def normed(layer: int, module: nn.Module, args: Any, out: Tensor) -> None:
        layers[layer].norms.append(_Norm(args[0], out, module))

    def hooks() -> AbstractContextManager[Any]:
        stack = ExitStack()
        blocks = model.blocks
        for layer, block in enumerate(blocks.unwrapped.blocks):
            stack.enter_context(watch(HookLocation(block, "in"), stream))
            for module in block.modules():
                if is_norm(module):
                    stack.callback(module.register_forward_hook(partial(normed, layer)).remove)
            for kind in PROJECTED:
                if points := model.gradients.points[kind].points:
                    at = HookLocation(points[layer].module, "in")
                    stack.enter_context(watch(at, partial(enter, layer, kind)))
            for name, point in blocks.write_points(layer).items():
                stack.enter_context(watch(point, partial(write, layer, name)))
            at = blocks.mlp_point(layer)
            see = enter_mlp if at.side == "in" else leave_mlp
            stack.enter_context(watch(at, partial(see, layer)))
        stack.enter_context(watch(HookLocation(blocks.unwrapped.blocks[-1], "out"), final.append))
        return stack

    under = nullcontext() if rules is None else RULES[rules](model.blocks.unwrapped)
    with torch.enable_grad(), under:
        logits = work.forward(
            work.batch.base,
            visit,
            sites=[SITES[kind] for kind in PROJECTED],
            gradient=streams is None,
            entries=None if streams is None else {0: streams.requires_grad_()},
            after=hooks,
        )
    assert len(layers) == n_layers
    return EdgePass(model, n_nodes, layers, final[0], logits, rules is not None)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are one, or one is the other in another shape."""
    first, second = (x if x._base is None else x._base for x in (a, b))
    return first is second and a.numel() == b.numel()


def _of_head(grad: Tensor, head: int, n_heads: int) -> Tensor:
    """Return `grad` with zeros for all heads but one."""
    if grad.ndim == 4:  # [row, head, pos, d]
        only = torch.zeros_like(grad)
        only[:, head] = grad[:, head]
        return only
    by_head = grad.unflatten(-1, (n_heads, -1))
    only = torch.zeros_like(by_head)
    only[..., head, :] = by_head[..., head, :]
    return only.flatten(-2)
