"""A copy of the Hugging Face model behind a bridge: same classes and tensors, no hooks."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

from patchsweep.models.offload import ACCELERATE, Home, device_of, home_of, is_offloaded
from patchsweep.models.quantised import casts_attention
from patchsweep.models.wrapping import (
    check_causal,
    check_same,
    compare_wrapping,
    known_wrapping,
    logits_of,
    prompts_of,
)

# config settings that make a model return more than logits
MORE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")


class PlainModel:
    """Copies of the module objects behind `bridge`, with the same classes and without hooks.

    They share every parameter and buffer with the bridge. `attention` is the name of the attention
    function that they call, as transformers' attention interface knows it.
    """

    model: nn.Module

    def __init__(self, bridge: TransformerBridge, attention: str = "eager") -> None:
        self.bridge = bridge
        self._attention = attention
        self._copies: dict[int, nn.Module] = {}
        self._configs: dict[int, Any] = {}
        self._homes: dict[nn.Module, Home] = {}
        self.model = self._copy(bridge.original_model)
        self.model.eval()

    def module_of(self, component: Any) -> nn.Module | None:
        """Return the plain module behind a bridge component; None if it wraps no module."""
        return self._copies.get(id(getattr(component, "original_component", None)))

    def _class_of(self, module: nn.Module) -> type[nn.Module]:
        return type(module)

    def _copy(self, module: nn.Module) -> nn.Module:
        while isinstance(module, GeneralizedComponent):
            module = module.original_component
        known = self._copies.get(id(module))
        if known is not None:
            return known
        cls = self._class_of(module)
        new = cls.__new__(cls)
        self._copies[id(module)] = new
        state = dict(module.__dict__)
        home = home_of(module)
        if home is not None:
            self._homes[new] = home
            # accelerate's wrapper would run the original module instead of the copy
            for name in ACCELERATE:
                state.pop(name, None)
        for name, value in state.items():
            if name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
                state[name] = value.copy()
            elif "_hooks" in name and isinstance(value, dict):
                state[name] = type(value)()
        state["_modules"] = {
            name: None if child is None else self._copy(child)
            for name, child in module._modules.items()
        }
        if "config" in state:
            state["config"] = self._config(state["config"])
        new.__dict__.update(state)
        return new

    def _config(self, config: Any) -> Any:
        """Return the copy of `config`, one per object, so that modules still share configs."""
        if id(config) not in self._configs:
            new = copy.deepcopy(config)
            if hasattr(new, "_attn_implementation"):
                new._attn_implementation = self._attention
            for name in MORE_OUTPUTS:  # some need modules that a pass here skips
                if getattr(new, name, False):
                    setattr(new, name, False)
            self._configs[id(config)] = new
        return self._configs[id(config)]


def check_bridge(bridge: TransformerBridge) -> None:
    """Check that `bridge` computes what the model inside it does, and that the model is causal.

    Runs four short forward passes, unless `load_model` ran them and nothing has changed since.
    Nothing is compared in compatibility mode, where only the bridge has the processed weights;
    with offloaded weights, which would be read twice; and for a bridge that casts to 8 bits, which
    cannot run.

    Raises:
        ModelError: the bridge computes something else, or the model is not causal.
    """
    wrapping = known_wrapping(bridge)
    if wrapping is None:
        prompts = prompts_of(int(bridge.cfg.d_vocab), bridge.tokenizer)
        own = run = None
        if casts_attention(bridge) is not None:
            plain = PlainModel(bridge).model
            run = lambda tokens: plain(tokens, use_cache=False, return_dict=True).logits  # noqa: E731
        elif not (bridge.compatibility_mode or is_offloaded(bridge.original_model)):
            own = logits_of(PlainModel(bridge).model, prompts, device_of(bridge))
        wrapping = compare_wrapping(bridge, prompts, own, run)
    check_same(bridge, wrapping)
    check_causal(bridge, wrapping)
