"""The compute dtype of a sweep: that of the weights, or fp32 for 16-bit weights.

In 16 bits rounding changes a metric by a few hundredths for any patch, which hides small effects
or imitates them. fp32 with 16-bit weights costs time but no second copy of the model: each
block's weights are cast while the block runs, see `forward.weight_streaming`.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import ConfigError
from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.quantised import first_packed

ComputeDtype = Literal["auto", "float32", "model"]


def check_compute_dtype(wanted: ComputeDtype) -> None:
    """Raise ConfigError unless `wanted` is one of the three."""
    if wanted not in ("auto", "float32", "model"):
        raise ConfigError(
            f"compute_dtype={wanted!r} is not known; use auto, float32 (weights of 16 bits are "
            "cast, a block's at a time) or model (what the weights' own dtype gives)"
        )


def compute_dtype_of(bridge: TransformerBridge, wanted: ComputeDtype = "auto") -> torch.dtype:
    """Return the dtype of activations and products; `auto`: fp32 for 16-bit weights, else theirs.

    Raises:
        ConfigError: `wanted` is unknown, or is float32 with quantised or fp64 weights.
    """
    check_compute_dtype(wanted)
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
    """Describe the compute dtype in words, for logs and the command line."""
    if own == computed:
        return computed
    return f"{computed}, with weights of {own} that are cast block by block"


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")
