"""`ungrouped`: the same model, with keys and values of its own for every query head."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import check_bridge
from patchsweep.errors import ModelError
from patchsweep.forward.plain import PlainModel
from patchsweep.models.load import as_bridge


def ungrouped(model: TransformerBridge) -> TransformerBridge:
    """Return a bridge of the same function in which no heads share keys and values.

    The projections of keys and values are repeated once per query head, so that each head has a
    key and a value reader of its own, as in MIB, EAP-IG and TransformerLens
    (`ungroup_grouped_query_attention`). All other weights are shared with `model`. A model without
    grouped heads is returned unchanged.

    Raises:
        ModelError: keys and values have no linear projection of their own, or a norm runs over all
            key heads together.
    """
    check_bridge(model)
    n_heads = int(model.cfg.n_heads)
    n_kv = int(getattr(model.cfg, "n_key_value_heads", None) or n_heads)
    if n_heads == n_kv:
        return model
    group = n_heads // n_kv
    plain = PlainModel(model).model
    name = str(model.cfg.model_name)
    found = 0
    for module in plain.modules():
        if not hasattr(module, "num_key_value_groups"):
            continue
        found += 1
        norm = getattr(module, "k_norm", None)
        for kind in ("k_proj", "v_proj"):
            linear = getattr(module, kind, None)
            if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
                raise ModelError(
                    f"{name} has no plain linear {kind}, so its heads cannot be ungrouped; keep "
                    "them grouped"
                )
            width = getattr(getattr(norm, "weight", None), "numel", lambda: 0)()
            if width == len(linear.weight) and n_kv > 1:
                raise ModelError(
                    f"{name} norms all key heads together, so they cannot be ungrouped; keep them "
                    "grouped"
                )
            setattr(module, kind, _repeated(linear, n_kv, group))
        for attribute, value in (
            ("num_key_value_groups", 1),
            ("num_key_value_heads", n_heads),
            ("num_kv_heads", n_heads),
        ):
            if hasattr(module, attribute):
                setattr(module, attribute, value)
    if not found:
        raise ModelError(f"{name} has no attention with grouped heads that could be ungrouped")
    for module in plain.modules():  # many share one config
        config: Any = getattr(module, "config", None)
        if hasattr(config, "num_key_value_heads"):
            config.num_key_value_heads = n_heads
    bridge: Any = plain
    return as_bridge(name, bridge, model.tokenizer)


def _repeated(linear: nn.Linear, n_kv: int, group: int) -> nn.Linear:
    """Return `linear` with the rows of each key-value head repeated for its query heads."""

    def repeat(x: torch.Tensor) -> nn.Parameter:
        by_head = x.detach().unflatten(0, (n_kv, -1)).repeat_interleave(group, dim=0)
        return nn.Parameter(by_head.flatten(0, 1), requires_grad=x.requires_grad)

    new = nn.Linear(1, 1, bias=linear.bias is not None, device="meta")
    new.in_features, new.out_features = linear.in_features, linear.out_features * group
    new.weight = repeat(linear.weight)
    if linear.bias is not None:
        new.bias = repeat(linear.bias)
    return new.train(linear.training)
