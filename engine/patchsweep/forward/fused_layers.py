"""Fused layers: norms, gated MLPs and rotary embeddings with less memory traffic.

Between matrix products a block passes over its activations many times; on a CPU these passes take a
quarter of a sweep. Hugging Face's models repeat the same few forwards word for word, so their
bytecode identifies them; other layers stay as they are. Fused gates give the same bits as the
model's own; norms and rotary embeddings differ in the last bits. With gradients enabled, the
model's own forwards run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama import modeling_llama as llama

ROTARY = "apply_rotary_pos_emb"


class RMSNorm(nn.Module):
    """Mixin for RMSNorm: weight · x / sqrt(mean(x²) + epsilon), with fewer passes over x."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != torch.float32 or self.weight.dtype != x.dtype:
            own: Tensor = super().forward(x)
            return own
        # one pass over x that writes nothing
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = norm.square_().mul_(1 / x.shape[-1])
        return (x * mean.add_(self.variance_epsilon).rsqrt_()).mul_(self.weight)


class GatedMLP(nn.Module):
    """Mixin for a gated MLP: down(act(gate(x)) * up(x)), with the product in place."""

    act_fn: nn.Module
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            own: Tensor = super().forward(x)
            return own
        down: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).mul_(self.up_proj(x)))
        return down


@cache
def leaner(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` with a fused forward, or `cls` if its forward is not known."""
    forward = cls.forward
    if not isinstance(forward, FunctionType):
        return cls
    if _same(forward, llama.LlamaRMSNorm.forward):
        return type(cls.__name__, (RMSNorm, cls), {})
    if _same(forward, llama.LlamaMLP.forward):
        return type(cls.__name__, (GatedMLP, cls), {})
    known = forward.__globals__
    if (
        ROTARY in forward.__code__.co_names
        and _same(known.get(ROTARY), llama.apply_rotary_pos_emb)
        and _same(known.get("rotate_half"), llama.rotate_half)
    ):
        rotate = _rotary(known[ROTARY])
        return type(cls.__name__, (cls,), {"forward": _with_global(forward, ROTARY, rotate)})
    return cls


def _same(function: Any, other: Any) -> bool:
    """Whether two functions have the same bytecode, names and constants; globals may differ."""
    if not (isinstance(function, FunctionType) and isinstance(other, FunctionType)):
        return False
    ours, theirs = function.__code__, other.__code__
    return (ours.co_code, ours.co_names, _constants(function)) == (
        theirs.co_code,
        theirs.co_names,
        _constants(other),
    )


def _constants(function: FunctionType) -> list[Any]:
    """Return the function's constants without its docstring."""
    return [value for value in function.__code__.co_consts if value is not function.__doc__]


def _with_global(function: FunctionType, name: str, value: Any) -> FunctionType:
    """Return a copy of `function` whose global `name` is `value`."""
    new = FunctionType(
        function.__code__,
        {**function.__globals__, name: value},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    new.__kwdefaults__ = function.__kwdefaults__
    return new


def _rotary(own: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or len({x.dtype for x in (q, k, cos, sin)}) > 1:
            return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    return rotary


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x · cos + (-second half of x, first half of x) · sin, along the last axis."""
    half = x.shape[-1] // 2
    y = x * cos
    y[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    y[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return y
