"""bf16 matrix products in an unwrapped model; everything else of a block stays in fp32.

The linear layers of the blocks take their input in bf16, against weights cast once, and hand on
the model's dtype, fp32 as a rule, so that norms, rotations, attention and residual adds stay as
exact as they were. Where oneDNN multiplies, the gate of a gated MLP is applied to the fp32 sums
within the two products that it joins: fewer roundings, and fewer passes over memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUTanh, SiLUActivation
from transformers.pytorch_utils import Conv1D

from patchsweep.forward.fused_layers import GatedMLP
from patchsweep.models.quantised import PLAIN

_Layer = Callable[[], tuple[Tensor, Tensor | None]]  # weight [out, in] and bias, in bf16
_Forward = Callable[[Tensor], Tensor]

# what oneDNN calls the activations that it applies within a product: attribute, algorithm
_ACTIVATIONS: dict[type[nn.Module], tuple[str, str]] = {
    nn.SiLU: ("swish", ""),
    SiLUActivation: ("swish", ""),
    GELUTanh: ("gelu", "tanh"),
}


class _Cast:
    """The bf16 form `[row, d]` of a tensor, kept while the layers that share it ask for it.

    On a CPU it has a round number of rows, the last of which hold anything: oneDNN compiles a
    product for each number of rows, which takes longer than to run it once.
    """

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self._source or self._result is None:
            flat = x.reshape(-1, x.shape[-1])
            n_rows = _round_up(len(flat)) if x.device.type == "cpu" else len(flat)
            self._result = flat.new_empty(n_rows, x.shape[-1], dtype=torch.bfloat16)
            self._result[: len(flat)] = flat
            self._source = x
        return self._result

    def first_rows(self, result: Tensor, shape: torch.Size) -> Tensor:
        """The part of `result` that is not filling, as `[*shape, d]`; its bf16 form is known."""
        self._source = result[: shape.numel()].view(*shape, result.shape[-1])
        self._result = result
        return self._source


def _round_up(n: int) -> int:
    step = 64 if n <= 512 else 256
    return -(-n // step) * step


def use_bf16_products(blocks: Sequence[nn.Module]) -> Collection[nn.Module]:
    """Let the linear layers of `blocks` (of an unwrapped model: they are changed) multiply in bf16.

    Returns these layers. Others, such as experts that keep their weights in one three-axis
    parameter, are left as they are.
    """
    cast = _Cast()  # one for all: what it keeps is as large as a packed batch
    changed: set[nn.Module] = set()
    for block in blocks:
        layers: dict[nn.Module, _Layer] = {}
        for module in block.modules():
            if _is_plain(module):
                layers[module] = _layer(module)
                module.forward = _product(module, cast, layers[module])  # type: ignore[method-assign]
        for module in block.modules():
            if isinstance(module, GatedMLP) and _is_fusible(module, layers):
                module.forward = _gated(module, cast, layers)  # type: ignore[assignment, method-assign]
        changed.update(layers)
    return changed


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear | Conv1D]:
    """Whether the module multiplies by its weight and does nothing else: quantised layers are
    linear layers too, by their class, but their weights are packed or have a scale."""
    forward = type(module).forward
    return forward in (nn.Linear.forward, Conv1D.forward) and module.weight.dtype in PLAIN


def _layer(module: nn.Linear | Conv1D) -> _Layer:
    if module.weight.is_meta:  # fetched for each visit, and cast then
        return lambda: _in_bf16(module)
    kept = _in_bf16(module)
    return lambda: kept


def _in_bf16(module: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    weight = module.weight.detach()
    # contiguous as [out, in], which is what the product wants
    weight = (weight.T if isinstance(module, Conv1D) else weight).to(torch.bfloat16).contiguous()
    bias = None if module.bias is None else module.bias.detach().to(torch.bfloat16)
    return weight, bias


def _product(module: nn.Linear | Conv1D, cast: _Cast, layer: _Layer) -> _Forward:
    def forward(x: Tensor) -> Tensor:
        y = F.linear(cast(x), *layer())[: x.shape[:-1].numel()]
        return y.float().view(*x.shape[:-1], y.shape[-1])

    return forward


def _is_fusible(mlp: GatedMLP, layers: Mapping[nn.Module, _Layer]) -> bool:
    """Whether oneDNN can apply the gate of `mlp` within its products."""
    return (
        type(mlp.act_fn) in _ACTIVATIONS
        and all(part in layers for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _gated(mlp: GatedMLP, cast: _Cast, layers: Mapping[nn.Module, _Layer]) -> _Forward:
    attribute, algorithm = _ACTIVATIONS[type(mlp.act_fn)]
    gate, up, act, down = mlp.gate_proj, mlp.up_proj, mlp.act_fn, mlp.down_proj
    gate_layer, up_layer = layers[gate], layers[up]
    # what `torch.compile` emits for such a layer on a CPU
    product = torch.ops.mkldnn._linear_pointwise

    def forward(x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            wide = cast(x)
            gates = product(wide, *gate_layer(), attribute, [], algorithm)
            joined = cast.first_rows(product.binary(wide, gates, *up_layer(), "mul"), x.shape[:-1])
        else:
            joined = act(gate(x)).mul_(up(x))
        output: Tensor = down(joined)
        return output

    return forward
