"""The activations of one batch of runs that blockwise passes need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.forward.block_args import BlockArgs, first_of

# a block's parts, and their outputs as added to the residual stream (after a norm, if there is one)
Part = Literal["attn", "attn_out", "mlp", "mlp_out"]


@dataclass
class Trace:
    """The activations of one batch of runs that blockwise passes need, without a graph."""

    resid: list[Float[Tensor, "pair pos d_model"]] = field(default_factory=list)  # inputs; + final
    q: list[Float[Tensor, "pair head pos d"]] = field(default_factory=list)  # after rotary
    k: list[Float[Tensor, "pair kv_head pos d"]] = field(default_factory=list)  # after rotary
    v: list[Float[Tensor, "pair kv_head pos d"]] = field(default_factory=list)
    z: list[Float[Tensor, "pair pos width"]] = field(default_factory=list)  # before W_O
    parts: dict[tuple[int, Part], Any] = field(default_factory=dict)  # as the module returned it
    calls: list[BlockArgs] = field(default_factory=list)  # per block
    # per block, of its attention: scale, window, soft-cap, sinks
    settings: list[dict[str, Any]] = field(default_factory=list)
    logits: Float[Tensor, "pair read d_vocab"] = field(default_factory=lambda: torch.empty(0))

    @property
    def n_pairs(self) -> int:
        return self.resid[0].shape[0]

    @property
    def length(self) -> int:
        return self.resid[0].shape[1]

    def part(self, layer: int, name: Part) -> Float[Tensor, "pair pos d_model"]:
        """Return the output of a part of a block."""
        return first_of(self.parts[layer, name]).reshape(self.n_pairs, self.length, -1)
