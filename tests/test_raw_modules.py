"""Sweeps of every architecture equal plain hooks on the unwrapped Hugging Face modules.

The oracle is `tools.architectures.plain`, which also writes its largest difference for each
architecture into `docs/families.md`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tools.architectures.configs import causal_architectures
from tools.architectures.plain import Comparison, compare

# as a share of the metric: fp32 rounding of three blocks with large weights. The largest seen is
# 4e-5, where plain hooks in fp32 are themselves as far from plain hooks in float64
TOLERANCE = 1e-4
IMAGES = "takes images or sound beside text"
# what no sweep takes, and why
REFUSED = {
    "BertLMHeadModel": "attends in both directions",
    "DeepseekV4ForCausalLM": "no such hook",  # the bridge has none of the sites
    "Gemma3ForConditionalGeneration": IMAGES,
    "Gemma3nForConditionalGeneration": IMAGES,
    "Gemma4ForConditionalGeneration": IMAGES,
    "Gemma4UnifiedForConditionalGeneration": IMAGES,
    "HrmTextForCausalLM": "has no single stack of blocks",
}

compared = cache(compare)


def check(found: Comparison) -> None:
    assert found.n_cells >= 72  # two sites, three interventions, two pairs, six patches
    assert found.effect > 1.0  # logits: nothing that is missed would be small
    assert found.relative < TOLERANCE


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MptForCausalLM"])
def test_sweep_equals_hooks_on_plain_modules_of_two(architecture: str) -> None:
    check(compared(architecture))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", sorted(set(causal_architectures()) - set(REFUSED)))
def test_sweep_equals_hooks_on_plain_modules(architecture: str) -> None:
    check(compared(architecture))


@pytest.mark.slow
def test_at_least_eighty_architectures_are_compared() -> None:
    found = [compared(name) for name in causal_architectures() if name not in REFUSED]
    assert sum(one.n_cells > 0 for one in found) >= 80
    assert sum(one.n_cells for one in found) > 14_000


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_is_not_compared_is_refused(architecture: str) -> None:
    found = compared(architecture)
    assert found.n_cells == 0
    assert found.refused.startswith(REFUSED[architecture])


def test_the_page_tells_the_difference_of_each() -> None:
    lines = Path("docs/families.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    column = table[0].index("plain")
    told = {row[0]: row[column] for row in table[2:] if len(row) == len(table[0])}
    assert set(told) == set(causal_architectures())
    assert {name for name, difference in told.items() if difference == "-"} == set(REFUSED)
    # in logit_diff, of metrics of 5 to 20
    assert max(float(told[name]) for name in set(told) - set(REFUSED)) < 10 * TOLERANCE
