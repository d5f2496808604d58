"""What most tests sweep: the demo pair, on models that are loaded once."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from patchsweep.data.pairs import PromptPairs
from patchsweep.models import load_model
from transformer_lens.model_bridge import TransformerBridge

CLEAN = "When John and Mary went to the shops, John gave a bottle of milk to"
CORRUPTED = "When John and Mary went to the shops, Mary gave a bottle of milk to"


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """Parameters of a test: the `chosen` ones of `values`, and the others as slow ones."""
    slow = pytest.mark.slow
    return [pytest.param(x, marks=() if x in chosen else slow) for x in values]


@cache
def model(name: str) -> TransformerBridge:
    return load_model(name, device="cpu")


@cache
def reference_pairs(name: str) -> PromptPairs:
    """Four pairs as long as the demo pair, with other names: prompts to take means over."""
    names = [("Paul", "Anna"), ("Tom", "Lucy"), ("James", "Emma"), ("Peter", "Alice")]
    both = [[t.replace("John", a).replace("Mary", b) for t in (CLEAN, CORRUPTED)] for a, b in names]
    clean, corrupted = (list(column) for column in zip(*both, strict=True))
    return PromptPairs.from_strings(
        model(name),
        clean=clean,
        corrupted=corrupted,
        answers=[(f" {b}", f" {a}") for a, b in names],
    )


@cache
def demo_pairs(name: str) -> PromptPairs:
    return PromptPairs.from_strings(
        model(name), clean=[CLEAN], corrupted=[CORRUPTED], answers=[(" Mary", " John")]
    )
