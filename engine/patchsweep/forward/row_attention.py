"""Attention of rows that begin at one position and read a trace's keys and values before it."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from patchsweep_kernels.attention import Rows, prefix_attention
from torch import Tensor

from patchsweep.forward.trace import Trace


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
