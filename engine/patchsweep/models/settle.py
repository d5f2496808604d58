"""Corrections of a new bridge's records: the device and the start token."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.tokenize import declares_start


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
