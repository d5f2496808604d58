"""Which runner an architecture gets, and that it agrees with a loop of hooked passes."""

from __future__ import annotations

import pytest
import torch
from patchsweep.forward.capture import capture
from patchsweep.forward.unwrapped import Unsupported, UnwrappedModel

from tools.architectures import Row, families_table, tiny_bridge
from tools.architectures.configs import causal_architectures, left_out
from tools.architectures.page import page
from tools.architectures.table import SITES, compatibility_table

# fp32 logits of order 10; the largest seen is 3e-5
TOLERANCE = 1e-4


def _check(row: Row) -> None:
    assert not row.refused, row.refused
    for site, cell in row.cells.items():
        if cell.difference is not None:
            assert cell.difference < TOLERANCE, (row.architecture, site)
        else:
            assert cell.reason, (row.architecture, site)


@pytest.mark.parametrize(
    "architecture",
    [
        "AfmoeForCausalLM",  # experts, gated attention, mask given by name
        "CohereForCausalLM",  # attention and MLP in parallel
        "GPTBigCodeForCausalLM",  # one key head
        "GptOssForCausalLM",  # sinks, windows, experts
        "StableLmForCausalLM",  # partial rotary
        "Gemma4ForCausalLM",  # heads of two sizes, embeddings for each layer
    ],
)
def test_packed_equals_hook_loop(architecture: str) -> None:
    (row,) = families_table([architecture])
    _check(row)
    assert row.runner == "packed"


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("BloomForCausalLM", "attention interface"),
        ("GPTJForCausalLM", "attention interface"),
        ("Lfm2ForCausalLM", "convolution"),
        ("Llama4ForCausalLM", "neither causal nor a sliding window"),  # chunks of 6 tokens
    ],
)
def test_hooked_runner_takes_over_and_says_why(architecture: str, why: str) -> None:
    (row,) = families_table([architecture])
    _check(row)
    assert row.runner == "hooked"
    assert why in row.cells["resid_pre"].reason


def test_refusal_names_its_reason() -> None:
    names = ["BertLMHeadModel", "Gemma3ForConditionalGeneration", "HrmTextForCausalLM"]
    bert, gemma, hrm = families_table(names)
    assert bert.runner == gemma.runner == hrm.runner == "refused"
    assert hrm.reason == "has no single stack of blocks"
    assert bert.reason == "attends in both directions"
    assert "images" in gemma.reason


def test_latent_attention_runs_in_packed_batches_where_the_bridge_cuts_between_no_heads() -> None:
    (row,) = families_table(["DeepseekV3ForCausalLM"])
    _check(row)
    assert row.cells["z"].runner == "packed"
    assert "sees the shape (2, 4, 8, 4) where the model has 4 heads" in row.cells["z"].reason


def test_compatibility_mode_gets_the_runner_that_is_right() -> None:
    gpt2, llama = compatibility_table(["GPT2LMHeadModel", "LlamaForCausalLM"])
    for row in (gpt2, llama):
        _check(row)
        assert all(cell.difference is not None for cell in row.cells.values())
    assert llama.runner == "packed"
    assert gpt2.runner == "hooked"  # processed weights replace the joint matrix in the bridge alone


def test_chunked_attention_runs_in_packed_batches_within_one_chunk() -> None:
    unwrapped = UnwrappedModel(tiny_bridge("Llama4ForCausalLM"))
    capture(unwrapped, torch.arange(6).unsqueeze(0))
    with pytest.raises(Unsupported, match="over 7 tokens"):
        capture(unwrapped, torch.arange(7).unsqueeze(0))


def test_page_has_a_row_for_each_and_names_the_rest() -> None:
    rows = families_table(["LlamaForCausalLM", "BertLMHeadModel"])
    text = page(rows, [], [], left_out())
    assert "2 architectures: 1 packed, 1 refused." in text
    assert "| LlamaForCausalLM | `llama` | packed | " in text
    assert ", T5ForConditionalGeneration, " in text


@pytest.mark.slow
def test_every_architecture_has_a_runner_or_a_reason() -> None:
    rows = families_table()
    assert {row.architecture for row in rows} == set(causal_architectures())
    for row in rows:
        if row.refused:
            continue
        assert set(row.cells) == set(SITES)
        if any(cell.runner != "none" for cell in row.cells.values()):
            _check(row)
    assert sum(row.runner == "packed" for row in rows) >= 50
