"""GIM: attribution patching with a backward pass that undoes self-repair.

Gradient interaction modifications (Edin et al., arXiv 2505.17630) leave the forward pass as it is
and change the backward pass by three rules:

- TSG: the gradient of the attention softmax is that of a softmax at a higher temperature,

      dx = p_T * (g - sum(p_T * g)),    p_T = softmax(x / T),  T = 2

  without the factor 1/T, so that scores whose effect the softmax redistributes keep a gradient;
- frozen norms: a norm's scale is a constant, as in `relp`;
- gradient normalisation: each factor of a product of two activations gets half of the gradient.
  In attention a value so gets 1/2, a query and a key 1/4 (the pattern is a factor too), and the two
  sides of a gated MLP 1/2 each.

Activation functions keep their ordinary gradient, unlike in `relp`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from patchsweep.attribution.atp import OneGradient
from patchsweep.attribution.relp import frozen_norms, graft, is_activation
from patchsweep.forward.norms import is_norm
from patchsweep.forward.unwrapped import UnwrappedModel

TEMPERATURE = 2.0


@contextmanager
def gim_rules(unwrapped: UnwrappedModel) -> Iterator[None]:
    """Apply the rules to backward passes of graphs that are built inside this context.

    Raises:
        MethodError: a norm of the model is neither a LayerNorm nor an RMS norm.
    """
    with ExitStack() as stack:
        stack.enter_context(frozen_norms(unwrapped))
        stack.enter_context(TemperedSoftmax())
        halved = stack.enter_context(HalvedProducts())
        for module in unwrapped.model.modules():
            if is_activation(module) and not is_norm(module):
                for register, by in (
                    (module.register_forward_pre_hook, 1),
                    (module.register_forward_hook, -1),
                ):
                    stack.callback(register(partial(halved.enter_activation, by)).remove)
        yield


@dataclass(frozen=True)
class Gim(OneGradient):
    """Estimate (values - base) · gradients under the rules of GIM."""

    name: str = "gim"
    at_base: bool = True
    rules = staticmethod(gim_rules)


class _Tempered(torch.autograd.Function):
    """softmax(x) over the last axis; its gradient is that at a temperature, times it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.temperature = temperature
        return x.softmax(dim=-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        p = (x / ctx.temperature).softmax(dim=-1)
        return p * (grad - (p * grad).sum(dim=-1, keepdim=True)), None


class TemperedSoftmax(TorchFunctionMode):
    """Gives attention's softmax, the one over `[row, head, dest, src]`, a tempered gradient."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.softmax and args[0].ndim == 4 and args[0].requires_grad:
            return _Tempered.apply(args[0], TEMPERATURE)
        return func(*args, **(kwargs or {}))


class HalvedProducts(TorchFunctionMode):
    """Gives each factor of a product of two activations half of the gradient.

    Weights take no gradient, so their products are left alone. An einsum is attention's over the
    tokens that base and source share, whose keys and values are constants of this pass and factors
    all the same. Products inside an activation function are its own business.
    """

    def __init__(self) -> None:
        super().__init__()
        self.inside = 0  # activation functions that are running

    def enter_activation(self, by: int, *_: Any) -> None:
        """Count an activation function that begins (1) or ends (-1); a hook."""
        self.inside += by

    _products = (
        torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__,
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__,
    )  # fmt: skip

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.inside:
            return result
        factors = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
        if (func in self._products and len(factors) == 2) or (func is torch.einsum and factors):
            return graft(result, 0.5 * result)
        return result
