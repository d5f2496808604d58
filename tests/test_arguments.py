"""What users may give for layers, heads and positions, and how long prompts may be."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from patchsweep.arguments import (
    check_store_path,
    head_places,
    index_sets,
    number,
    position_axis,
    user_path,
    whole_number,
)
from patchsweep.cli.schema.run import FileTask
from patchsweep.data.pairs import PromptPairs
from patchsweep.data.tokenize import context_size
from patchsweep.errors import ConfigError, ModelError, PlanError, PromptError
from patchsweep.models import load_model
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.sweeps.api import sweep
from subjects import CLEAN, CORRUPTED, demo_pairs, model

ANSWERS = {"answer": " Mary", "wrong_answer": " John"}


@pytest.mark.parametrize(
    ("given", "sets"),
    [
        (1, ((1,),)),
        (np.int64(1), ((1,),)),
        ([0, 2], ((0,), (2,))),
        ((0, (1, 2)), ((0,), (1, 2))),
        (range(2), ((0,), (1,))),
        ([range(2), 2], ((0, 1), (2,))),
        (np.arange(2), ((0,), (1,))),
        (np.array([[0, 1], [1, 2]]), ((0, 1), (1, 2))),
        (torch.tensor([0, 2]), ((0,), (2,))),
        ([np.int64(1), [np.int32(0), 2]], ((1,), (0, 2))),
        ([0, [0, 1]], ((0,), (0, 1))),
    ],
    ids=str,
)
def test_indices_may_be_given_as(given: Any, sets: tuple[tuple[int, ...], ...]) -> None:
    assert index_sets("layers", given) == sets
    request = make_request(
        model("tiny:llama"), demo_pairs("tiny:llama"), SweepSpec("z", layers=given)
    )
    assert request.plans[0].axes.layers == sets
    assert all(type(i) is int for members in sets for i in members)


@pytest.mark.parametrize(
    ("given", "axis"),
    [
        (5, (5,)),
        ([0, 5], (0, 5)),
        (np.arange(2), (0, 1)),
        (range(3, 5), (3, 4)),
        (["S2", 3], ("S2", 3)),
        (np.array(["S2", "end"]), ("S2", "end")),
    ],
    ids=str,
)
def test_positions_may_be_given_as(given: Any, axis: tuple[int | str, ...]) -> None:
    assert position_axis(given) == axis


def test_numbers_are_checked_by_kind_and_range() -> None:
    assert whole_number("n", np.int64(3), least=3, most=3) == 3
    number("x", 0.5, above=0, below=1)
    for value in (True, "1", 1.0, None, 2, 4):
        with pytest.raises(PlanError, match="must be a whole number from 3 to 3"):
            whole_number("n", value, least=3, most=3)
    for value in (True, "1", None, float("nan"), float("inf"), 0, 1):
        with pytest.raises(ConfigError, match="must be a number above 0 and below 1"):
            number("x", value, above=0, below=1, error=ConfigError)


@pytest.mark.parametrize("store", ["runs/a.zarr", "./-dash.zarr", "s3://bucket/-a", "../a"])
def test_store_path_is_taken(store: str) -> None:
    check_store_path(store)


def test_context_is_the_models_own_where_the_bridge_says_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bridge = model("tiny:llama")
    monkeypatch.setattr(bridge.cfg, "n_ctx", 4096)
    assert context_size(bridge) == 128
    texts = {"clean": [CLEAN * 8], "corrupted": [CORRUPTED * 8], "answers": [(" Mary", " John")]}
    with pytest.raises(PromptError, match="a prompt may have 128 tokens with this model"):
        PromptPairs.from_strings(bridge, **texts)


def test_answer_tokens_count_as_context(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge, (pair,) = model("tiny:llama"), demo_pairs("tiny:llama")
    long = replace(pair, answer=(5, 6, 7), wrong_answer=(6, 6, 7))
    monkeypatch.setattr(bridge.cfg, "n_ctx", len(pair) + 2)
    make_request(
        bridge, PromptPairs((long,)), SweepSpec("z")
    )  # all of an answer but its last token is read
    monkeypatch.setattr(bridge.cfg, "n_ctx", len(pair) + 1)
    with pytest.raises(PromptError, match="have 20 tokens, and this model reads 18"):
        make_request(bridge, PromptPairs((long,)), SweepSpec("z"))


def test_checking_arguments_does_not_load_torch() -> None:
    code = "import sys, patchsweep, patchsweep.arguments; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_path_may_begin_with_a_tilde_that_is_no_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert user_path("~/a.zarr") == tmp_path / "home" / "a.zarr"
    Path("~x.jsonl").write_text(json.dumps({"clean": CLEAN, "corrupted": CORRUPTED, **ANSWERS}))
    pairs = FileTask("~x.jsonl").load(model("tiny:llama"))
    sweep(model("tiny:llama"), pairs, "embed", store="~x.zarr")
    assert Path("~x.zarr").is_dir()
    with pytest.raises(ModelError, match=r"'~x' does not exist"):
        load_model("~x")


def test_heads_are_pairs_or_names_and_their_layers_may_count_from_the_end() -> None:
    assert head_places(["a2.h3", (0, 1), (-1, 0)], 3, 4) == ((2, 3), (0, 1), (2, 0))
    assert head_places(["a1", (0, 1)], 3, 2) == ((1, 0), (1, 1), (0, 1))
    for given, words in (
        (["a3.h0"], "'a3.h0' is no head of 3 layers of 4; the last is a2.h3"),
        ([(-4, 0)], "is no head of 3 layers of 4"),
        (["m1"], "heads has 'm1'; give"),
        (["a2.h1", (-1, 1)], "names a head twice"),
        (["a2.h1", "a2"], "names a head twice"),
        (["a3"], "'a3' is no head of 3 layers of 4"),
    ):
        with pytest.raises(PlanError, match=re.escape(words)):
            head_places(given, 3, 4)
