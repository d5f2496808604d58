"""Relevance patching: attribution patching with a modified backward pass.

The estimate is the product of `atp` with coefficients of layer-wise relevance propagation in
place of gradients (Jafari et al., arXiv 2508.21258). The forward pass is unchanged. Rules of the
backward pass:

- LN-rule: a norm's scale is a constant; the gradient passes its centring and weights;
- Identity-rule: an activation function is the constant factor act(x) / x;
- Half-rule: each factor of a product of two activations (a gate) gets half the gradient;
- a factor that scales whole vectors, such as an expert's routing weight, is a constant.

`relp` keeps the gradient of the attention softmax. `relp_ah` adds the AH-rule: the attention
pattern is a constant, so that queries and keys get zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchsweep.attribution.atp import OneGradient
from patchsweep.errors import MethodError
from patchsweep.forward.norms import is_norm, norm_form
from patchsweep.forward.unwrapped import UnwrappedModel


class _Graft(torch.autograd.Function):
    """The value of the first argument; the gradient goes to the second argument."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, carrier: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def graft(value: Tensor, carrier: Tensor) -> Tensor:
    """Return a copy of `value` whose gradient goes to `carrier`."""
    result: Tensor = _Graft.apply(value.detach(), carrier)
    return result


@contextmanager
def relevance_rules(unwrapped: UnwrappedModel) -> Iterator[None]:
    """Apply the rules to backward passes of graphs that are built inside this context.

    Raises:
        MethodError: a norm of the model is neither a LayerNorm nor an RMS norm.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen_norms(unwrapped))
        for module in unwrapped.model.modules():
            if not is_norm(module) and is_activation(module):
                stack.callback(module.register_forward_hook(_identity_rule).remove)
        stack.enter_context(HalfRule())
        yield


@dataclass(frozen=True)
class Relp(OneGradient):
    """Estimate (values - base) · relevance coefficients; `fixed_pattern` adds the AH-rule."""

    name: str = "relp"
    fixed_pattern: bool = False
    at_base: bool = True
    rules = staticmethod(relevance_rules)


@contextmanager
def frozen_norms(unwrapped: UnwrappedModel) -> Iterator[None]:
    """Make the scale of every norm a constant of the graphs that are built inside this context."""
    with ExitStack() as stack:
        for module in unwrapped.model.modules():
            if is_norm(module):
                stack.callback(module.register_forward_hook(_norm_rule).remove)
        yield


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an elementwise nonlinearity of `transformers` or torch."""
    origins = ("transformers.activations", "torch.nn.modules.activation")
    # a fused layer is of a class of its own, below the model's
    return any(cls.__module__.startswith(origins) for cls in type(module).__mro__) and not (
        isinstance(module, nn.MultiheadAttention | nn.Softmax)
    )


def _norm_rule(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    if not output.requires_grad:
        return None
    x: Tensor = args[0]
    with torch.no_grad():
        form = norm_form(module, x)
        scale = form.scale(x, output)
        if scale is None:
            raise MethodError(
                f"{type(module).__name__} is neither a LayerNorm nor an RMS norm, so there is "
                "no rule that freezes it; use atp"
            )
        factor = (scale * form.weight).to(x)
    return graft(output, form.centred(x) * factor)


def _identity_rule(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    x: Tensor = args[0]
    if not x.requires_grad:
        return None
    with torch.no_grad():
        # at x = 0 the ratio is undefined, and act(0) = 0 carries no relevance
        factor = torch.where(x == 0, torch.zeros_like(x), output / x)
    return graft(output, x * factor)


class HalfRule(TorchFunctionMode):
    """Gives each factor of a product of two activations half of the gradient.

    Products inside norms and activation functions are affected too, but the hooks on those
    modules replace their gradients; weights and rotary tables take no gradient.
    """

    _products = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in self._products:
            a, b = args[0], args[1]
            if all(isinstance(x, Tensor) and x.requires_grad for x in (a, b)):
                if a.shape[-1] == 1:
                    return func(a.detach(), b)
                if b.shape[-1] == 1:
                    return func(a, b.detach())
                product = func(a, b)
                return graft(product, 0.5 * product)
        return func(*args, **(kwargs or {}))
