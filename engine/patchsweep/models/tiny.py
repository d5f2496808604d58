"""Tiny random models of many families: a few layers, a tokenizer, no download.

The scale of their weights makes a patch change a logit by about one. With the usual
initialiser (0.02) effects would be smaller than any tolerance, and a test that compares
them would prove nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

_GROUPED: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_UNGROUPED = {
    key: value for key, value in _GROUPED.items() if key not in ("num_key_value_heads", "head_dim")
}
_GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48, "n_positions": 128}
_GEMMA: dict[str, Any] = {**_GROUPED, "sliding_window": 6, "query_pre_attn_scalar": 8}

# family -> (transformers model type, config); a window of 6 takes effect on short prompts
TINY_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", _GPT2),
    "gpt_neox": ("gpt_neox", {**_UNGROUPED, "rotary_pct": 0.5}),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 6}),
    "qwen3": ("qwen3", _GROUPED),
    "gemma2": ("gemma2", _GEMMA),
    "gemma3": (
        "gemma3_text",
        {**_GEMMA, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
    ),
    "phi3": ("phi3", _GROUPED),
    "opt": ("opt", {**_UNGROUPED, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}

_WORDS = """
When John and Mary went to the shops gave a bottle of milk bag drink Then Paul Anna Tom Lucy
James Emma Mark Sarah Peter Alice Bob Carol had long argument afterwards said After decided that
friends were thinking about working at store park school office garden hospital ball ring kiss
snack book flower The capital France is Paris Germany Berlin Spain Madrid Italy Rome in he she
that near keys cabinet are was has have for with on it they his her war lasted from year
""".split()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer in which common words of the built-in prompts are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=1,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([word for w in _WORDS for word in (w, f" {w}")], trainer)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        name_or_path="patchsweep-tiny",
        add_bos_token=True,
    )


def tiny_model(family: str, seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return a random model of `family` (a key of `TINY_FAMILIES`) and its tokenizer."""
    model_type, sizes = TINY_FAMILIES[family]
    tokenizer = tiny_tokenizer()
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = AutoConfig.for_model(model_type, **sizes, **special, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [type(model).__name__]  # as a saved checkpoint would say
    draw_weights(model, seed)
    return model.eval(), tokenizer


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw weights of scale 3/sqrt(fan-in) and embeddings of scale 1, in place."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: torch.Tensor) -> torch.Tensor:
        return torch.randn(parameter.shape, generator=generator, device="cpu").to(parameter)

    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in embeddings:
                parameter.copy_(normal(parameter))
            elif parameter.ndim < 2:
                # norm scales and biases: small changes, so that (1 + w) norms stay norms
                parameter.add_(0.1 * normal(parameter))
            else:
                fan_in = parameter.shape[-1]
                parameter.copy_(3.0 * normal(parameter) / math.sqrt(fan_in))
