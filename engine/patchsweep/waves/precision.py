"""bf16 matrix products in a replica; everything else of a block stays in fp32.

The linear layers of the blocks take their input in bf16, against weights cast once, and hand on
the model's dtype, fp32 as a rule, so that norms, gates, rotations, attention and residual adds stay
as exact as they were. That is also the faster way on a CPU, where activation functions on bf16 are
several times as slow as on fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D


class _Cast:
    """The bf16 form of a tensor, kept while the layers that share it ask for it."""

    def __init__(self) -> None:
        self._source: Tensor | None = None
        self._result: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16:
            return x
        if x is not self._source or self._result is None:
            self._source, self._result = x, x.to(torch.bfloat16)
        return self._result


def use_bf16_products(blocks: Sequence[nn.Module]) -> int:
    """Let the linear layers of `blocks` (of a replica: they are changed) multiply in bf16.

    Returns how many layers were changed. Experts that keep their weights in one three-axis
    parameter are left in fp32.
    """
    n_changed = 0
    for block in blocks:
        cast = _Cast()
        for module in block.modules():
            if isinstance(module, nn.Linear | Conv1D):
                module.forward = _product(module, cast)  # type: ignore[method-assign]
                n_changed += 1
    return n_changed


def _product(module: nn.Linear | Conv1D, cast: _Cast) -> Callable[[Tensor], Tensor]:
    dtype = module.weight.dtype
    if module.weight.is_meta:  # fetched for each visit, and cast then
        return lambda x: F.linear(cast(x), *_in_bf16(module)).to(dtype)
    weight, bias = _in_bf16(module)
    return lambda x: F.linear(cast(x), weight, bias).to(dtype)


def _in_bf16(module: nn.Linear | Conv1D) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias."""
    weight = module.weight.detach()
    # contiguous as [out, in], which is what the product wants
    weight = (weight.T if isinstance(module, Conv1D) else weight).to(torch.bfloat16).contiguous()
    bias = None if module.bias is None else module.bias.detach().to(torch.bfloat16)
    return weight, bias
