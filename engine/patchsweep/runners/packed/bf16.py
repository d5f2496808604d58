"""bf16 matrix products in an unwrapped model; everything else of a block stays in fp32.

The linear layers of the blocks multiply bf16 inputs by weights that were cast once, and return
fp32. So norms, rotary embeddings, attention and residual adds keep their precision. With oneDNN,
the gate of a gated MLP is applied to fp32 sums inside its two products: fewer roundings, and fewer
passes over memory.
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

# oneDNN's names of the activations that it can apply inside a product: attribute, algorithm
_ACTIVATIONS: dict[type[nn.Module], tuple[str, str]] = {
    nn.SiLU: ("swish", ""),
    SiLUActivation: ("swish", ""),
    GELUTanh: ("gelu", "tanh"),
}


class _Cast:
    """Casts a tensor to bf16 `[row, d]` and caches the last result for layers with the same input.

    On a CPU the result is padded to a round number of rows, with arbitrary values: oneDNN compiles
    a product for each number of rows, which takes longer than one run of it.
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
        """Return `result` without padding, as `[*shape, d]`, and cache `result` as its cast."""
        self._source = result[: shape.numel()].view(*shape, result.shape[-1])
        self._result = result
        return self._source


def _round_up(n: int) -> int:
    step = 64 if n <= 512 else 256
    return -(-n // step) * step


def use_bf16_products(blocks: Sequence[nn.Module]) -> Collection[nn.Module]:
    """Make the linear layers of `blocks`, of an unwrapped model, multiply in bf16; return them.

    The blocks are changed in place. Other layers, such as experts with one three-axis weight, stay
    as they are.
    """
    cast = _Cast()  # shared by all layers: its cache is as large as a packed batch
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
    """Whether the module only multiplies by its weight and adds a bias.

    Quantised layers are subclasses of linear layers, but their weights are packed or have a scale.
    """
    forward = type(module).forward
    return forward in (nn.Linear.forward, Conv1D.forward) and module.weight.dtype in PLAIN


def _layer(module: nn.Linear | Conv1D) -> _Layer:
    if module.weight.is_meta:  # fetched, and cast, at each call
        return lambda: _in_bf16(module)
    kept = _in_bf16(module)
    return lambda: kept


def _in_bf16(module: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    weight = module.weight.detach()
    # contiguous as [out, in], the layout that the product expects
    weight = (weight.T if isinstance(module, Conv1D) else weight).to(torch.bfloat16).contiguous()
    bias = None if module.bias is None else module.bias.detach().to(torch.bfloat16)
    return weight, bias


def _product(module: nn.Linear | Conv1D, cast: _Cast, layer: _Layer) -> _Forward:
    def forward(x: Tensor) -> Tensor:
        y = F.linear(cast(x), *layer())[: x.shape[:-1].numel()]
        return y.float().view(*x.shape[:-1], y.shape[-1])

    return forward


def _is_fusible(mlp: GatedMLP, layers: Mapping[nn.Module, _Layer]) -> bool:
    """Whether oneDNN can apply the gate of `mlp` inside its products."""
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
    # the operator that `torch.compile` emits for such a layer on a CPU
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
