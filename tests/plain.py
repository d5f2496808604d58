"""Plain Hugging Face models beside their bridges: an oracle that shares no code with a runner."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.models.load import as_bridge
from patchsweep.models.tiny import draw_weights, tiny_tokenizer
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

from tools.architectures.configs import causal_architectures, tiny_config

CLEAN = "When John and Mary went to the shops, John gave a bottle of milk to"
CORRUPTED = "When John and Mary went to the shops, Mary gave a bottle of milk to"


@cache
def plain_and_bridge(architecture: str) -> tuple[nn.Module, TransformerBridge]:
    """A tiny random model of `architecture` as transformers has it, and its copy in a bridge."""
    return make_plain_and_bridge(architecture)


def make_plain_and_bridge(
    architecture: str, **settings: Any
) -> tuple[nn.Module, TransformerBridge]:
    """The same, made anew, with other settings of its configuration."""
    tokenizer = tiny_tokenizer()
    model_type = causal_architectures()[architecture]
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, **settings}
    config = tiny_config(model_type, vocab_size=len(tokenizer), **special)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.architectures = [architecture]
    draw_weights(model, 0)
    return copy.deepcopy(model).eval(), as_bridge(f"tiny-{model_type}", model, tokenizer)


def pairs_for(bridge: TransformerBridge, *texts: tuple[str, str]) -> PromptPairs:
    """The demo pair, or pairs of (clean, corrupted) texts, all with its answers."""
    texts = texts or ((CLEAN, CORRUPTED),)
    return PromptPairs.from_strings(
        bridge,
        clean=[clean for clean, _ in texts],
        corrupted=[corrupted for _, corrupted in texts],
        answers=[(" Mary", " John")] * len(texts),
    )


# (module, "in" or "out", what makes the new tensor of the one that passes)
Patch = tuple[nn.Module, str, Callable[[Tensor], Tensor]]


@torch.no_grad()
def logit_diff(
    model: nn.Module,
    tokens: Sequence[int],
    answer: int,
    wrong: int,
    patches: Sequence[Patch] = (),
) -> float:
    """logit_diff at the last token of a run in which the tensors at `patches` are replaced."""
    with ExitStack() as stack:
        for module, side, new in patches:
            if side == "in":

                def before(module: nn.Module, args: Any, kwargs: Any, new: Any = new) -> Any:
                    if args:
                        return (new(args[0].clone()), *args[1:]), kwargs
                    hidden = new(kwargs["hidden_states"].clone())
                    return args, {**kwargs, "hidden_states": hidden}

                handle = module.register_forward_pre_hook(before, with_kwargs=True)
            else:

                def after(module: nn.Module, args: Any, out: Any, new: Any = new) -> Any:
                    if isinstance(out, tuple):
                        return (new(out[0].clone()), *out[1:])
                    return new(out.clone())

                handle = module.register_forward_hook(after)
            stack.callback(handle.remove)
        logits = model(torch.tensor([list(tokens)])).logits[0, -1]
    return float(logits[answer] - logits[wrong])
