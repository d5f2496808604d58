"""prefix_attention equals attention computed row by row, and nothing outside a row reaches it."""

from __future__ import annotations

from typing import Any

import naive
import pytest
import torch
from naive import DTYPES, TOLERANCE, make_rows, refused
from patchsweep_kernels import attention, attention_torch, split
from patchsweep_kernels.attention import Rows, prefix_attention
from patchsweep_kernels.dispatch import INTERPRETED
from torch import Tensor

# Rows of unequal length, groups of equal ones, a pair that comes back, a row without a prefix.
ROWS = {
    "one": make_rows([1], [0], [3]),
    "no_prefix": make_rows([5, 2], [0, 0], [0, 0]),
    "mixed": make_rows(
        [3, 3, 3, 1, 5, 2, 2, 7], [0, 0, 0, 2, 2, 1, 1, 0], [4, 4, 5, 0, 7, 1, 1, 8]
    ),
    "tokens37": make_rows([7, 7, 6, 5, 4, 4, 3, 1], [0] * 8, [2, 2, 3, 4, 5, 5, 6, 8]),
    # more than one block of adjacent tokens for each pair, and rows that span blocks
    "tokens224": make_rows(
        [1, 60, 2, 2, 33, 1, 1, 40, 9, 75], [0] * 5 + [2] * 5, [9, 0, 3, 4, 1, 0, 7, 2, 9, 0]
    ),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window3": {"window": 3},
    "window1": {"window": 1},
    "window_unused": {"window": 50},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "all": {"window": 4, "softcap": 1.5, "sinks": True},
}


