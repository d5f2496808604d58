"""Attention with replaced positions, beside full attention over the changed prompt."""

from __future__ import annotations

import pytest
import torch
from patchsweep_kernels import replaced
from patchsweep_kernels.replaced import Tokens, attention_change, replaced_attention
from torch import Tensor

PAIRS, HEADS, KV_HEADS, LENGTH, D, D_V = 2, 4, 2, 12, 8, 6
SETTINGS = [
    {},
    {"window": 4},
    {"softcap": 2.0},
    {"sinks": torch.linspace(-1, 2, HEADS)},
    {"window": 5, "softcap": 3.0, "sinks": torch.linspace(0, 1, HEADS)},
]
# (row, pair, replaced positions)
ROWS = [(0, 0, (3,)), (1, 0, (0, 4, 5)), (2, 0, (11,)), (3, 1, (2, 7)), (5, 1, tuple(range(1, 12)))]


def full(q: Tensor, k: Tensor, v: Tensor, scale: float, window=None, softcap=None, sinks=None):
    """Causal attention `[head, pos, d]` of one prompt, written out."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    t, s = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    hidden = s > t
    if window is not None:
        hidden |= s <= t - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.view(-1, 1, 1).expand(-1, LENGTH, 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., :LENGTH] @ v


class Case:
    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        self.q = drawn(PAIRS, HEADS, LENGTH, D)
        self.k, self.v = drawn(PAIRS, KV_HEADS, LENGTH, D), drawn(PAIRS, KV_HEADS, LENGTH, D_V)
        self.grad = drawn(2, PAIRS, HEADS, LENGTH, D_V)
        self.tokens = Tokens(*(torch.tensor([x[i] for x in self.flat()]) for i in range(3)))
        n = len(self.tokens)
        self.new_k, self.new_v = drawn(n, KV_HEADS, D), drawn(n, KV_HEADS, D_V)
        self.new_q = drawn(n, HEADS, D)

    @staticmethod
    def flat() -> list[tuple[int, int, int]]:
        return [(row, pos, pair) for row, pair, positions in ROWS for pos in positions]

    def of_row(self, row: int, pair: int, *, queries: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a row's prompt."""
        q, k, v = self.q[pair].clone(), self.k[pair].clone(), self.v[pair].clone()
        for i in torch.nonzero(self.tokens.row == row).flatten().tolist():
            pos = self.tokens.pos[i]
            k[:, pos], v[:, pos] = self.new_k[i], self.new_v[i]
            if queries:
                q[:, pos] = self.new_q[i]
        return q, k, v


@pytest.fixture(params=[1 << 21, 400], ids=["one part", "many parts"])
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setattr(replaced, "_BUDGET", request.param)
    return Case()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s) or "plain")
def test_tokens_that_run_read_their_rows_keys(case: Case, settings: dict) -> None:
    z = replaced_attention(
        case.new_q,
        case.tokens,
        case.new_k,
        case.new_v,
        case.tokens,
        case.k,
        case.v,
        scale=0.5,
        **settings,
    )
    for row, pair, _ in ROWS:
        here = case.tokens.row == row
        wanted = full(*case.of_row(row, pair, queries=True), 0.5, **settings)
        torch.testing.assert_close(z[here], wanted[:, case.tokens.pos[here]].transpose(0, 1))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s) or "plain")
def test_woken_tokens_read_the_keys_of_others(case: Case, settings: dict) -> None:
    woken = Tokens(
        torch.tensor([0, 1, 1, 3]), torch.tensor([7, 2, 9, 10]), torch.tensor([0, 0, 0, 1])
    )
    q = case.q[woken.pair, :, woken.pos]
    z = replaced_attention(
        q, woken, case.new_k, case.new_v, case.tokens, case.k, case.v, scale=0.5, **settings
    )
    for i, (row, pos, pair) in enumerate(
        zip(*(x.tolist() for x in (woken.row, woken.pos, woken.pair)), strict=True)
    ):
        wanted = full(*case.of_row(row, pair, queries=False), 0.5, **settings)
        torch.testing.assert_close(z[i], wanted[:, pos])


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s) or "plain")
def test_change_of_tokens_that_do_not_run(case: Case, settings: dict) -> None:
    number = {row: i for i, (row, _, _) in enumerate(ROWS)}
    rows = torch.tensor([number[row] for row in case.tokens.row.tolist()])
    tokens = Tokens(rows, case.tokens.pos, case.tokens.pair)
    effect, size = attention_change(
        case.q,
        case.k,
        case.v,
        case.grad,
        case.new_k,
        case.new_v,
        tokens,
        len(ROWS),
        scale=0.5,
        **settings,
    )
    for row, pair, positions in ROWS:
        i = number[row]
        before = full(case.q[pair], case.k[pair], case.v[pair], 0.5, **settings)
        change = full(*case.of_row(row, pair, queries=False), 0.5, **settings) - before
        wanted = torch.einsum("htd,mhtd->mt", change, case.grad[:, pair])
        torch.testing.assert_close(effect[:, i], wanted)
        relative = change.square().sum((0, 2)).sqrt() / before.square().sum((0, 2)).sqrt()
        assert (size[i] >= relative - 1e-9).all(), "an upper bound"
        assert (size[i] <= 20 * relative + 1e-9).all(), "a useful one"
        assert (effect[:, i, : min(positions)] == 0).all()
        assert (size[i, : min(positions)] == 0).all()
