"""The closed form of a norm: what RMSNorm and LayerNorm do to a vector, measured from outside.

    y = weight * scale(x) * centred(x) + bias,    scale(x) = (mean of centred(x)^2 + eps)^(-1/2)

Weight, bias and centring are read off the module's outputs for three vectors, so that any class of
norm with this form is known, whatever it calls its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

# entries of the vectors that measure a norm; large, so that epsilon is negligible
_LARGE = 1e3


def is_norm(module: nn.Module) -> bool:
    """Whether `module` normalises vectors: a LayerNorm, an RMSNorm or a leaf named *Norm."""
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) or (
        type(module).__name__.endswith(("Norm", "LayerNorm"))
        and not any(True for _ in module.children())
    )


@dataclass(frozen=True, eq=False)
class NormForm:
    """A norm in closed form, fp32."""

    weight: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    centres: bool  # a LayerNorm; False: an RMS norm

    def centred(self, x: Tensor) -> Tensor:
        """Return `x`, without its mean if the norm centres."""
        return x - x.mean(dim=-1, keepdim=True) if self.centres else x

    def scale(self, x: Float[Tensor, "... d"], y: Float[Tensor, "... d"]) -> Tensor | None:
        """Return the scale `[..., 1]` of each vector with the output `y`, fp32.

        None if the norm does not have the closed form.
        """
        weighted = self.centred(x.float()) * self.weight
        size = weighted.square().sum(-1, keepdim=True).clamp_min(1e-30)
        output = y.float() - self.bias
        scale = (output * weighted).sum(-1, keepdim=True) / size
        tolerance = 1e-3 if y.dtype in (torch.float32, torch.float64) else 0.05
        if bool((scale * weighted - output).abs().amax() > tolerance * output.abs().amax()):
            return None  # NaN is no other form: the checks of results name it
        return scale


@torch.no_grad()
def norm_form(module: nn.Module, like: Float[Tensor, "... d"]) -> NormForm:
    """Measure the closed form of `module`, for vectors such as those of `like`."""
    plus = torch.full_like(like[(0,) * (like.ndim - 1)], _LARGE)
    plus[1::2] = -_LARGE
    plus -= plus.mean()
    unit = (plus / plus.square().mean().sqrt()).float()
    a, b = (module.forward(x).float() for x in (plus, -plus))
    weight, bias = (a - b) / (2 * unit), (a + b) / 2
    flat = module.forward(torch.full_like(plus, _LARGE)).float() - bias
    return NormForm(weight, bias, bool(flat.norm() < 0.5 * weight.norm()))
