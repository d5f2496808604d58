"""Devices and offloaded weights of a dispatched model, read from accelerate's hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

# attributes that `accelerate` sets on a module so that it fetches its weights before it runs
ACCELERATE = ("_hf_hook", "_old_forward", "forward")


@runtime_checkable
class Stored(Protocol):
    """A mapping from names to weights that loads a weight on each access."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class Home:
    """Execution device of a module, and its offloaded weights."""

    device: torch.device  # execution device
    away: Stored | None  # offloaded weights, loaded each time the module runs; None: not offloaded


def home_of(module: nn.Module) -> Home | None:
    """Return the placement that accelerate gave `module`; None without an AlignDevicesHook."""
    align = _align_hook(module.__dict__.get("_hf_hook"))
    if align is None or align.execution_device is None:
        return None
    device = align.execution_device
    name = f"cuda:{device}" if isinstance(device, int) else device
    return Home(torch.device(name), align.weights_map if align.offload else None)


def _align_hook(hook: ModelHook | None) -> AlignDevicesHook | None:
    if isinstance(hook, AlignDevicesHook):
        return hook
    if isinstance(hook, SequentialHook):
        optional = [_align_hook(inner) for inner in hook.hooks]
        aligns = [inner for inner in optional if inner is not None]
        # prefer the hook that loads offloaded weights
        return next((inner for inner in aligns if inner.offload), aligns[0] if aligns else None)
    return None


def device_of(model: TransformerBridge) -> torch.device:
    """Return the device for the model's input tokens: the device of its first weight.

    For models that `accelerate` placed or that have no weights yet it is `cfg.device`. Elsewhere
    `cfg.device` is unreliable: a bridge of an existing model records the machine's first GPU there,
    wherever the model is.
    """
    inner = model.original_model
    weight = next(inner.parameters(), None)
    if weight is None or weight.is_meta or getattr(inner, "hf_device_map", None):
        return torch.device(str(model.cfg.device or "cpu"))
    return weight.device


def main_device(model: nn.Module) -> torch.device:
    """Return the device for the tokens of a model with a device map: its first GPU, else CPU."""
    for place in model.hf_device_map.values():  # type: ignore[operator]
        if str(place) not in ("cpu", "disk"):
            return torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return torch.device("cpu")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of `model` are loaded again each time their module runs."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return "disk" in places or ("cpu" in places and len(places) > 1)


def place_of(device_map: Mapping[str, str | int], name: str) -> str:
    """Return where the weight called `name` is stored: `cpu`, `disk`, or a GPU such as `cuda:0`."""
    parts = name.split(".")
    places = (device_map.get(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    place = next(place for place in places if place is not None)
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Stored | None]]:
    """Yield (name, values, `Stored` if offloaded) for each parameter of `model`, loaded in turn.

    Tied weights come once, as in `named_parameters`.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            yield name, parameter.detach(), None
        elif not is_tied(model, name):
            module, _, leaf = name.rpartition(".")
            home = home_of(model.get_submodule(module))
            assert home is not None
            assert home.away is not None
            yield name, home.away[leaf], home.away


def is_tied(model: nn.Module, name: str) -> bool:
    """Whether the weight called `name` is tied to another weight that holds its values."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return name.replace("_original_component.", "") in tied