def _inputs(
    rows: Rows, n_heads: int, kv_heads: int, d: int, d_v: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Strided views with NaN around them; the prefix is NaN where no row may read it."""
    n_tokens = int(rows.offsets[-1])

    def packed(heads: int, size: int) -> Tensor:
        return naive.padded(torch.randn(heads, n_tokens, size).to(dtype), axis=1).transpose(0, 1)

    def prefix(size: int) -> Tensor:
        full = torch.full((4, kv_heads, 9, size), torch.nan, dtype=dtype)
        for pair in range(3):
            reads = rows.start[rows.pair == pair]
            stop = int(reads.max()) if len(reads) else 0
            full[pair, :, :stop] = torch.randn(kv_heads, stop, size).to(dtype)
        return full

    return {
        "q": packed(n_heads, d),
        "k": packed(kv_heads, d),
        "v": packed(kv_heads, d_v),
        "prefix_k": prefix(d),
        "prefix_v": prefix(d_v),
    }


def _settings(variant: str, n_heads: int) -> dict[str, Any]:
    settings: dict[str, Any] = dict(VARIANTS[variant])
    if settings.pop("sinks", False):
        settings["sinks"] = torch.randn(n_heads)
    return settings


def _assert_matches(inputs: dict[str, Any], rows: Rows, settings: dict[str, Any]) -> None:
    scale = inputs["q"].shape[-1] ** -0.5
    out = prefix_attention(**inputs, rows=rows, scale=scale, **settings)
    expected = naive.attention(**inputs, rows=rows, scale=scale, **settings)
    assert out.dtype == inputs["q"].dtype
    torch.testing.assert_close(
        out.double(), expected, **_tolerance(inputs["q"].dtype), equal_nan=False
    )


def _tolerance(dtype: torch.dtype) -> dict[str, Any]:
    # On a GPU weights are rounded to the 16 bits of v; outputs are averages of values of order 1.
    return TOLERANCE[dtype] if dtype != torch.bfloat16 else {"atol": 2e-3, "rtol": 2**-7}


@pytest.mark.parametrize(
    ("rows", "variant"),
    [
        (rows, variant)
        for rows in ROWS
        for variant in VARIANTS
        if rows != "tokens224" or variant in ("plain", "window3", "all")  # slow if interpreted
    ],
)
def test_attention_equals_row_by_row(rows: str, variant: str) -> None:
    _assert_matches(
        _inputs(ROWS[rows], 6, 2, 16, 16, torch.float32), ROWS[rows], _settings(variant, 6)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    ("n_heads", "kv_heads", "d", "d_v"),
    [(9, 3, 64, 64), (1, 1, 1, 1), (4, 1, 63, 40), (2, 2, 123, 123), (3, 1, 256, 256)],
    ids=lambda n: str(n),
)
def test_attention_of_odd_heads_and_sizes(
    n_heads: int, kv_heads: int, d: int, d_v: int, dtype: torch.dtype
) -> None:
    rows = ROWS["mixed"]
    _assert_matches(_inputs(rows, n_heads, kv_heads, d, d_v, dtype), rows, {})


def test_attention_of_more_heads_on_one_key_head_than_a_tile_holds() -> None:
    rows = make_rows([2, 3], [0, 1], [4, 1])
    _assert_matches(_inputs(rows, 70, 2, 16, 16, torch.float32), rows, {"sinks": torch.randn(70)})


def test_attention_of_rows_longer_than_a_tile() -> None:
    rows = make_rows([70, 5, 70], [0, 0, 1], [9, 3, 0])
    _assert_matches(_inputs(rows, 2, 1, 16, 16, torch.float32), rows, {"window": 12})


def test_attention_reads_a_prefix_longer_than_a_tile() -> None:
    rows = make_rows([2, 3], [1, 0], [150, 131])
    inputs = _inputs(make_rows([2, 3], [1, 0], [9, 9]), 2, 1, 16, 16, torch.float32)
    inputs |= {name: torch.randn(2, 1, 150, 16) for name in ("prefix_k", "prefix_v")}
    _assert_matches(inputs, rows, {})


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize(("n_heads", "d"), [(7, 16), (3, 200)])
def test_attention_in_the_tiles_of_each_gpu(
    n_heads: int, d: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads that divide no tile, and prefixes of tiles that need no mask and tiles that do."""
    monkeypatch.setattr(attention, "capability_of", lambda device: capability)
    settings = attention.launch_settings(n_heads, d, d, torch.bfloat16, torch.device("cpu"))
    queries = settings["BLOCK_TOKENS"] * settings["BLOCK_HEADS"]
    assert settings["BLOCK_QUERIES"] - n_heads < queries <= settings["BLOCK_QUERIES"]
    rows = make_rows([2, 3, 30], [1, 0, 0], [150, 131, 140])
    inputs = _inputs(make_rows([2, 3, 30], [1, 0, 0], [9, 9, 9]), n_heads, 1, d, d, torch.bfloat16)
    inputs |= {name: torch.randn(2, 1, 150, d).bfloat16() for name in ("prefix_k", "prefix_v")}
    for variant in ({}, {"softcap": 1.5}, {"window": 40}):
        _assert_matches(inputs, rows, variant)


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts of each call, on a GPU of 64 multiprocessors that splits short prefixes too."""
    parts: list[int] = []
    merge = split.merge

    def noted(*arguments: Any) -> None:
        parts.append(len(arguments[0]))
        merge(*arguments)

    monkeypatch.setattr(split, "processors_of", lambda device: 64)
    monkeypatch.setattr(split, "PART_KEYS", 1)
    monkeypatch.setattr(split, "merge", noted)
    return parts


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", ["one", "no_prefix", "mixed"])
def test_attention_in_parts_of_which_most_hold_no_key(
    rows: str, variant: str, merged: list[int]
) -> None:
    _assert_matches(
        _inputs(ROWS[rows], 6, 2, 16, 16, torch.float32), ROWS[rows], _settings(variant, 6)
    )
    splits = INTERPRETED and rows != "no_prefix" and VARIANTS[variant].get("window") != 1
    assert bool(merged) == splits


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_in_parts_of_a_long_prefix(
    variant: str, dtype: torch.dtype, merged: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole tiles, tiles that some rows see, and rows behind all keys of some parts."""
    monkeypatch.setattr(split, "PART_KEYS", 30)
    rows = make_rows([2, 1, 3], [1, 1, 0], [20, 333, 290])
    inputs = _inputs(make_rows([2, 1, 3], [1, 1, 0], [9, 9, 9]), 6, 2, 40, 16, dtype)
    for name, size in (("prefix_k", 40), ("prefix_v", 16)):
        inputs[name] = torch.randn(2, 2, 333, size).to(dtype)
    settings = _settings(variant, 6)
    if "window" in settings:
        settings["window"] *= 60  # reaches over a few parts
    _assert_matches(inputs, rows, settings)
    if INTERPRETED:
        assert merged == [{"window1": 2, "window3": 6, "all": 8}.get(variant, 11)]


def test_attention_is_split_while_programs_leave_the_gpu_idle(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(split, "processors_of", lambda device: 132)
    q = torch.zeros(1)
    assert [split.n_parts(n, 4096, q) for n in (8, 33, 66, 67, 1000)] == [16, 4, 2, 1, 1]
    assert [split.n_parts(8, n, q) for n in (0, 511, 512, 100_000)] == [1, 1, 2, 16]
    monkeypatch.undo()
    assert split.n_parts(1, 4096, q) == 1  # a CPU


def _in_groups(**arguments: Any) -> Tensor:
    return attention_torch.in_groups(**arguments, softcap=None, sinks=None)


WAYS = {"groups": _in_groups, "blocks": attention_torch.in_blocks}


def _assert_way_matches(
    way: str, inputs: dict[str, Any], rows: Rows, window: int | None = None
) -> None:
    inputs = {**inputs, "rows": rows, "scale": 0.3, "window": window}
    out, expected = WAYS[way](**inputs), naive.attention(**inputs)
    dtype = inputs["q"].dtype
    assert out.dtype == dtype
    exact = {"atol": 1e-13, "rtol": 0.0}  # some hundred terms of order 1
    tolerance = exact if dtype == torch.float64 else TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, **tolerance, equal_nan=False)


@pytest.mark.parametrize("window", [None, 1, 3, 20])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_equals_row_by_row(way: str, rows: str, window: int | None) -> None:
    _assert_way_matches(way, _inputs(ROWS[rows], 6, 2, 16, 16, torch.float32), ROWS[rows], window)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float64], ids=[*DTYPES.keys(), "fp64"])
