"""Fused layers: norms, gated MLPs and rotary embeddings with less memory traffic.

Between matrix products a block passes over its activations many times; on a CPU these passes take a
quarter of a sweep. Hugging Face's models repeat the same few forwards word for word, so their
bytecode identifies them; other layers stay as they are. With gradients enabled, the model's own
forwards run.

On a CPU fused gates give the same bits as the model's own; norms and rotary embeddings differ in
the last bits. On a GPU each is one kernel, which rounds 16-bit numbers where the model does, but
for `gelu_new`, which is rounded once instead of eight times.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from patchsweep_kernels.dispatch import use_triton
from patchsweep_kernels.gate import Activation, gated
from patchsweep_kernels.rms_norm import rms_norm
from patchsweep_kernels.rotary import rotate
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUTanh, NewGELUActivation, SiLUActivation
from transformers.models.gemma2 import modeling_gemma2 as gemma
from transformers.models.gpt_neox import modeling_gpt_neox as gpt_neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.phi3 import modeling_phi3 as phi3

ROTARY = "apply_rotary_pos_emb"
_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.SiLU: "silu",
    SiLUActivation: "silu",
    GELUTanh: "gelu_tanh",
}


class RMSNorm(nn.Module):
    """Mixin for RMSNorm: weight · x / sqrt(mean(x²) + epsilon), with fewer passes over x."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        if _has_kernel(x, self.weight):
            return rms_norm(x, self.weight, self.variance_epsilon)
        if torch.is_grad_enabled() or x.dtype != torch.float32 or self.weight.dtype != x.dtype:
            own: Tensor = super().forward(x)
            return own
        # one pass over x that writes nothing
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        mean = norm.square_().mul_(1 / x.shape[-1])
        return (x * mean.add_(self.variance_epsilon).rsqrt_()).mul_(self.weight)


class GemmaNorm(nn.Module):
    """Mixin for Gemma's RMSNorm: (1 + weight) · x / sqrt(mean(x²) + epsilon); fused on a GPU."""

    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        if _has_kernel(x, self.weight):
            return rms_norm(x, self.weight, self.eps, offset=1.0, rounds_first=False)
        own: Tensor = super().forward(x)
        return own


class NewGELU(nn.Module):
    """Mixin for `gelu_new`, the gelu with its tanh: one operation on a GPU, else the model's own
    eight."""

    def forward(self, x: Tensor) -> Tensor:
        if _has_kernel(x):
            return F.gelu(x, approximate="tanh")
        own: Tensor = super().forward(x)
        return own


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
        activation = _ACTIVATIONS.get(type(self.act_fn))
        if activation is not None and _has_kernel(x):
            fused: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x), activation))
            return fused
        down: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).mul_(self.up_proj(x)))
        return down


class HalvedMLP(nn.Module):
    """Mixin for a gated MLP whose gate is one half of a product (Phi-3); fused on a GPU."""

    activation_fn: nn.Module
    gate_up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        activation = _ACTIVATIONS.get(type(self.activation_fn))
        if activation is not None and _has_kernel(x):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            fused: Tensor = self.down_proj(gated(gate, up, activation))
            return fused
        own: Tensor = super().forward(x)
        return own


def _has_kernel(x: Tensor, *others: Tensor) -> bool:
    """Whether a kernel takes `x` with `others`, in place of operations that autograd knows."""
    alike = all(x.dtype == other.dtype and x.device == other.device for other in others)
    return alike and not torch.is_grad_enabled() and use_triton(x)


_MIXINS: dict[type[nn.Module], type[nn.Module]] = {
    llama.LlamaRMSNorm: RMSNorm,
    llama.LlamaMLP: GatedMLP,
    gemma.Gemma2RMSNorm: GemmaNorm,
    phi3.Phi3MLP: HalvedMLP,
    NewGELUActivation: NewGELU,
}
# rotate only the first elements of each head
_PARTIAL = (gpt_neox.apply_rotary_pos_emb, phi3.apply_rotary_pos_emb)


@cache
def leaner(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass of `cls` with a fused forward, or `cls` if its forward is not known."""
    forward = cls.forward
    if not isinstance(forward, FunctionType):
        return cls
    for like, mixin in _MIXINS.items():
        methods = [name for name in ("forward", "_norm") if hasattr(like, name)]
        if all(_same(getattr(cls, name, None), getattr(like, name)) for name in methods):
            return type(cls.__name__, (mixin, cls), {})
    known = forward.__globals__
    if ROTARY in forward.__code__.co_names and _same(known.get("rotate_half"), llama.rotate_half):
        own: Any = known.get(ROTARY)
        whole = _same(own, llama.apply_rotary_pos_emb)
        if whole or any(_same(own, part) for part in _PARTIAL):
            rotary = _rotary(own, whole=whole)
            return type(cls.__name__, (cls,), {"forward": _with_global(forward, ROTARY, rotary)})
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


def _rotary(
    own: Callable[..., tuple[Tensor, Tensor]], *, whole: bool
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a leaner form of the rotary embedding `own`, of `whole` heads or of their beginning.

    On a CPU only that of whole heads has one.
    """

    def rotary(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 1 and cos.ndim == 3 and _has_kernel(q, k, cos, sin):
            return rotate(q, k, cos, sin)
        if not whole or torch.is_grad_enabled() or len({x.dtype for x in (q, k, cos, sin)}) > 1:
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
