"""Attention with replaced positions, beside full attention over the changed prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from naive import padded, refused
from patchsweep_kernels import attention_change as change_module
from patchsweep_kernels import replaced_torch
from patchsweep_kernels.attention_change import attention_change
from patchsweep_kernels.replaced import replaced_attention
from patchsweep_kernels.tokens import Tokens
from torch import Tensor

PAIRS, LENGTH, SCALE = 3, 12, 0.3


@dataclass(frozen=True)
class Heads:
    heads: int = 4
    kv_heads: int = 2
    d: int = 8
    d_v: int = 6


SHAPES = {
    "grouped": Heads(),
    "ungrouped": Heads(3, 3, 16, 16),
    "one key head": Heads(3, 1, 5, 20),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 4},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all": {"window": 5, "softcap": 3.0, "sinks": True},
}
# (row, pair, replaced positions); row 4 has none
ROWS = [
    (0, 0, (3,)),
    (1, 0, (0, 4, 5)),
    (2, 0, (11,)),
    (3, 1, (2, 7)),
    (5, 2, tuple(range(1, 12))),
]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
# fp64 is the reference's alone. Results are sums of terms of both signs, of order 1 to 20, so fp32
# rounding is relative to the largest element, not to each.
RELATIVE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_near(found: Tensor, wanted: Tensor, relative: float | None = None) -> None:
    relative = RELATIVE[found.dtype] if relative is None else relative
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max()
    assert error <= relative * wanted.abs().max(), (error, wanted.abs().max())


def full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention `[head, pos, d]` of one prompt, written out in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * SCALE
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    length = q.shape[1]
    t, s = torch.arange(length)[:, None], torch.arange(length)[None]
    hidden = s > t
    if window is not None:
        hidden |= s <= t - window
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        sink = sinks.double().view(-1, 1, 1).expand(-1, length, 1)
        scores = torch.cat([scores, sink], -1)
    return scores.softmax(-1)[..., :length] @ v


def tokens_of(rows: list[tuple[int, int, tuple[int, ...]]]) -> Tokens:
    flat = [(row, pos, pair) for row, pair, positions in rows for pos in positions]
    return Tokens(*torch.tensor(flat, dtype=torch.int64).view(-1, 3).unbind(1))


class Case:
    """Base runs of some pairs, and rows with replaced tokens; all inputs are strided views."""

    def __init__(
        self,
        heads: Heads = SHAPES["grouped"],
        dtype: torch.dtype = torch.float32,
        rows: list[tuple[int, int, tuple[int, ...]]] = ROWS,
        length: int = LENGTH,
        metrics: int = 2,
    ) -> None:
        g = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            return padded(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype))

        h, kv = heads.heads, heads.kv_heads
        self.rows, self.tokens, self.length = rows, tokens_of(rows), length
        self.q = drawn(PAIRS, length, h, heads.d).transpose(1, 2)
        self.k, self.v = drawn(PAIRS, kv, length, heads.d), drawn(PAIRS, kv, length, heads.d_v)
        self.grad = drawn(metrics, PAIRS, h, length, heads.d_v)
        n = len(self.tokens)
        self.new_k, self.new_v = drawn(n, kv, heads.d), drawn(n, kv, heads.d_v)
        self.new_q = drawn(n, h, heads.d)
        self.sinks = torch.linspace(-1, 2, h, dtype=dtype)

    def settings(self, name: str) -> dict[str, Any]:
        settings = dict(SETTINGS[name])
        if settings.get("sinks"):
            settings["sinks"] = self.sinks
        return settings

    def of_row(self, row: int, pair: int, *, queries: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a row's prompt."""
        q, k, v = self.q[pair].clone(), self.k[pair].clone(), self.v[pair].clone()
        for i in torch.nonzero(self.tokens.row == row).flatten().tolist():
            pos = self.tokens.pos[i]
            k[:, pos], v[:, pos] = self.new_k[i], self.new_v[i]
            if queries:
                q[:, pos] = self.new_q[i]
        return q, k, v

    def attention(self, query: Tokens, q: Tensor, **settings: Any) -> Tensor:
        given = (self.new_k, self.new_v, self.tokens, self.k, self.v)
        return replaced_attention(q, query, *given, scale=SCALE, **settings)

    def run_all(self, **settings: Any) -> Tensor:
        """Attention of the replaced tokens themselves."""
        return self.attention(self.tokens, self.new_q, **settings)

    def wanted_of_all(self, **settings: Any) -> Tensor:
        wanted = torch.empty(*self.new_q.shape[:2], self.v.shape[-1], dtype=torch.float64)
        for row, pair, _ in self.rows:
            here = self.tokens.row == row
            of_row = full(*self.of_row(row, pair, queries=True), **settings)
            wanted[here] = of_row[:, self.tokens.pos[here]].transpose(0, 1)
        return wanted

    def change(self, **settings: Any) -> tuple[Tensor, Tensor]:
        """Effect and bound of rows 0 to the last one."""
        given = (self.q, self.k, self.v, self.grad, self.new_k, self.new_v, self.tokens)
        n_rows = max(row for row, _, _ in self.rows) + 1
        return attention_change(*given, n_rows, scale=SCALE, **settings)

    def wanted_change(self, **settings: Any) -> tuple[Tensor, Tensor]:
        """Effect, and the norm of the change relative to the output's."""
        n_rows = max(row for row, _, _ in self.rows) + 1
        effect = torch.zeros(len(self.grad), n_rows, self.length, dtype=torch.float64)
        relative = torch.zeros(n_rows, self.length, dtype=torch.float64)
        for row, pair, _ in self.rows:
            before = full(self.q[pair], self.k[pair], self.v[pair], **settings)
            change = full(*self.of_row(row, pair, queries=False), **settings) - before
            effect[:, row] = torch.einsum("htd,mhtd->mt", change, self.grad[:, pair].double())
            relative[row] = change.square().sum((0, 2)).sqrt()
            relative[row] /= before.square().sum((0, 2)).sqrt()
        return effect, relative

    def exact_bound(self, **settings: Any) -> Tensor:
        """The bound as the reference gives it in fp64."""
        base = (x.double() for x in (self.q, self.k, self.v, self.grad, self.new_k, self.new_v))
        n_rows = max(row for row, _, _ in self.rows) + 1
        settings = {"window": None, "softcap": None, "sinks": None} | settings
        return replaced_torch.change_of_output(*base, self.tokens, n_rows, scale=SCALE, **settings)[
            1
        ]

    def check_change(self, useful: float = 20.0, **settings: Any) -> None:
        (effect, size), (wanted, relative) = self.change(**settings), self.wanted_change(**settings)
        assert_near(effect, wanted)
        bound = self.exact_bound(**settings)
        assert_near(size[:, 1:], bound[:, 1:], 10 * RELATIVE[size.dtype])
        # z is v at position 0: their distance is the root of what rounding leaves of 0
        assert_near(size[:, 0], bound[:, 0], 0.01)
        room = 100 * RELATIVE[effect.dtype]
        assert (size >= relative - room).all(), "an upper bound"
        assert (size <= useful * relative + room).all(), "a useful one"
        for row in range(len(size)):
            positions = self.tokens.pos[self.tokens.row == row].tolist()
            unseen = slice(0, min(positions, default=self.length))
            assert (effect[:, row, unseen] == 0).all()
            assert (size[row, unseen] == 0).all()


