"""What a fresh bridge records wrongly of the model inside it, put right."""

from __future__ import annotations

import torch
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.tokenize import declares_start


def settle(bridge: TransformerBridge, device: torch.device | str | None) -> TransformerBridge:
    """`bridge` itself in evaluation mode, its prompts going to `device`.

    Round a given model the bridge records the machine's first GPU as the device, and the end token
    as the start token where the tokenizer has none.
    """
    bridge.cfg.device = None if device is None else str(device)
    if not declares_start(bridge.tokenizer):
        bridge.cfg.default_prepend_bos = False
    bridge.eval()
    return bridge
