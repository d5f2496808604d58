"""Blocks of padded sizes, as graphs replay them: the numbers of plain blocks, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.runners.packed import graphs, tables
from patchsweep.runners.packed.graphs import BlockGraphs
from patchsweep.runners.packed.tables import Padded, size_of
from patchsweep_kernels.attention import Rows
from subjects import model

NAMES = [("John", "Mary"), ("Paul", "Anna")]


@contextmanager
def padded_blocks() -> Iterator[list[int]]:
    """Inside, a CPU runs padded blocks too, without graphs; yields their real tokens."""
    visits: list[int] = []
    run = BlockGraphs.run

    def counted(self: BlockGraphs, layer: int, hidden: torch.Tensor, *rest: object) -> torch.Tensor:
        visits.append(len(hidden))
        return run(self, layer, hidden, *rest)

    with (
        mock.patch.object(graphs, "available", return_value=True),
        mock.patch.object(graphs, "VISITS", 10**9),
        mock.patch.object(tables, "LEAST_TOKENS", 16),
        mock.patch.object(BlockGraphs, "run", counted),
    ):
        yield visits


SLOWER = [pytest.param(family, marks=pytest.mark.slow) for family in ("gemma3", "mixtral")]


@pytest.mark.parametrize("family", ["llama", "gpt2", *SLOWER])
def test_padded_blocks_give_the_numbers_of_plain_ones(family: str) -> None:
    bridge = model(f"tiny:{family}")
    text = "When {0} and {1} went to the shops, {2} gave a bottle of milk to"
    short = text.replace(" a bottle of", "")
    chosen = [(text, NAMES[0]), (text, NAMES[1]), (short, NAMES[0])]
    pairs = ps.PromptPairs.from_strings(
        bridge,
        clean=[t.format(a, b, a) for t, (a, b) in chosen],
        corrupted=[t.format(a, b, b) for t, (a, b) in chosen],
        answers=[(f" {b}", f" {a}") for _, (a, b) in chosen],
    )
    sites = ["resid_pre"]  # written between blocks
    plain = ps.sweep(bridge, pairs, sites, runner="packed", max_tokens=40)
    with padded_blocks() as visits:
        found = ps.sweep(bridge, pairs, sites, runner="packed", max_tokens=40)
    assert len(visits) > 5
    assert any(size_of(n) != n for n in visits)
    for name in sites:
        assert float(plain[name].max() - plain[name].min()) > 0.01
        np.testing.assert_allclose(found[name], plain[name], atol=2e-5, rtol=0, err_msg=name)


def test_padded_sizes_waste_a_third_at_most() -> None:
    assert [size_of(n) for n in (1, 256, 257, 385, 513, 769, 4096)] == [
        256,
        256,
        384,
        512,
        768,
        1024,
        4096,
    ]
    assert all(n <= size_of(n) < 1.5 * n + 1 for n in range(257, 5000))


def test_padding_is_rows_that_see_themselves_alone() -> None:
    rows = Rows(torch.tensor([0, 3, 5]), torch.tensor([0, 1]), torch.tensor([4, 6]))
    pair, pos = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([4, 5, 6, 6, 7])
    made = Padded.of(pair, pos, rows, 2, [4])
    assert made is not None
    assert made.rows.n_tokens == len(made.token_pair) == 256
    assert made.rows.offsets.diff()[2:].unique().tolist() == [1]
    assert made.rows.start[2:].unique().tolist() == [0]
    table = made.blocks[4]
    assert len(table) == 256 // 4 + 2
    filled = table[table[:, 1] > table[:, 0]]
    assert int((filled[:, 1] - filled[:, 0]).sum()) == 256
    assert not table[len(filled) :].any()
    back = Rows(torch.tensor([0, 3, 5]), torch.tensor([1, 0]), torch.tensor([4, 6]))
    assert Padded.of(pair, pos, back, 2, [4]) is None