@pytest.mark.parametrize(
    ("n_heads", "kv_heads", "d", "d_v"),
    [(9, 3, 64, 64), (1, 1, 1, 1), (4, 1, 63, 40), (2, 2, 123, 123)],
    ids=lambda n: str(n),
)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_with_odd_heads_and_sizes(
    way: str, n_heads: int, kv_heads: int, d: int, d_v: int, dtype: torch.dtype
) -> None:
    rows = ROWS["tokens224"]
    _assert_way_matches(way, _inputs(rows, n_heads, kv_heads, d, d_v, dtype), rows)


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_with_a_block_of_which_some_read_no_prefix_and_some_a_long_one(
    way: str, window: int | None
) -> None:
    # fused attention takes 512 keys at a time: the first rows see none of the first 512
    rows = make_rows([2, 1, 3], [0, 0, 0], [0, 1, 700])
    inputs = _inputs(make_rows([2, 1, 3], [0, 0, 0], [0, 1, 9]), 2, 1, 16, 16, torch.float32)
    inputs |= {name: torch.randn(1, 1, 700, 16) for name in ("prefix_k", "prefix_v")}
    _assert_way_matches(way, inputs, rows, window)


@pytest.mark.parametrize("way", WAYS)
def test_each_way_in_slices_of_its_budget(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_torch, "_SCORE_BUDGET", 1000)
    monkeypatch.setattr(attention_torch, "_KEY_BUDGET", 4000)
    rows = make_rows([3] * 41, [0] * 30 + [1] * 11, [5] * 41)
    _assert_way_matches(way, _inputs(rows, 6, 2, 16, 16, torch.float32), rows, 4)


# The price of a way is its copies or its groups; see `blocks_pay`.
FASTER = {
    "one_group": ("groups", make_rows([3] * 50, [0] * 50, [5] * 50)),
    "few_rows_of_many_lengths": ("blocks", make_rows([7, 6, 5, 4], [0] * 4, [2, 3, 4, 5])),
    "many_rows_of_few_lengths": ("groups", make_rows([9] * 999 + [1], [0] * 1000, [0] * 1000)),
}


