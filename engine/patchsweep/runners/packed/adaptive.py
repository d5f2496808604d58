"""The adaptive forward pass: runs the tokens that a patch changes, takes the rest to first order.

A token of a patched run is *awake* where it differs noticeably from the base run, else *asleep*.
Awake tokens run through the model's own blocks. An asleep token is not run: what changes there is
multiplied with the base run's gradient and added to the row's correction. After each block tokens
wake and fall asleep by two thresholds: `theta`, the change of a metric to first order, and `tau`,
the change of an activation relative to the base run's. With both at 0 this is the exact pass; at
infinity no row starts, and every value is the base run's plus the attribution estimate.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from patchsweep_kernels.attention_change import attention_change
from patchsweep_kernels.replaced import replaced_attention
from patchsweep_kernels.tokens import Tokens
from torch import Tensor

from patchsweep.forward.grad import Gradients
from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.models.moves import Moves, move_together, on_cpu
from patchsweep.runners.packed.forward import PackedBlocks
from patchsweep.runners.packed.schedule import PackedBatch, PackedTokens
from patchsweep.runners.packed.tables import PackedInput, TokenTables, Writes

# a token wakes where its attention output changes by this many tau, and sleeps where its residual
# changes by less than tau: measured, see docs/design/adaptive.md
WAKE = 5.0


@dataclass(frozen=True)
class Thresholds:
    """What makes a token wake; a row may have its own."""

    theta: Float[Tensor, "metric row"]  # in units of the metric
    tau: Float[Tensor, " row"]  # relative


@dataclass(frozen=True)
class AdaptiveRows:
    """The rows of an adaptive batch after the last block."""

    row: Int[Tensor, " token"]  # rows of the tokens that are awake and read
    pos: Int[Tensor, " token"]
    resid: Float[Tensor, "token d_model"]  # their final residuals
    linear: Float[Tensor, "metric row"]  # what was added to first order
    token_layers: Int[Tensor, " row"]  # tokens times blocks that ran


class TooManyAwake(Exception):
    """More tokens are awake than a batch may hold."""


class AdaptiveBlocks(PackedBlocks):
    """The awake tokens of an adaptive batch, and the corrections of its rows.

    `given.base` holds queries after rotary, the site `rot_q`.
    """

    def __init__(
        self,
        unwrapped: UnwrappedModel,
        packed: PackedBatch,
        given: PackedInput,
        gradients: Gradients,
        thresholds: Thresholds,
    ) -> None:
        super().__init__(unwrapped, packed, given)
        self.gradients, self.thresholds = gradients, thresholds
        n_rows = len(packed.patch)
        self.device = device = given.base.devices[0]
        self._writes = Writes(packed, given)
        reads = packed.reads[packed.pair][:, : packed.length].astype(np.int64)
        self.row_pair, read = move_together(
            [on_cpu(self._writes.local[packed.pair]), on_cpu(reads)], device
        )
        self.reads = read.bool()  # [row, pos]
        self.linear = torch.zeros(len(thresholds.theta), n_rows, device=device)
        self.token_layers = torch.zeros(n_rows, dtype=torch.int64, device=device)
        empty = torch.zeros(0, dtype=torch.int64, device=device)
        self.awake = Tokens(empty, empty, empty)
        self.hidden = given.base.resid[0].new_zeros(0, given.base.resid[0].shape[-1])
        self.readers: Tokens  # of the block call under way
        self.replaced: Tokens | None = None  # whose keys they read; None: their own
        self.keys: Tensor  # of the replaced tokens
        self.values: Tensor

    @torch.no_grad()
    def run(self, max_tokens: int, room: int | None) -> AdaptiveRows:
        """Run all rows, at most about `max_tokens` tokens in one call of a block.

        Raises:
            TooManyAwake: more than `room` tokens are awake at once.
        """
        n_layers = self.unwrapped.n_layers
        with self.hooks():
            for layer in range(int(self.packed.entry.min()), n_layers):
                self.run_block(layer, max_tokens)
                if room is not None and len(self.awake) > room:
                    raise TooManyAwake
            self.enter_rows(n_layers)
        return self.result()

    def run_block(self, layer: int, max_tokens: int) -> None:
        """Run one block on all awake tokens; wake tokens, and put others to sleep."""
        self.enter_rows(layer)
        tokens, hidden = self.awake, self.hidden
        kept: list[tuple[Tokens, Tensor]] = []
        for low, high in _parts(tokens.row, max_tokens):
            part = tokens.at(slice(low, high))
            out = self._call(layer, part, hidden[low:high], patched=True)
            woken = self._wake(layer, part)
            if len(woken):
                base = self.given.base.resid[layer].to(self.device)
                self.replaced = part
                more = self._call(layer, woken, base[woken.pair, woken.pos], patched=False)
                part, out = self._merged(part, out, woken, more)
            kept.append(self._sleep(layer, part, out))
        if kept:
            self.awake = _joined([part for part, _ in kept])
            self.hidden = torch.cat([out for _, out in kept])

    def enter_rows(self, layer: int) -> None:
        """Add the patched tokens of rows that enter at `layer`, with patches in the stream."""
        rows = np.flatnonzero(self.packed.entry == layer)
        if len(rows):
            count = self.packed.stop[rows] - self.packed.start[rows]
            row = np.repeat(rows, count)
            pos = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
            pos += np.repeat(self.packed.start[rows], count)
            row_t, pos_t = move_together([on_cpu(row), on_cpu(pos)], self.device)
            tokens = Tokens(row_t, pos_t, self.row_pair[row_t])
            base = self.given.base.resid[layer].to(self.device)
            hidden = base[tokens.pair, tokens.pos]
            self.tables = self._tables(layer, tokens, (row, pos))
            self.write(hidden, *self.stream)
            self.awake, self.hidden = self._merged(self.awake, self.hidden, tokens, hidden)

    def result(self) -> AdaptiveRows:
        """Return what is left after the last block."""
        read = self.reads[self.awake.row, self.awake.pos].nonzero().squeeze(1)
        return AdaptiveRows(
            self.awake.row[read],
            self.awake.pos[read],
            self.hidden[read],
            self.linear,
            self.token_layers,
        )

    def attended(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, settings: dict[str, Any]
    ) -> Tensor:
        """See `PackedBlocks`."""
        base = self.given.base
        self.settings = settings
        if self.replaced is None:
            self.keys, self.values = k, v
        return replaced_attention(
            q,
            self.readers,
            self.keys,
            self.values,
            self.readers if self.replaced is None else self.replaced,
            base.keys[layer].to(q.device),
            base.values[layer].to(q.device),
            **settings,
        )

    def _call(self, layer: int, tokens: Tokens, hidden: Tensor, *, patched: bool) -> Tensor:
        """Return the block's output for `tokens`."""
        if patched:
            self.replaced = None
        self.readers = tokens
        on_host = None
        if patched and self.packed.write_layers[:, layer].any():
            on_host = tuple(torch.stack((tokens.row, tokens.pos)).cpu().numpy())  # waits
        self.tables = self._tables(layer, tokens, on_host)
        self.token_layers.index_add_(0, tokens.row, torch.ones_like(tokens.row))
        return self.replay(hidden)

    def _tables(self, layer: int, tokens: Tokens, on_host: Any) -> TokenTables:
        """Return the tables of `tokens`, for hooks that write patches and read block arguments.

        `on_host`: their rows and positions; None: no patch is written into them.
        """
        read = None
        if layer == self.unwrapped.n_layers - 1:
            # of adaptive rows none may be read; modules need not take zero tokens
            read = self.reads[tokens.row, tokens.pos].nonzero().squeeze(1)
            read = read if len(read) else read.new_zeros(1)
        tables = TokenTables(layer, tokens.pair, tokens.pos, {}, read)
        if on_host is None:
            return tables
        row, pos = on_host
        packed = self.packed
        inside = (packed.start[row] <= pos) & (pos < packed.stop[row])
        write = np.flatnonzero(inside & packed.write_layers[row, layer])
        writes = self._writes.at(PackedTokens(layer, packed.pair[row], pos, write, row[write]))
        moves = Moves()
        moves.add(writes)
        moves.start(self.device)
        return replace(tables, writes=moves.there(writes))

    def _wake(self, layer: int, tokens: Tokens) -> Tokens:
        """Return the asleep tokens that wake, given the new keys of `tokens`; add the others."""
        packed, base = self.packed, self.given.base
        by_token = packed.token_entry & (packed.entry == layer)
        sources, index = tokens, None
        if by_token.any():  # their keys are the base run's
            (entered,) = move_together([on_cpu(by_token.astype(np.int64))], self.device)
            index = (entered[tokens.row] == 0).nonzero().squeeze(1)
            sources = tokens.at(index)
        if not len(sources):
            return sources
        rows, local = sources.row.unique_consecutive(return_inverse=True)
        q = base.sites["rot_q"][layer].to(self.device)
        effect, size = attention_change(
            q.unflatten(-1, (-1, base.keys[layer].shape[-1])).transpose(1, 2),
            base.keys[layer].to(self.device),
            base.values[layer].to(self.device),
            self.gradients.z[layer].to(self.device),
            self.keys if index is None else self.keys[index],
            self.values if index is None else self.values[index],
            Tokens(local, sources.pos, sources.pair),
            len(rows),
            **self.settings,
        )
        length = self.packed.length
        effect, size = effect[..., :length], size[..., :length]
        asleep = torch.ones(len(rows), length, dtype=torch.bool, device=self.device)
        asleep[local, sources.pos] = False
        if layer == self.unwrapped.n_layers - 1:
            asleep &= self.reads[rows]
        theta, tau = self.thresholds.theta[:, rows], self.thresholds.tau[rows]
        wakes = (effect.abs() > theta[..., None]).any(0) | (size > WAKE * tau[:, None])
        wakes &= asleep
        self.linear[:, rows] += (effect * (asleep & ~wakes)).sum(-1).to(self.linear)
        at, pos = wakes.nonzero().unbind(1)
        return Tokens(rows[at], pos, self.row_pair[rows[at]])

    def _sleep(self, layer: int, tokens: Tokens, out: Tensor) -> tuple[Tokens, Tensor]:
        """Return the tokens that stay awake after `layer`; add the others."""
        if layer == self.unwrapped.n_layers - 1:
            stays = self.reads[tokens.row, tokens.pos].nonzero().squeeze(1)
            return tokens.at(stays), out[stays]
        base = self.given.base.resid[layer + 1].to(self.device)[tokens.pair, tokens.pos]
        gradient = self.gradients.stream[layer + 1].to(self.device)[:, tokens.pair, tokens.pos]
        delta = out - base
        effect = torch.einsum("tc,mtc->mt", delta, gradient)
        stays = (effect.abs() > self.thresholds.theta[:, tokens.row]).any(0)
        stays |= delta.norm(dim=-1) > self.thresholds.tau[tokens.row] * base.norm(dim=-1)
        self.linear.index_add_(1, tokens.row, effect.masked_fill(stays, 0.0).to(self.linear))
        kept = stays.nonzero().squeeze(1)
        return tokens.at(kept), out[kept]

    def _merged(self, a: Tokens, x: Tensor, b: Tokens, y: Tensor) -> tuple[Tokens, Tensor]:
        """Return the tokens of both, in order, with their vectors."""
        both = _joined([a, b])
        order = torch.argsort(both.row * self.packed.length + both.pos)
        return both.at(order), torch.cat([x, y])[order]


def _parts(row: Tensor, max_tokens: int) -> list[tuple[int, int]]:
    """Return spans of whole rows with about `max_tokens` tokens, of equal size."""
    n = len(row)
    if n <= max_tokens:
        return [(0, n)] if n else []
    bounds = [0]
    for i in range(1, n_parts := -(-n // max_tokens)):
        cut = int(torch.searchsorted(row, row[i * n // n_parts]))
        if cut > bounds[-1]:
            bounds.append(cut)
    bounds.append(n)
    return list(itertools.pairwise(bounds))


def _joined(parts: list[Tokens]) -> Tokens:
    return Tokens(
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("row", "pos", "pair"))
    )
