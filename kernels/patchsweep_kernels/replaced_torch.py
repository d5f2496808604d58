"""`replaced_attention` and `attention_change` in plain torch: few large products, part by part.

A part is whole rows of one pair, as many as keep its temporaries within a budget. Where parts begin
is read from the tokens, so on a GPU the host waits for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchsweep_kernels.tokens import Tokens

# elements of one temporary: 8 MB in fp32
_BUDGET = 1 << 21
# exponents above this are cut; so large a change is above any threshold
LARGEST = 60.0


@torch.no_grad()
def attend(
    q: Tensor,
    query: Tokens,
    k: Tensor,
    v: Tensor,
    replaced: Tokens,
    base_k: Tensor,
    base_v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Compute `replaced_attention`; its arguments are checked already."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    n_heads, kv_heads, d_v = q.shape[1], k.shape[1], v.shape[2]
    share = n_heads // kv_heads
    out = torch.empty(len(q), n_heads, d_v, dtype=dtype, device=q.device)
    k_heads, v_heads = (x.repeat_interleave(share, dim=1) if share > 1 else x for x in (k, v))
    first, count = _by_row(replaced, int(query.row[-1]) + 1 if len(query) else 0)
    length = base_k.shape[2]
    for pair, low, high in query.parts(_BUDGET // (n_heads * length)):
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
def change_of_output(
    base_q: Tensor,
    base_k: Tensor,
    base_v: Tensor,
    grad_z: Tensor,
    k: Tensor,
    v: Tensor,
    replaced: Tokens,
    n_rows: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute `attention_change`; its arguments are checked already."""
    dtype = torch.promote_types(base_q.dtype, torch.float32)
    n_metrics, _, n_heads, length, _ = grad_z.shape
    kv_heads = base_k.shape[1]
    share = n_heads // kv_heads
    effect = torch.zeros(n_metrics, n_rows, length, dtype=dtype, device=k.device)
    size = torch.zeros(n_rows, length, dtype=dtype, device=k.device)
    settings = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    tables: dict[int, _Base] = {}
    for pair, low, high in replaced.parts(_BUDGET // (n_heads * length)):
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
        self._cap(new).sub_(self.log_sum).clamp_(max=LARGEST)
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
