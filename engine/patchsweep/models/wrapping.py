"""What wrapping must not change: the logits of a bridge are those of the model inside it.

TransformerLens puts components of its own in the place of some modules. Where such a component
computes something else than the module, hooked runs measure another model. So the logits of both
are compared on a few tokens, at two lengths. The same runs tell whether the model is causal, which
every sweep takes for granted: a patch cannot change what was computed at earlier positions.
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

from patchsweep.errors import ModelError
from patchsweep.models.offload import device_of

LENGTHS = (5, 8)
# largest change of a position's logits, relative to their spread, that rounding may explain:
# over 80 architectures the largest seen was 5e-6 in fp32 and 0.04 in bf16
ROUNDING = {"float64": 1e-6, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True)
class Wrapping:
    """What a few short runs of a bridge and of the model inside it showed."""

    state: int  # `state_of` the bridge meanwhile
    change: float  # largest relative change of logits by wrapping; nan: some are not finite
    earlier: float  # largest relative change of logits before the token that was exchanged
    rounding: float  # what the dtype explains of both

    @property
    def same(self) -> bool:
        """Whether the bridge computes the model's logits."""
        return self.change <= self.rounding  # False for nan

    @property
    def causal(self) -> bool:
        """Whether later tokens leave earlier logits as they are."""
        return self.earlier <= self.rounding


_KNOWN: WeakKeyDictionary[TransformerBridge, Wrapping] = WeakKeyDictionary()


def state_of(bridge: TransformerBridge) -> int:
    """A number that changes when weights are written or replaced, or modules are.

    Weights that are written through `.data` count their changes nowhere, so they go unseen.
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
    """Random token ids below `n_tokens`, none of `avoid`, on the CPU; no two in a column alike."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(n_tokens, dtype=torch.bool)
    allowed[[token for token in avoid if 0 <= token < n_tokens]] = False
    known = torch.nonzero(allowed).flatten()
    columns = [
        known[torch.randperm(len(known), generator=generator)[:n_prompts]] for _ in range(length)
    ]
    return torch.stack(columns, dim=1)


def prompts_of(n_tokens: int, tokenizer: Any) -> list[Int[Tensor, "2 pos"]]:
    """One batch for each of `LENGTHS`: a prompt, and the same prompt with another last token."""
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
    """fp32 logits of a Hugging Face model for the first prompt of each batch, run by itself."""
    found = []
    for tokens in prompts:
        output = model(tokens[:1].to(device), use_cache=False, return_dict=True)
        found.append(output.logits[0].float().cpu())
    return found


@torch.no_grad()
def compare_wrapping(
    bridge: TransformerBridge,
    prompts: Sequence[Int[Tensor, "2 pos"]],
    own: Sequence[Float[Tensor, "pos d_vocab"]] | None,
    run: Callable[[Int[Tensor, "2 pos"]], Float[Tensor, "2 pos d_vocab"]] | None = None,
) -> Wrapping:
    """The logits of `run` held against `own`; remembered while the state of the bridge stays.

    Args:
        own: None: there is nothing to compare with, and the model is only seen to be causal.
        run: tokens -> logits; None: the bridge itself.
    """
    run = run or bridge
    change = earlier = 0.0
    for number, tokens in enumerate(prompts):
        found = run(tokens.to(device_of(bridge))).float().cpu()
        if own is not None:
            change = _larger(change, _relative(found[0], own[number]))
        earlier = _larger(earlier, _relative(found[1, :-1], found[0, :-1]))
    dtype = str(bridge.cfg.dtype).removeprefix("torch.")
    found_now = Wrapping(state_of(bridge), change, earlier, ROUNDING.get(dtype, 1e-4))
    _KNOWN[bridge] = found_now
    return found_now


def known_wrapping(bridge: TransformerBridge) -> Wrapping | None:
    """What `compare_wrapping` found, if the bridge has not changed since."""
    known = _KNOWN.get(bridge)
    return known if known is not None and known.state == state_of(bridge) else None


def check_same(bridge: TransformerBridge, wrapping: Wrapping) -> None:
    """Raises ModelError where the bridge does not compute the logits of its model."""
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
    """Raises ModelError where a later token changes earlier logits."""
    if not wrapping.causal:
        raise ModelError(
            f"{bridge.cfg.model_name} is not causal: another last token changes the logits of "
            f"earlier positions by {_percent(wrapping.earlier)} of their spread, so a patch could "
            "change what was computed before it; patch a causal language model"
        )


def _relative(found: Float[Tensor, "pos v"], expected: Float[Tensor, "pos v"]) -> float:
    """Largest change of a position's logits, relative to their spread; a common shift is none."""
    change, spread = (x - x.mean(dim=-1, keepdim=True) for x in (found - expected, expected))
    return float((change.norm(dim=-1) / spread.norm(dim=-1)).max())


def _larger(a: float, b: float) -> float:
    """The larger of two numbers, and nan if one is."""
    return a if a >= b or a != a else b


def _percent(share: float) -> str:
    return "nan" if share != share else f"{share:.2%}"
