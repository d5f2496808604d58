"""In which dtype a sweep computes: the weights' own, or fp32 where those have 16 bits.

In 16 bits rounding moves a metric by a few hundredths whatever is patched, which hides small
effects and passes for them. Weights of 16 bits in fp32 cost time but no second copy of the model: a
block's weights are cast while it runs, see `forward.weight_streaming`.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ConfigError
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.quantised import first_packed

ComputeDtype = Literal["auto", "float32", "model"]


def compute_dtype_of(bridge: TransformerBridge, wanted: ComputeDtype = "auto") -> torch.dtype:
    """The dtype of activations and products; `auto`: fp32 for weights of 16 bits, else their own.

    Raises:
        ConfigError: `wanted` is unknown, or the weights cannot be computed with in fp32.
    """
    if wanted not in ("auto", "float32", "model"):
        raise ConfigError(
            f"compute_dtype={wanted!r} is not known; use auto, float32 (weights of 16 bits are "
            "cast, a block's at a time) or model (what the weights' own dtype gives)"
        )
    own: torch.dtype = bridge.cfg.dtype
    packed = first_packed(bridge)
    if wanted == "float32" and packed is not None:
        raise ConfigError(
            f"compute_dtype=float32 casts weights of 16 bits, and {packed}, which multiplies by "
            "code of its own; use compute_dtype=model, or load the model unquantised"
        )
    if wanted == "float32" and own == torch.float64:
        raise ConfigError("compute_dtype=float32 would round weights of float64; use model")
    if wanted == "model" or packed is not None or own not in SIXTEEN_BITS:
        return own
    return torch.float32


def sentence(own: str, computed: str) -> str:
    """What a sweep computes in, in words; for logs and the command line."""
    if own == computed:
        return computed
    return f"{computed}, with weights of {own} that are cast block by block"


def name_of(dtype: torch.dtype) -> str:
    """Such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
