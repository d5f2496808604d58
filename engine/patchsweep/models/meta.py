"""A model on the meta device: sizes, names and device map within a second, for any size."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import init_empty_weights
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

from patchsweep.models.device_map import Placement
from patchsweep.models.offload import main_device
from patchsweep.models.wrapping import settle


def meta_bridge(
    name: str,
    source: str,
    tokenizer: Any,
    device: str | None,
    dtype: torch.dtype,
    placement: Placement | None,
    common: dict[str, Any],
) -> TransformerBridge | None:
    """Make a bridge of `source` (folder or Hugging Face name), parameters on the meta device.

    Its `hf_device_map` is the one that loading the weights would give. None for an architecture
    whose bridge needs the values of the weights (fused q, k and v).

    Raises:
        OSError, ValueError: `source` holds no model.
    """
    config = AutoConfig.from_pretrained(source, **common)
    trusted = {"trust_remote_code": common["trust_remote_code"]}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="eager", **trusted
        )
    model.tie_weights()
    model.eval()
    if placement is not None:
        device_map = mapped(model, placement)
        model.hf_device_map = device_map  # main_device reads it; the bridge must not see it
        device = str(main_device(model))
        del model.hf_device_map
    try:
        bridge = TransformerBridge.boot_transformers(
            name, hf_model=model, tokenizer=tokenizer, device=device, dtype=dtype
        )
    except NotImplementedError:
        return None
    if placement is not None:
        model.hf_device_map = device_map
    return settle(bridge, device)


def mapped(model: PreTrainedModel, placement: Placement) -> dict[str, str | int]:
    """Return the device map (module name -> device) that `from_pretrained` would compute."""
    if not isinstance(placement.device_map, str):
        return placement.device_map
    no_split = model._no_split_modules
    memory = placement.limits()
    if placement.device_map != "sequential":
        memory = get_balanced_memory(
            model,
            max_memory=memory,
            no_split_module_classes=no_split,
            low_zero=placement.device_map == "balanced_low_0",
        )
    device_map: dict[str, str | int] = infer_auto_device_map(
        model, max_memory=memory, no_split_module_classes=no_split
    )
    return device_map
