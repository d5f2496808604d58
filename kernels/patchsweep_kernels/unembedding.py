"""The final norm and the unembedding, which turn a final residual into logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep_kernels.checks import check_alike


@dataclass(frozen=True, eq=False)
class FinalNorm:
    """The norm after the last block."""

    kind: Literal["rms", "layer"]  # rms: x / rms(x); layer: (x - mean) / std
    eps: float  # added to the mean square, or to the variance
    weight: Float[Tensor, " d"] | None = None
    bias: Float[Tensor, " d"] | None = None
    offset: float = 0.0  # added to the weight: 1 for Gemma, which stores weight - 1

    def __post_init__(self) -> None:
        if self.kind not in ("rms", "layer"):
            raise ValueError(f"kind must be 'rms' or 'layer', got {self.kind!r}")

    def check(self, resid: Tensor) -> None:
        """Raise a ValueError unless the norm fits `resid` `[row, d]`."""
        check_alike(("resid", resid), ("norm.weight", self.weight), ("norm.bias", self.bias))
        for name, vector in (("norm.weight", self.weight), ("norm.bias", self.bias)):
            if vector is not None and vector.shape != resid.shape[1:]:
                raise ValueError(
                    f"{name} must have shape {tuple(resid.shape[1:])}, got {tuple(vector.shape)}"
                )

    def __call__(self, resid: Float[Tensor, "row d"]) -> Float[Tensor, "row d"]:
        """Return the normalised residual, in fp32 (fp64 for fp64)."""
        x = resid.to(torch.promote_types(resid.dtype, torch.float32))
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        if self.weight is not None:
            x = x * (self.weight.to(x.dtype) + self.offset)
        return x if self.bias is None else x + self.bias.to(x.dtype)


@dataclass(frozen=True, eq=False)
class Unembedding:
    """Maps a normalised residual x to logits: `cap(scale * (w_u @ x + bias))`."""

    w_u: Float[Tensor, "d_vocab d"]  # the layout of `lm_head.weight`
    bias: Float[Tensor, " d_vocab"] | None = None
    scale: float = 1.0  # factor on the logits, before the soft-cap (Cohere's `logit_scale`)
    softcap: float | None = None  # logits become softcap * tanh(logit / softcap)

    def __post_init__(self) -> None:
        check_alike(("w_u", self.w_u), ("bias", self.bias))
        if self.w_u.dim() != 2 or (self.w_u.stride(1) != 1 and self.w_u.shape[1] > 1):
            raise ValueError(
                f"w_u must be [d_vocab, d] with contiguous rows (the layout of lm_head.weight), "
                f"got shape {tuple(self.w_u.shape)}, strides {self.w_u.stride()}"
            )
        if self.bias is not None and self.bias.shape != self.w_u.shape[:1]:
            raise ValueError(
                f"bias must have shape ({self.d_vocab},), got {tuple(self.bias.shape)}"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, got {self.softcap}")

    @property
    def d_vocab(self) -> int:
        return len(self.w_u)

    def check(self, name: str, rows: Tensor) -> None:
        """Raise a ValueError unless `rows` is `[row, d]`, with the device and dtype of `w_u`."""
        check_alike((name, rows), ("unembedding.w_u", self.w_u))
        if rows.dim() != 2 or rows.shape[1] != self.w_u.shape[1]:
            raise ValueError(
                f"{name} must be [row, {self.w_u.shape[1]}] to fit unembedding.w_u, "
                f"got {tuple(rows.shape)}"
            )
        if rows.stride(1) != 1 and rows.shape[1] > 1:
            raise ValueError(f"{name} must be contiguous along d, its stride is {rows.stride(1)}")

    def finish(self, product: Tensor, bias: Tensor | None) -> Tensor:
        """Return logits for `product`, which is `w_u @ x` of some tokens, and those tokens' bias.

        `product` is fp32 (fp64 for fp64).
        """
        logits = product if bias is None else product + bias.to(product.dtype)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()
