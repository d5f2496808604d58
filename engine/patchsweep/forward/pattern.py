"""Attention patterns `[row, head, dest, src]`, and the values that they weight, in plain torch.

For gradients and views. Packed rows attend through `patchsweep_kernels.attention`, which keeps no
pattern. Rows may share the keys and values of the tokens before their own: row r reads those of
prompt r % prompts, so that they are stored and multiplied once per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Prefix:
    """Keys and values of tokens that come first in every row, and are not run again."""

    length: int  # number of tokens
    keys: list[Float[Tensor, "prompt kv_head pos d"]]  # per layer; row r reads prompt r % prompts
    values: list[Float[Tensor, "prompt kv_head pos d"]]

    def rows(self, rows: Sequence[int]) -> Prefix:
        """Return the prefix of some of the prompts."""
        return Prefix(self.length, [k[rows] for k in self.keys], [v[rows] for v in self.values])


def attention_pattern(
    q: Float[Tensor, "row head dest d"],
    k: Float[Tensor, "row kv_head own d"],
    *,
    shared: Float[Tensor, "prompt kv_head before d"] | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Float[Tensor, "row head dest src"]:
    """Return causal attention patterns, fp32 (fp64 for fp64).

    The last query is at the last key. `shared` holds the keys before those of `k`.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(dtype) @ k.to(dtype).transpose(-1, -2)
    if shared is not None:
        grouped = _grouped(q.to(dtype), shared)
        before = torch.einsum("cpksqd,pktd->cpksqt", grouped, shared.to(dtype))
        scores = torch.cat([before.reshape(*scores.shape[:3], -1), scores], dim=-1)
    scores = scores * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    src = torch.arange(scores.shape[3], device=q.device)[None, :]
    dest = src.shape[1] - scores.shape[2] + torch.arange(scores.shape[2], device=q.device)[:, None]
    hidden = src > dest
    if window is not None:
        hidden |= src <= dest - window
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]


def weighted_values(
    pattern: Float[Tensor, "row head dest src"],
    v: Float[Tensor, "row kv_head own d"],
    shared: Float[Tensor, "prompt kv_head before d"] | None = None,
) -> Float[Tensor, "row head dest d"]:
    """Return attention's output for a pattern, in the dtype of `v`."""
    values = v.repeat_interleave(pattern.shape[1] // v.shape[1], dim=1)
    pattern = pattern.to(v)
    if shared is None:
        return pattern @ values
    n = shared.shape[2]
    before = torch.einsum("cpksqt,pktd->cpksqd", _grouped(pattern[..., :n], shared), shared)
    own = pattern[..., n:] @ values
    return own + before.reshape(own.shape)


def _grouped(x: Tensor, shared: Tensor) -> Tensor:
    """Return `[copy, prompt, kv_head, share, ...]` of `x` `[row, head, ...]`."""
    n_prompts, kv_heads = shared.shape[:2]
    return x.unflatten(1, (kv_heads, -1)).unflatten(0, (-1, n_prompts))
