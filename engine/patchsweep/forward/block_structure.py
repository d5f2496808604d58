"""The structure of blocks, measured on two tokens: parallel parts, factors of writes."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from patchsweep.forward.blockwise import Blocks
from patchsweep.forward.trace import Part, Trace
from patchsweep.forward.unwrapped import OWN_ATTENTION, Unsupported
from patchsweep.models.offload import device_of

Factors = tuple[Tensor, Tensor]
# by model: what follows from the code and configuration of its blocks is measured once
_PARALLEL: WeakKeyDictionary[nn.Module, tuple[bool, ...]] = WeakKeyDictionary()
_SCALES: WeakKeyDictionary[nn.Module, list[Factors]] = WeakKeyDictionary()


def parallel_blocks(blocks: Blocks) -> tuple[bool, ...]:
    """Return, per layer, whether attention and MLP are parallel: the MLP ignores attention.

    Raises:
        Unsupported: the model does not call every block's attention and MLP once.
    """
    model = blocks.unwrapped.bridge.original_model
    if model not in _PARALLEL:
        _PARALLEL[model] = _are_parallel(blocks, _probe(blocks))
    return _PARALLEL[model]


def write_scales(blocks: Blocks) -> list[Factors]:
    """Return per block the factors between `attn_out`, `mlp_out` and the residual stream.

    One number, or one for each entry of the stream; those are weights, and measured each time.

    Raises:
        Unsupported: a block does something else with a write.
    """
    model = blocks.unwrapped.bridge.original_model
    if model in _SCALES:
        return _SCALES[model]
    trace = _probe(blocks)
    scales = [_scales(blocks, trace, layer) for layer in range(blocks.n_layers)]
    if all(len(factor) == 1 for factors in scales for factor in factors):
        _SCALES[model] = scales
    return scales


def _probe(blocks: Blocks) -> Trace:
    device = device_of(blocks.unwrapped.bridge)
    return blocks.trace(torch.zeros(1, 2, dtype=torch.long, device=device), [-1])


def _are_parallel(blocks: Blocks, trace: Trace) -> tuple[bool, ...]:
    if not len(trace.q) == len(trace.z) == len(trace.resid) - 1 == blocks.n_layers:
        raise Unsupported(OWN_ATTENTION)
    if len(trace.parts) < blocks.n_parts:
        raise Unsupported("a block does not call its attention or its MLP as a module")
    return tuple(not _hears(blocks, trace, layer) for layer in range(blocks.n_layers))


def _hears(blocks: Blocks, trace: Trace, layer: int) -> bool:
    """Return whether the MLP of a block reads its attention's output, for any weights and inputs.

    A random vector takes the attention's place, and the graph of the MLP's output tells whether it
    is computed from it. Code that torch does not differentiate shows it by NaN in its place. The
    values themselves cannot tell: weights may be zero, and activations inactive.
    """
    x = trace.resid[layer]
    pair = torch.zeros(1, dtype=torch.long, device=x.device)

    def mlp_of(attention: Tensor) -> Tensor:
        return blocks.mlp_of(layer, x, trace, pair, held={"attn": attention})

    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(x.shape, generator=generator).to(x).requires_grad_()
    with torch.enable_grad():
        out = mlp_of(drawn)
        if out.requires_grad:
            (grad,) = torch.autograd.grad(out.sum(), drawn, allow_unused=True)
            if grad is not None:
                return True
    with torch.no_grad():
        return bool(mlp_of(torch.full_like(x, float("nan"))).isnan().any())


@torch.no_grad()
def _scales(blocks: Blocks, trace: Trace, layer: int) -> Factors:
    def factor(part: Part) -> Tensor:
        known = trace.part(layer, part)
        rows = torch.stack([torch.ones_like(known[0]), torch.randn_like(known[0])])
        twice = torch.zeros(2, dtype=torch.long, device=rows.device)
        ones, drawn = blocks.push(layer, part, rows, trace, twice)
        near = 1e-3 if ones.dtype in (torch.float32, torch.float64) else 2e-2
        if not torch.allclose(ones * rows[1], drawn, rtol=near, atol=near):
            raise Unsupported(f"block {layer} does not add {part} to the residual stream")
        scale = ones[-1].float()
        return scale[:1] if bool((scale == scale[0]).all()) else scale

    return factor("attn_out"), factor("mlp_out")
