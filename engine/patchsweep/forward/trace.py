"""The activations of one batch of runs that blockwise passes need, and attention over them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from patchsweep_kernels.attention import Rows, prefix_attention
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


def attend_rows(
    trace: Trace,
    layer: int,
    q: Float[Tensor, "row head pos d"],
    k: Float[Tensor, "row kv_head pos d"],
    v: Float[Tensor, "row kv_head pos d_v"],
    pair: Tensor,
    start: int,
    head: int | None = None,
) -> Float[Tensor, "row pos head d_v"]:
    """Return z of rows that begin at position `start`, without graph; row i is of `pair[i]`.

    `head`: the only query head that `q` holds, with its keys and values; None: all heads.
    """
    rows, _, n_pos, _ = q.shape
    settings, prefix_k, prefix_v = trace.settings[layer], trace.k[layer], trace.v[layer]
    if head is not None:
        group = head // (trace.q[layer].shape[1] // prefix_k.shape[1])
        prefix_k, prefix_v = (x[:, group : group + 1] for x in (prefix_k, prefix_v))
        if settings["sinks"] is not None:
            settings = {**settings, "sinks": settings["sinks"][head : head + 1]}
    packed = Rows(
        offsets=torch.arange(0, rows * n_pos + 1, n_pos, device="cpu"),
        pair=pair.cpu(),
        start=torch.full((rows,), start, device="cpu"),
    )
    q, k, v = (rearrange(x, "row head pos d -> (row pos) head d") for x in (q, k, v))
    z = prefix_attention(q, k, v, prefix_k, prefix_v, packed, **settings)
    return z.unflatten(0, (rows, n_pos))