@pytest.fixture(params=["one part", "many parts"])
def parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many parts":
        monkeypatch.setattr(replaced_torch, "_BUDGET", 400)
        monkeypatch.setattr(change_module, "_BUDGET", 150)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("parts")
def test_tokens_that_run_read_their_rows_keys(name: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    settings = case.settings(name)
    assert_near(case.run_all(**settings), case.wanted_of_all(**settings))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("parts")
def test_woken_tokens_read_the_keys_of_others(name: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    settings = case.settings(name)
    woken = tokens_of([(0, 0, (7,)), (1, 0, (2, 9)), (3, 1, (10,)), (4, 1, (11,))])
    z = case.attention(woken, case.q[woken.pair, :, woken.pos], **settings)
    wanted = [
        full(*case.of_row(row, pair, queries=False), **settings)[:, pos]
        for row, pos, pair in zip(woken.row.tolist(), woken.pos.tolist(), woken.pair, strict=True)
    ]
    assert_near(z, torch.stack(wanted))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("parts")
def test_change_of_tokens_that_do_not_run(name: str, dtype: torch.dtype) -> None:
    case = Case(dtype=dtype)
    case.check_change(**case.settings(name))


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_of_odd_sizes(shape: str, name: str) -> None:
    case = Case(SHAPES[shape], metrics=1)
    settings = case.settings(name)
    assert_near(case.run_all(**settings), case.wanted_of_all(**settings))
    case.check_change(**settings)


LONG = 75
MANY = [(row, row // 12, (row % 7, 20 + row, 60)) for row in range(30)]
LONG_ROWS = [(0, 0, tuple(range(LONG))), (1, 1, tuple(range(5, LONG))), (2, 2, (0, 33, 74))]


@pytest.mark.parametrize(
    ("rows", "name"),
    [(MANY, "plain"), (LONG_ROWS, "window")],
    ids=["many rows", "long rows and a window"],
)
def test_more_than_a_tile_holds(rows: list[tuple[int, int, tuple[int, ...]]], name: str) -> None:
    case = Case(Heads(2, 1, 16, 16), rows=rows, length=LONG, metrics=1)
    settings = case.settings(name)
    assert_near(case.run_all(**settings), case.wanted_of_all(**settings))
    case.check_change(useful=200.0, **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sums_of_16_bit_inputs_are_in_fp32(dtype: torch.dtype) -> None:
    case = Case(Heads(2, 1), dtype=dtype, metrics=1)  # few: the interpreter is slow with bf16
    z = case.run_all()
    assert z.dtype == dtype
    # the output's own rounding, which the interpreter does by cutting off
    assert_near(z, case.wanted_of_all(), relative=2 * torch.finfo(dtype).eps)
    effect, size = case.change()
    assert effect.dtype == size.dtype == torch.float32
    case.check_change()


def _forget_a_token(case: Case, settings: dict[str, Any]) -> None:
    case.tokens.pos[5] = 10  # row 3 replaces position 10 in the place of 7


def _other_pair(case: Case, settings: dict[str, Any]) -> None:
    case.k = case.k.roll(1, 0)


def _other_head(case: Case, settings: dict[str, Any]) -> None:
    case.new_v = case.new_v.flip(1)


def _later_window(case: Case, settings: dict[str, Any]) -> None:
    settings["window"] += 1


def _no_sinks(case: Case, settings: dict[str, Any]) -> None:
    del settings["sinks"]


def _other_cap(case: Case, settings: dict[str, Any]) -> None:
    settings["softcap"] *= 1.001


@pytest.mark.parametrize(
    "mistake",
    [_forget_a_token, _other_pair, _other_head, _later_window, _no_sinks, _other_cap],
    ids=lambda f: f.__name__.strip("_"),
)
def test_planted_mistake_is_seen(mistake: Any) -> None:
    """Or all that is above would prove nothing."""
    case = Case()
    settings = case.settings("all")
    wanted = case.wanted_of_all(**settings), case.wanted_change(**settings)[0]
    mistake(case, settings)
    for found, exact in zip(
        (case.run_all(**settings), case.change(**settings)[0]), wanted, strict=True
    ):
        with pytest.raises(AssertionError):
            assert_near(found, exact)


def test_nothing_replaced_and_nothing_asked() -> None:
    case = Case(rows=[])
    assert case.attention(case.tokens, case.new_q).shape == (0, 4, 6)
    woken = tokens_of([(0, 0, (7,)), (2, 1, (3,))])
    z = case.attention(woken, case.q[woken.pair, :, woken.pos])
    wanted = [full(case.q[i], case.k[i], case.v[i])[:, pos] for i, pos in ((0, 7), (1, 3))]
    assert_near(z, torch.stack(wanted))
    given = (case.q, case.k, case.v, case.grad, case.new_k, case.new_v, case.tokens)
    for n_rows in (0, 2):
        effect, size = attention_change(*given, n_rows, scale=SCALE)
        assert effect.shape == (2, n_rows, LENGTH)
        assert size.shape == (n_rows, LENGTH)
        assert not effect.any()
        assert not size.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"new_k": torch.zeros(18, 2, 9)}, "k must have shape"),
        ({"new_v": torch.zeros(18, 3, 6)}, "no multiple of the 3"),
        ({"k": torch.zeros(3, 2, 12, 8).half()}, "base_k is torch.float16"),
        ({"tokens": tokens_of([(0, 0, (1,))])}, "replaced.row must have shape"),
    ],
    ids=["keys", "heads", "dtype", "tokens"],
)
def test_wrong_input_is_named(change: dict[str, Any], message: str) -> None:
    case = Case()
    for name, value in change.items():
        setattr(case, name, value)
    q, query = case.new_q, tokens_of(ROWS)
    with refused(message):
        case.attention(query, q)
    with refused(message):
        case.change()