@pytest.mark.parametrize("case", FASTER)
def test_attention_takes_the_faster_way(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    way, rows = FASTER[case]
    taken = []

    def record(name: str) -> Any:
        return lambda q, *_: [q, taken.append(name)][0]

    for name in WAYS:
        monkeypatch.setattr(attention_torch, f"in_{name}", record(name))
    inputs = _inputs(rows, 6, 2, 16, 16, torch.float32).values()
    for softcap, sinks in ((None, None), (1.0, None), (None, torch.zeros(6))):
        attention_torch.attend(*inputs, rows, 1.0, None, softcap, sinks)
    assert taken == [way, "groups", "groups"]


def test_blocks_hold_every_token_at_its_place_and_keys_by_the_sixteen() -> None:
    rows = ROWS["tokens224"]
    blocks = rows.blocks(24, None, torch.device("cpu"))
    assert blocks.place is not None
    assert blocks.query.flatten()[blocks.place].tolist() == list(range(rows.n_tokens))
    assert blocks.key.shape[1] % 16 == 0
    # a token sees its prefix and its row up to itself
    row_first, start = rows.token_table(torch.device("cpu"))
    seen = (blocks.mask == 0).sum(-1).flatten()[blocks.place]
    assert torch.equal(seen, start + torch.arange(rows.n_tokens) - row_first + 1)


@pytest.mark.parametrize("window", [None, 4])
def test_each_way_keeps_all_it_makes_on_the_device_of_q(window: int | None) -> None:
    # On a GPU without Triton, and there in fp64. Mixing CPU and meta tensors is an error.
    rows = ROWS["mixed"]
    inputs = {name: x.to("meta") for name, x in _inputs(rows, 4, 2, 16, 16, torch.float64).items()}
    for capped in ({}, {"softcap": 1.0, "sinks": torch.zeros(4, device="meta")}):
        out = prefix_attention(**inputs, rows=rows, scale=1.0, window=window, **capped)
        assert out.device.type == "meta"


def test_attention_carries_no_gradient() -> None:
    inputs = _inputs(ROWS["one"], 1, 1, 16, 16, torch.float32)
    inputs["q"] = inputs["q"].clone().requires_grad_()
    assert not prefix_attention(**inputs, rows=ROWS["one"], scale=1.0).requires_grad


def test_groups_are_runs_of_equal_rows() -> None:
    groups = ROWS["mixed"].groups
    assert [(g.token, g.n_rows, g.n_tokens, g.pair, g.start) for g in groups] == [
        (0, 2, 3, 0, 4),
        (6, 1, 3, 0, 5),
        (9, 1, 1, 2, 0),
        (10, 1, 5, 2, 7),
        (15, 2, 2, 1, 1),
        (19, 1, 7, 0, 8),
    ]


@pytest.mark.parametrize("size", [1, 4, 64])
def test_blocks_cover_every_token_once_within_one_pair(size: int) -> None:
    rows = ROWS["mixed"]
    lengths = rows.offsets.diff()
    row_of = torch.arange(len(lengths)).repeat_interleave(lengths)
    covered: list[int] = []
    for first, stop, pair, own_first, lowest, highest in rows.block_table(
        size, torch.device("cpu")
    ).tolist():
        inside = row_of[first:stop]
        assert 0 < stop - first <= size
        assert set(rows.pair[inside].tolist()) == {pair}
        assert own_first == int(rows.offsets[inside[0]])
        starts = rows.start[inside]
        assert (lowest, highest) == (int(starts.min()), int(starts.max()))
        covered += range(first, stop)
    assert covered == list(range(rows.n_tokens))


@pytest.mark.parametrize(
    ("message", "offsets", "pair", "start"),
    [
        ("rows.offsets must begin at 0 and grow", [1, 2], [0], [0]),
        ("rows.offsets must begin at 0 and grow", [0, 2, 2], [0, 0], [0, 0]),
        ("rows.offsets must begin at 0 and grow", [0, 3, 2], [0, 0], [0, 0]),
        ("at least one row", [0], [], []),
        ("rows.pair and rows.start must have one entry", [0, 1, 2], [0], [0, 0]),
        ("rows.pair holds -1", [0, 1], [-1], [0]),
        ("rows.start holds -2", [0, 1], [0], [-2]),
    ],
)
def test_rows_refuse(message: str, offsets: list[int], pair: list[int], start: list[int]) -> None:
    tables = [torch.tensor(table, dtype=torch.int64) for table in (offsets, pair, start)]
    with refused(message):
        Rows(*tables)


def test_rows_refuse_tables_of_another_type() -> None:
    with refused(r"rows.start must be a one-axis int64 tensor on the CPU"):
        Rows(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("rows.offsets ends at 7", {"rows": ROWS["no_prefix"]}),
        ("q has 5 heads", {"q": torch.zeros(1, 5, 16)}),
        ("k must have shape", {"k": torch.zeros(1, 2, 15)}),
        ("v must have shape", {"v": torch.zeros(2, 2, 16)}),
        ("prefix_k must have shape", {"prefix_k": torch.zeros(1, 3, 4, 16)}),
        ("prefix_v must have shape", {"prefix_v": torch.zeros(1, 2, 3, 16)}),
        ("k is torch.bfloat16", {"k": torch.zeros(1, 2, 16, dtype=torch.bfloat16)}),
        ("v is on meta", {"v": torch.zeros(1, 2, 16, device="meta")}),
        ("rows.pair goes up to 1", {"rows": make_rows([1], [1], [0])}),
        ("rows.start goes up to 5", {"rows": make_rows([1], [0], [5])}),
        ("window must be at least 1", {"window": 0}),
        ("softcap must be positive", {"softcap": 0.0}),
        ("sinks must have shape", {"sinks": torch.zeros(3)}),
        ("sinks is on meta", {"sinks": torch.zeros(4, device="meta")}),
        (
            "head sizes go up to 256",
            {
                "q": torch.zeros(1, 4, 257),
                "k": torch.zeros(1, 2, 257),
                "prefix_k": torch.zeros(1, 2, 4, 257),
            },
        ),
    ],
)
def test_attention_refuses(message: str, arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(1, 4, 16),
        "k": torch.zeros(1, 2, 16),
        "v": torch.zeros(1, 2, 16),
        "prefix_k": torch.zeros(1, 2, 4, 16),
        "prefix_v": torch.zeros(1, 2, 4, 16),
        "rows": make_rows([1], [0], [4]),
        "scale": 1.0,
    }
    with refused(message):
        prefix_attention(**given | arguments)
