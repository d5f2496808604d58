"""Attention over a base run's keys and values in which a row has replaced some positions.

The rows of an adaptive batch run only some tokens of a prompt. `replaced_attention` gives the
attention output of tokens that run: they read the base run's keys and values, and their own row's
at its replaced positions. `attention_change` gives, for the tokens that do not run, how much their
attention output changes, in O(1) per replaced position and head: queries are the base run's, and

    w = exp(q_t . k_new[a] scale - L_t),    w0 = exp(q_t . k_base[a] scale - L_t),
    Z = 1 + sum_a (w - w0),
    Z (z_new - z)_t = sum_a w (v_new[a] - v_base[a]) + (w - w0) (v_base[a] - z_t),

with the base run's log-sum-exp L_t and output z_t, and a over the replaced positions that t sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

# elements of one temporary: 8 MB in fp32
_BUDGET = 1 << 21
# exponents above this are cut; so large a change wakes its token at any threshold
_LARGEST = 60.0


@dataclass(frozen=True, eq=False)
class Tokens:
    """Packed tokens, sorted by row and position; rows are sorted by pair."""

    row: Int[Tensor, " token"]
    pos: Int[Tensor, " token"]
    pair: Int[Tensor, " token"]  # row in the tables of the base run

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def spans(self) -> list[tuple[int, int, int]]:
        """(pair, first token, past-last token) of each pair; waits for the device."""
        pairs, counts = self.pair.unique_consecutive(return_counts=True)
        spans, first = [], 0
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            spans.append((pair, first, first + count))
            first += count
        return spans

    def at(self, index: Tensor | slice) -> Tokens:
        """Return the tokens at `index`, which keeps their order."""
        return Tokens(self.row[index], self.pos[index], self.pair[index])

    def parts(self, n_elements: int) -> Iterator[tuple[int, int, int]]:
        """Yield spans of whole rows of one pair, whose tokens take `n_elements` each.

        A part keeps within the budget, unless one row alone exceeds it.
        """
        most = max(1, _BUDGET // n_elements)
        for pair, first, stop in self.spans:
            if stop - first <= most:
                yield pair, first, stop
                continue
            _, counts = self.row[first:stop].unique_consecutive(return_counts=True)
            low = high = first
            for count in counts.tolist():
                if high > low and high + count - low > most:
                    yield pair, low, high
                    low = high
                high += count
            yield pair, low, high


@torch.no_grad()
def replaced_attention(
    q: Float[Tensor, "query head d"],
    query: Tokens,
    k: Float[Tensor, "token kv_head d"],
    v: Float[Tensor, "token kv_head d_v"],
    replaced: Tokens,
    base_k: Float[Tensor, "pair kv_head pos d"],
    base_v: Float[Tensor, "pair kv_head pos d_v"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> Float[Tensor, "query head d_v"]:
    """Return the attention output of `q`, in its dtype.

    Query i sees positions 0 .. `query.pos[i]` of its pair: where `replaced` holds the position for
    its row, the key and value of that token, else the base run's. `window`, `softcap` and `sinks`
    as in `prefix_attention`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    n_heads, kv_heads, d_v = q.shape[1], k.shape[1], v.shape[2]
    share = n_heads // kv_heads
    out = torch.empty(len(q), n_heads, d_v, dtype=dtype, device=q.device)
    k_heads, v_heads = (x.repeat_interleave(share, dim=1) if share > 1 else x for x in (k, v))
    first, count = _by_row(replaced, int(query.row[-1]) + 1 if len(query) else 0)
    length = base_k.shape[2]
    for pair, low, high in query.parts(n_heads * length):
        n, at = high - low, query.at(slice(low, high))
        seen = int(at.pos.max()) + 1
        q_part = q[low:high].to(dtype)
        by_head = (
            q_part.view(n, kv_heads, share, -1).transpose(0, 1).reshape(kv_heads, n * share, -1)
        )
        scores = torch.bmm(by_head, base_k[pair, :, :seen].to(dtype).transpose(1, 2)).mul_(scale)
        # which query reads which replaced token
        n_own = count[at.row]
        reader = torch.repeat_interleave(n_own)
        within = torch.arange(len(reader), device=q.device) - (n_own.cumsum(0) - n_own)[reader]
        token = first[at.row][reader] + within
        sees = replaced.pos[token] <= at.pos[reader]
        reader, token = reader[sees], token[sees]
        own_pos = replaced.pos[token]
        table = scores.view(kv_heads, n, share, seen).permute(1, 3, 0, 2)  # [query, pos, kv, share]
        own = torch.cat(
            [
                (q_part[reader[i : i + step]] * k_heads[token[i : i + step]].to(dtype)).sum(-1)
                for step in [max(1, _BUDGET // q_part[0].numel())]
                for i in range(0, len(reader), step)
            ]
            or [q_part.new_empty(0, n_heads)]
        )
        table[reader, own_pos] = own.mul_(scale).view(-1, kv_heads, share)
        if softcap is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        column = torch.arange(seen, device=q.device)
        hidden = column > at.pos[:, None]
        if window is not None:
            hidden |= column <= at.pos[:, None] - window
        scores.view(kv_heads, n, share, seen).masked_fill_(hidden[None, :, None], -torch.inf)
        if sinks is not None:
            sink = sinks.to(dtype).view(kv_heads, 1, share, 1).expand(-1, n, -1, -1)
            with_sink = torch.cat([scores.view(kv_heads, n, share, seen), sink], dim=-1)
            weights = with_sink.softmax(-1)[..., :-1].reshape(kv_heads, n * share, seen)
        else:
            weights = torch.softmax(scores, -1)
        table = weights.view(kv_heads, n, share, seen).permute(1, 3, 0, 2)
        own = table[reader, own_pos].reshape(-1, n_heads)
        table[reader, own_pos] = 0.0
        z = torch.bmm(weights, base_v[pair, :, :seen].to(dtype))
        z = z.view(kv_heads, n, share, d_v).transpose(0, 1).reshape(n, n_heads, d_v)
        step = max(1, _BUDGET // z[0].numel())
        for i in range(0, len(reader), step):
            part = own[i : i + step, :, None] * v_heads[token[i : i + step]].to(dtype)
            z.index_add_(0, reader[i : i + step], part)
        out[low:high] = z
    return out.to(q.dtype)


@torch.no_grad()
def attention_change(
    base_q: Float[Tensor, "pair head pos d"],
    base_k: Float[Tensor, "pair kv_head pos d"],
    base_v: Float[Tensor, "pair kv_head pos d_v"],
    grad_z: Float[Tensor, "metric pair head pos d_v"],
    k: Float[Tensor, "token kv_head d"],
    v: Float[Tensor, "token kv_head d_v"],
    replaced: Tokens,
    n_rows: int,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " head"] | None = None,
) -> tuple[Float[Tensor, "metric row pos"], Float[Tensor, "row pos"]]:
    """Return how the attention output of base queries changes with the replaced keys and values.

    The first result is the change times `grad_z`, summed over heads: to first order, the change of
    each metric. The second is an upper bound of the change's norm over all heads, relative to the
    output's. Both are 0 where a token sees no replaced position. fp32, or fp64 for fp64 inputs.
    """
    dtype = torch.promote_types(base_q.dtype, torch.float32)
    n_metrics, _, n_heads, length, _ = grad_z.shape
    kv_heads = base_k.shape[1]
    share = n_heads // kv_heads
    effect = torch.zeros(n_metrics, n_rows, length, dtype=dtype, device=k.device)
    size = torch.zeros(n_rows, length, dtype=dtype, device=k.device)
    settings = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    tables: dict[int, _Base] = {}
    for pair, low, high in replaced.parts(n_heads * length):
        if pair not in tables:
            q, keys, values = (x[pair].to(dtype) for x in (base_q, base_k, base_v))
            tables = {pair: _Base(q, keys, values, grad_z[:, pair].to(dtype), settings)}
        base, at = tables[pair], replaced.at(slice(low, high))
        new_k, new_v = (x[low:high].to(dtype).transpose(0, 1) for x in (k, v))  # [kv, token, d]
        change_v = new_v - base.v[:, at.pos]
        new = torch.bmm(new_k, base.q.transpose(1, 2))  # [kv, token, (share pos)]
        base.finish(new, at.pos)
        gained = new - base.weight[:, at.pos]
        # the softmax's sums of each row: tokens of one row are adjacent
        rows, number = at.row.unique_consecutive(return_inverse=True)
        n = len(rows)

        def by_row(x: Tensor, n: int = n, number: Tensor = number) -> Tensor:
            if n == x.shape[1]:
                return x
            return x.new_zeros(x.shape[0], n, x.shape[2]).index_add_(1, number, x)

        total = (by_row(gained) + 1.0).clamp_(min=1e-6)
        for metric in range(n_metrics):
            along = torch.bmm(change_v, base.grad[metric].transpose(1, 2)).mul_(new)
            along.addcmul_(gained, base.along[metric][:, at.pos])
            change = (by_row(along) / total).view(kv_heads, n, share, length).sum((0, 2))
            effect[metric].index_add_(0, rows, change)
        bound = new.mul_(change_v.norm(dim=-1, keepdim=True))
        bound.addcmul_(gained.abs_(), base.distance[:, at.pos])
        bound = (by_row(bound) / total).view(kv_heads, n, share, length)
        size.index_add_(0, rows, bound.square_().sum((0, 2)).sqrt_() / base.norm)
    return effect, size


class _Base:
    """Tables of one pair's base run, `[kv_head, key position, (share query position)]`."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, settings: dict[str, Any]
    ) -> None:
        kv_heads, length, _ = k.shape
        self.settings, self.length = settings, length
        self.v = v
        self.q = q.reshape(kv_heads, -1, q.shape[-1])  # [kv, (share pos), d]
        self.grad = grad.reshape(len(grad), kv_heads, -1, grad.shape[-1])
        scores = torch.bmm(k, self.q.transpose(1, 2))
        self.log_sum: Tensor | None = None
        position = torch.arange(length, device=k.device)
        self._mask(self._cap(scores), position)
        sink = settings["sinks"]
        self.log_sum = scores.logsumexp(dim=1, keepdim=True)
        if sink is not None:
            by_query = sink.to(scores).view(kv_heads, 1, -1, 1).expand(-1, -1, -1, length)
            self.log_sum = torch.logaddexp(self.log_sum, by_query.reshape(kv_heads, 1, -1))
        self.weight = (scores - self.log_sum).exp_()
        z = torch.bmm(self.weight.transpose(1, 2), v)  # [kv, (share pos), d_v]
        self.norm = z.square().sum(-1).view(-1, length).sum(0).sqrt_().clamp_(min=1e-30)
        self.along = [
            torch.bmm(v, g.transpose(1, 2)) - (g * z).sum(-1).unsqueeze(1) for g in self.grad
        ]
        square = v.square().sum(-1).unsqueeze(2) + z.square().sum(-1).unsqueeze(1)
        self.distance = (square - 2 * torch.bmm(v, z.transpose(1, 2))).clamp_(min=0).sqrt_()

    def finish(self, new: Tensor, pos: Tensor) -> None:
        """Turn products of new keys with the base queries into weights, in place."""
        assert self.log_sum is not None
        self._cap(new).sub_(self.log_sum).clamp_(max=_LARGEST)
        self._mask(new, pos).exp_()

    def _cap(self, scores: Tensor) -> Tensor:
        scores.mul_(self.settings["scale"])
        if (softcap := self.settings["softcap"]) is not None:
            scores.div_(softcap).tanh_().mul_(softcap)
        return scores

    def _mask(self, scores: Tensor, pos: Tensor) -> Tensor:
        """Hide keys at `pos` from queries that do not see them."""
        query = torch.arange(self.length, device=pos.device)
        hidden = query < pos[:, None]
        if (window := self.settings["window"]) is not None:
            hidden |= query >= pos[:, None] + window
        by_share = scores.view(*scores.shape[:2], -1, self.length)
        by_share.masked_fill_(hidden[None, :, None], -torch.inf)
        return scores


def _by_row(tokens: Tokens, n_rows: int) -> tuple[Tensor, Tensor]:
    """Return, per row number, the first of its tokens and how many it has."""
    n_rows = max(n_rows, int(tokens.row[-1]) + 1 if len(tokens) else 0)
    count = torch.bincount(tokens.row, minlength=n_rows)
    return count.cumsum(0) - count, count
