"""Heads' q, k, v, z and pattern on a real model equal TransformerLens's own functions.

The sweep runs every head of every layer; TransformerLens's loop, one forward pass a cell, is given
every head of some layers. SmolLM2 has 9 query heads that share 3 key heads. Where TransformerLens
stacks sites (`..._every`) it fills k and v up to 9 heads with zeros; here each key head's cell is
compared with the patch of that very head.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import patchsweep as ps
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from patchsweep.store.attributes import attributes
from subjects import demo_pairs, model
from torch import Tensor
from transformer_lens import patching
from transformer_lens.ActivationCache import ActivationCache

NAME = "smollm2-135m"
TOLERANCE = 1e-4  # logits are of order 10, and blocks are summed in another order
LAYERS = (0, 8, 17, 23, 29)  # heads of 8, 17 and 23 move names on the demo pair
SITES = {"q": "q", "k": "k", "v": "v", "z": "out", "pattern": "pattern"}  # site -> in the name

pytestmark = pytest.mark.slow


@cache
def everything() -> tuple[Tensor, ActivationCache]:
    """The corrupted prompt, and what TransformerLens keeps of the clean one."""
    pair = demo_pairs(NAME)[0]
    kept = [f"attn.hook_{site}" for site in SITES]
    with torch.no_grad():
        _, clean = model(NAME).run_with_cache(
            torch.tensor([pair.clean]), names_filter=lambda name: name.endswith(tuple(kept))
        )
    return torch.tensor([pair.corrupted]), clean


def logit_diff(logits: Tensor) -> Tensor:
    pair = demo_pairs(NAME)[0]
    return logits[0, -1, pair.answer[0]] - logits[0, -1, pair.wrong_answer[0]]


def of_transformer_lens(
    site: str, where: str, axes: tuple[str, ...], cells: list[tuple[int, ...]]
) -> NDArray[np.float32]:
    """Its values at `cells`."""
    function = f"get_act_patch_attn_head_{SITES[site]}_{where}"
    tokens, clean = everything()
    with torch.no_grad():
        found = getattr(patching, function)(
            model(NAME),
            tokens,
            clean,
            logit_diff,
            index_axis_names=None,
            index_df=pd.DataFrame(cells, columns=axes),
        )
    return found.numpy()


@cache
def swept(positions: str | None, layers: tuple[int, ...] | None) -> xr.Dataset:
    return ps.sweep(
        model(NAME), demo_pairs(NAME), list(SITES), positions=positions, layers=layers
    ).isel(metric=0, pair=0)


@pytest.mark.parametrize("site", SITES)
def test_whole_heads_equal_transformer_lens(site: str) -> None:
    mine = swept("all", None)
    assert attributes(mine)["provenance"]["runner"] == "packed"
    heads = mine[site].dims[-1]
    assert mine.sizes[heads] == (3 if site in ("k", "v") else 9)
    cells = [(layer, head) for layer in LAYERS for head in range(mine.sizes[heads])]
    theirs = of_transformer_lens(site, "all_pos", ("layer", "head"), cells)
    found = mine[site].sel(layer=list(LAYERS)).transpose("layer", heads).values.ravel()
    np.testing.assert_allclose(found, theirs, atol=TOLERANCE, rtol=0)
    assert np.abs(theirs - float(mine.base_metric)).max() > 0.1  # else it would prove nothing


@pytest.mark.parametrize("site", SITES)
def test_heads_by_position_equal_transformer_lens(site: str) -> None:
    """Twenty cells of layers 17 and 23, most at the second name and the last token."""
    mine = swept(None, (17, 23))
    heads = mine[site].dims[-1]
    rng = np.random.default_rng(0)
    cells = [
        (layer, pos, int(rng.integers(mine.sizes[heads])))
        for layer in (17, 23)
        for pos in [*[10, 16] * 3, *rng.integers(10, 17, 4).tolist()]
    ]
    axes: tuple[str, ...] = ("layer", "pos", "head")
    asked: list[tuple[int, ...]] = list(cells)
    if site == "pattern":  # whole rows of queries, whose axis comes last
        axes, asked = ("layer", "head_index", "dest_pos"), [(a, c, b) for a, b, c in cells]
    theirs = of_transformer_lens(site, "by_pos", axes, asked)
    found = [
        float(mine[site].sel(layer=layer, pos=pos).isel({heads: head}))
        for layer, pos, head in cells
    ]
    np.testing.assert_allclose(found, theirs, atol=TOLERANCE, rtol=0)
