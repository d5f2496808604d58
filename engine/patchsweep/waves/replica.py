"""The Hugging Face modules behind a bridge, once more: no hooks, the same tensors.

`TransformerBridge` wraps the modules of a model in place. The wave runner needs them plain,
with an attention function of its own. A `Replica` copies the module objects (not one weight)
and leaves the bridge as it is.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import AttentionInterface, AttentionMaskInterface

from patchsweep.waves.layers import leaner
from patchsweep.waves.plain import PlainModel
from patchsweep.waves.stations import SplitBlock, Traffic, build_stations

ATTENTION = "patchsweep"
Attend = Callable[..., Tensor]


class Unsupported(Exception):
    """The wave runner cannot run this model or site; the text says why."""


@dataclass(frozen=True, eq=False)
class Point:
    """A place at the border of a module, where an activation can be read and replaced."""

    module: nn.Module
    side: Literal["in", "out"]
    columns: Tensor | None = None  # of the tensor there; None: all of them, in their order


class Replica(PlainModel):
    """Plain modules that share every parameter and buffer with `bridge`, to run waves with.

    Where `accelerate` placed the model on several devices, or keeps weights on the CPU or on disk
    until they are needed, each block is visited on its device and its weights are fetched once a
    visit; `traffic` counts them.

    Raises:
        Unsupported: the model has no list of blocks with attention that takes
            a registered attention function, or a block is split over devices.
    """

    blocks: tuple[nn.Module, ...]

    def __init__(self, bridge: TransformerBridge) -> None:
        super().__init__(bridge, ATTENTION)
        self._hooks = bridge.hook_dict
        self._names: dict[int, list[str]] = defaultdict(list)  # hook point -> its names
        for name, hook in self._hooks.items():
            self._names[id(hook)] += [name, str(hook.name)]
        self.traffic = Traffic()
        if not hasattr(bridge, "blocks"):
            raise Unsupported("the model has no single list of decoder blocks")
        self.blocks = tuple(self._copies[id(b.original_component)] for b in bridge.blocks)
        for layer, block in enumerate(self.blocks):
            if any(isinstance(module, nn.Conv1d) for module in block.modules()):
                # its state runs from token to token: there is no prefix that rows could share
                raise Unsupported(f"block {layer} mixes tokens by a convolution, not by attention")
        self._attentions = tuple(self._attention_of(i) for i in range(len(self.blocks)))
        try:
            self._stations = build_stations(self.model, self.blocks, self._homes, self.traffic)
        except SplitBlock as error:
            raise Unsupported(str(error)) from None

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def takes_attention_functions(self) -> bool:
        """Whether the code of every block's attention calls a registered attention function."""
        codes = [inspect.unwrap(type(m).forward).__code__ for m in self._attentions]
        return all("ALL_ATTENTION_FUNCTIONS" in code.co_names for code in codes)

    @contextmanager
    def tail_at_hand(self) -> Iterator[None]:
        """Keep what lies around the blocks fetched, for several calls of it one after another."""
        around = [s for module, s in self._stations.items() if module not in self.blocks]
        for station in around:
            station.fetch()
        try:
            yield
        finally:
            for station in around:
                station.release()

    def is_away(self, module: nn.Module) -> bool:
        """Whether weights of one of the plain modules are elsewhere until it runs."""
        station = self._stations.get(module)
        return station is not None and bool(station.away)

    def values_of(self, module: nn.Module, name: str) -> Tensor | None:
        """The values of a weight of one of the plain modules, where they are: nothing is fetched.

        None if the module has no weight of that name.
        """
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor):
            return None
        home = self._homes.get(module)
        if weight.is_meta and home is not None and home.away is not None:
            return home.away[name]
        return weight.detach()

    def attend_with(self, layer_fns: Callable[[int], Attend] | None) -> None:
        """Let layer i's attention call `layer_fns(i)`; None takes the functions away."""
        for layer, module in enumerate(self._attentions):
            if layer_fns is None:
                module.__dict__.pop("patchsweep_attend", None)
            else:
                module.__dict__["patchsweep_attend"] = layer_fns(layer)

    def has_hook(self, hook_name: str) -> bool:
        """Whether the bridge has a hook of that name. Its own table is made anew at every look."""
        return hook_name in self._hooks

    def point(self, hook_name: str) -> Point | None:
        """Where the bridge's hook `hook_name` sits among the plain modules.

        None if the hook exists but lies inside a function rather than at a module's
        border, or on a module that only the bridge has.

        Raises:
            KeyError: the bridge has no such hook.
        """
        sides: dict[str, Literal["in", "out"]] = {"hook_in": "in", "hook_out": "out"}
        for name in self._names[id(self._hooks[hook_name])]:
            path, _, leaf = name.rpartition(".")
            if leaf not in sides:
                continue
            component: Any = self.bridge
            for part in path.split("."):
                component = component[int(part)] if part.isdigit() else getattr(component, part)
            module = self.module_of(component)
            if module is not None:
                return Point(module, sides[leaf])
        return None

    def _class_of(self, module: nn.Module) -> type[nn.Module]:
        return leaner(type(module))  # type: ignore[arg-type]  # mypy takes classes for unhashable

    def _attention_of(self, layer: int) -> nn.Module:
        component = getattr(self.bridge.blocks[layer], "attn", None)
        module = None if component is None else self.module_of(component)
        if module is None:
            raise Unsupported(f"block {layer} has no attention module of its own")
        return module


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What Hugging Face attention layers call; q, k, v are `[1, head, token, d_head]`."""
    # rotary tables lift q and k to fp32 where the layers hand on bf16
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    return module.__dict__["patchsweep_attend"](module, query, key, value, **kwargs), None


def _no_mask(
    *,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Tensor],
    device: torch.device | None = None,
    **_: Any,
) -> None:
    """Causality and windows are the attention function's own business; it knows no other mask.

    Raises:
        Unsupported: the mask is neither causal nor a sliding window.
    """
    first = torch.zeros((), dtype=torch.long, device=device)
    query = torch.arange(q_length, device=device).unsqueeze(1)
    key = torch.arange(kv_length, device=device).unsqueeze(0)
    seen = mask_function(first, first, query, key).expand(q_length, kv_length)
    window = int(seen.sum(dim=1).max())
    if not torch.equal(seen, (key <= query) & (key > query - window)):
        raise Unsupported(
            f"its attention over {kv_length} tokens is neither causal nor a sliding window"
        )


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _no_mask)


def attention_settings(module: nn.Module, d_head: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """`scale`, `window`, `softcap` and `sinks` from what a layer passed to its attention.

    Raises:
        Unsupported: the layer asks for something that is not honoured.
    """
    if kwargs.get("position_bias") is not None:
        raise Unsupported("attention takes a position bias")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise Unsupported("attention is not causal")
    scale = kwargs.get("scaling")
    if scale is None:
        scale = getattr(module, "scaling", None)
    sinks = kwargs.get("s_aux")
    return {
        "scale": float(d_head**-0.5 if scale is None else scale),
        "window": kwargs.get("sliding_window"),
        "softcap": kwargs.get("softcap"),
        "sinks": sinks.detach() if isinstance(sinks, torch.Tensor) else None,
    }
