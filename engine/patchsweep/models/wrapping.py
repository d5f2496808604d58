"""Checks that a bridge computes the logits of the Hugging Face model inside it.

TransformerLens replaces some modules by its own components. If such a component computes something
else than the module, hooked runs measure another model. So `compare_wrapping` compares the logits
of both on a few tokens, at two lengths. The same runs show whether the model is causal, which
every sweep assumes: a patch cannot change values at earlier positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.tokenize import declares_start
from patchsweep.errors import ModelError
from patchsweep.models.offload import device_of

LENGTHS = (5, 8)
# largest relative change of a position's logits that may be rounding; over 80 architectures the
# largest change was 5e-6 in fp32 and 0.04 in bf16
ROUNDING = {"float64": 1e-6, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class Wrapping:
    """Result of a few short runs of a bridge and of the model inside it."""

    state: int  # `state_of` the bridge during the runs
    change: float  # largest relative change of logits by wrapping; nan: some are not finite
    earlier: float  # largest relative change of logits before the token that differs
    rounding: float  # limit below which rounding in the model's dtype explains a change

    @property
    def same(self) -> bool:
        """Whether the bridge computes the model's logits."""
        return self.change <= self.rounding  # False for nan

    @property
    def causal(self) -> bool:
        """Whether later tokens leave earlier logits unchanged."""
        return self.earlier <= self.rounding


_KNOWN: WeakKeyDictionary[TransformerBridge, Wrapping] = WeakKeyDictionary()


def settle(bridge: TransformerBridge, device: torch.device | str | None) -> TransformerBridge:
    """Return `bridge` in evaluation mode, with `device` as the device of its prompts.

    A bridge of an existing model records the machine's first GPU as its device, and the end token
    as the start token if the tokenizer has none.
    """
    bridge.cfg.device = None if device is None else str(device)
    if not declares_start(bridge.tokenizer):
        bridge.cfg.default_prepend_bos = False
    bridge.eval()
    return bridge


def state_of(bridge: TransformerBridge) -> int:
    """Return a number that changes when weights are edited or replaced, or modules replaced.

    Edits through `.data` do not change it, because torch does not count them.
    """
    model = bridge.original_model
    weights = tuple(
        (
            id(w),
            -1 if w.is_inference() else w._version,
            str(w.dtype),
            0 if w.is_meta else w.data_ptr(),
        )
        for w in (*model.parameters(), *model.buffers())
    )
    modules = tuple((id(module), type(module)) for module in model.modules())
    return hash((weights, modules, bool(getattr(bridge, "compatibility_mode", False))))


def trial_tokens(
    n_tokens: int, length: int, *, n_prompts: int, avoid: Sequence[int] = (), seed: int = 0
) -> Int[Tensor, "prompt {length}"]:
    """Return random token ids below `n_tokens`, not in `avoid`, distinct per column, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(n_tokens, dtype=torch.bool)
    allowed[[token for token in avoid if 0 <= token < n_tokens]] = False
    known = torch.nonzero(allowed).flatten()
    columns = [
        known[torch.randperm(len(known), generator=generator)[:n_prompts]] for _ in range(length)
    ]
    return torch.stack(columns, dim=1)


def prompts_of(n_tokens: int, tokenizer: Any) -> list[Int[Tensor, "2 pos"]]:
    """Return a batch per length in `LENGTHS`: a prompt, and a copy with another last token."""
    special = getattr(tokenizer, "all_special_ids", None) or ()
    batches = []
    for length in LENGTHS:
        tokens = trial_tokens(n_tokens, length, n_prompts=2, avoid=special, seed=length)
        tokens[1, :-1] = tokens[0, :-1]
        batches.append(tokens)
    return batches


@torch.no_grad()
def logits_of(
    model: nn.Module, prompts: Sequence[Int[Tensor, "2 pos"]], device: torch.device
) -> list[Float[Tensor, "pos d_vocab"]]:
    """Return fp32 logits of a Hugging Face model for the first prompt of each batch, run alone."""
    logits = []
    for tokens in prompts:
        output = model(tokens[:1].to(device), use_cache=False, return_dict=True)
        logits.append(output.logits[0].float().cpu())
    return logits


@torch.no_grad()
def compare_wrapping(
    bridge: TransformerBridge,
    prompts: Sequence[Int[Tensor, "2 pos"]],
    own: Sequence[Float[Tensor, "pos d_vocab"]] | None,
    run: Callable[[Int[Tensor, "2 pos"]], Float[Tensor, "2 pos d_vocab"]] | None = None,
) -> Wrapping:
    """Compare the logits of `run` with `own`, and cache the result per state of the bridge.

    Args:
        own: logits of the model without a bridge; None: only check that the model is causal.
        run: tokens -> logits; None: the bridge itself.
    """
    run = run or bridge
    change = earlier = 0.0
    for number, tokens in enumerate(prompts):
        logits = run(tokens.to(device_of(bridge))).float().cpu()
        if own is not None:
            change = _larger(change, _relative(logits[0], own[number]))
        earlier = _larger(earlier, _relative(logits[1, :-1], logits[0, :-1]))
    dtype = str(bridge.cfg.dtype).removeprefix("torch.")
    wrapping = Wrapping(state_of(bridge), change, earlier, ROUNDING.get(dtype, 1e-4))
    _KNOWN[bridge] = wrapping
    return wrapping


def known_wrapping(bridge: TransformerBridge) -> Wrapping | None:
    """Return the last result of `compare_wrapping`; None if the bridge has changed since."""
    wrapping = _KNOWN.get(bridge)
    return wrapping if wrapping is not None and wrapping.state == state_of(bridge) else None


def check_same(bridge: TransformerBridge, wrapping: Wrapping) -> None:
    """Raise ModelError if the bridge does not compute the logits of its model."""
    if wrapping.change != wrapping.change:
        raise ModelError(
            f"{bridge.cfg.model_name} gives NaN or infinite logits for a trial prompt of ordinary "
            "tokens; check its weights; where float16 overflows (past 65504), use bfloat16 or "
            "float32"
        )
    if not wrapping.same:
        raise ModelError(
            f"TransformerLens's bridge of {bridge.cfg.model_name} computes other logits than the "
            f"Hugging Face model inside it (they change by {_percent(wrapping.change)} of their "
            f"spread, where rounding explains {_percent(wrapping.rounding)}), so its hooks would "
            "show another model; use a class of modules that TransformerLens knows, or another "
            "version of it"
        )


def check_causal(bridge: TransformerBridge, wrapping: Wrapping) -> None:
    """Raise ModelError if a later token changes earlier logits."""
    if not wrapping.causal:
        raise ModelError(
            f"{bridge.cfg.model_name} is not causal: another last token changes the logits of "
            f"earlier positions by {_percent(wrapping.earlier)} of their spread, so a patch could "
            "change what was computed before it; patch a causal language model"
        )


def _relative(values: Float[Tensor, "pos v"], expected: Float[Tensor, "pos v"]) -> float:
    """Return the largest norm of a position's centred change over that of its centred logits."""
    change, spread = (
        (x - x.mean(dim=-1, keepdim=True)).norm(dim=-1) for x in (values - expected, expected)
    )
    # a compiled model says nothing at some positions: all logits are equal there but for rounding
    least = (0.01 * spread.max()).clamp_min(torch.finfo(spread.dtype).tiny)
    return float((change / torch.maximum(spread, least)).max())


def _larger(a: float, b: float) -> float:
    """Return the larger of two numbers; nan if either is nan."""
    return a if a >= b or a != a else b


def _percent(share: float) -> str:
    return "nan" if share != share else f"{share:.2%}"
