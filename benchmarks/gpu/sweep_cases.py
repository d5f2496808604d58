"""Which whole sweeps are measured: model shapes with random weights, made on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import tiny_tokenizer
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig


@dataclass(frozen=True)
class SweepCase:
    """A row of the table of sweeps, but for its site."""

    name: str
    dtype: torch.dtype
    config: Callable[..., PretrainedConfig]
    sizes: dict[str, Any]
    trial_sizes: dict[str, Any]  # of a model that a test can run
    n_pos: int = 17  # tokens of the prompt; the demo pair has as many
    loop_sample: int = 60  # patches of the loop that are timed; its time is scaled up from them


# the Llama shapes as a test can run them
SMALL_LLAMA = {
    "vocab_size": 311,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}

CASES = (
    SweepCase(
        "gpt2-small shape",
        torch.float32,
        GPT2Config,
        {},
        {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 311},
    ),
    SweepCase(
        "gpt2-small shape, 100 tokens",
        torch.float32,
        GPT2Config,
        {},
        {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 311},
        n_pos=100,
    ),
    SweepCase(
        "1B Llama shape",
        torch.bfloat16,
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        SMALL_LLAMA,
        loop_sample=30,
    ),
    SweepCase(
        "8B Llama shape",
        torch.bfloat16,
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
        SMALL_LLAMA,
        loop_sample=30,
    ),
)


def make_model(case: SweepCase, device: torch.device, *, trial: bool) -> TransformerBridge:
    """The bridge of a random model that never lay anywhere but on `device`."""
    torch.manual_seed(0)
    config = case.config(**(case.trial_sizes if trial else case.sizes))
    with torch.device(device):
        hf_model = AutoModelForCausalLM.from_config(config, dtype=case.dtype)
    name = case.name.replace(" ", "-")
    return as_bridge(name, hf_model, tiny_tokenizer())


def make_pairs(d_vocab: int, n_pos: int) -> PromptPairs:
    """One pair of random tokens that differ in the third and the last but one."""
    generator = torch.Generator().manual_seed(0)
    clean = torch.randperm(d_vocab, generator=generator)[: n_pos + 4].tolist()
    corrupted = [*clean[:n_pos]]
    corrupted[2], corrupted[-2] = clean[n_pos], clean[n_pos + 1]
    pair = PromptPair(
        clean=tuple(clean[:n_pos]),
        corrupted=tuple(corrupted),
        answer=(clean[n_pos + 2],),
        wrong_answer=(clean[n_pos + 3],),
        clean_tokens=tuple(map(str, clean[:n_pos])),
        corrupted_tokens=tuple(map(str, corrupted)),
        answer_text=str(clean[n_pos + 2]),
        wrong_answer_text=str(clean[n_pos + 3]),
        labels={},
    )
    return PromptPairs((pair,))
