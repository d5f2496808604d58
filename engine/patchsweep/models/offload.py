"""Where the weights of a dispatched model are, as `accelerate` left it on the model's modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

# what `accelerate` puts into a module's own attributes, so that it fetches weights when it runs
ACCELERATE = ("_hf_hook", "_old_forward", "forward")


@runtime_checkable
class Stored(Protocol):
    """Weights by name, each fetched when it is asked for."""

    def __getitem__(self, name: str, /) -> Tensor: ...


@dataclass(frozen=True)
class Home:
    """Where one module runs, and where its own weights are meanwhile."""

    device: torch.device  # where it runs
    away: Stored | None  # weights that are fetched whenever it runs


def home_of(module: nn.Module) -> Home | None:
    """Where `accelerate` wants `module` to run; None if it has no say in it."""
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
        found = [_align_hook(inner) for inner in hook.hooks]
        kept = [inner for inner in found if inner is not None]
        # the one that fetches weights is the one that matters
        return next((inner for inner in kept if inner.offload), kept[0] if kept else None)
    return None


def device_of(model: TransformerBridge) -> torch.device:
    """Where the model takes its tokens: where its weights lie.

    `cfg.device` counts for models that `accelerate` placed or that have no weights yet. A bridge
    made round a given model records the machine's first GPU there, wherever that model is.
    """
    inner = model.original_model
    weight = next(inner.parameters(), None)
    if weight is None or weight.is_meta or getattr(inner, "hf_device_map", None):
        return torch.device(str(model.cfg.device or "cpu"))
    return weight.device


def main_device(model: nn.Module) -> torch.device:
    """Where a model with a device map takes its tokens: its first GPU, else the CPU."""
    for place in model.hf_device_map.values():  # type: ignore[operator]
        if str(place) not in ("cpu", "disk"):
            return torch.device(f"cuda:{place}" if isinstance(place, int) else place)
    return torch.device("cpu")


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights of `model` are fetched anew whenever their module runs."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    return "disk" in places or ("cpu" in places and len(places) > 1)


def place_of(device_map: Mapping[str, str | int], name: str) -> str:
    """Where the weight called `name` rests: `cpu`, `disk`, or a GPU such as `cuda:0`."""
    parts = name.split(".")
    places = (device_map.get(".".join(parts[:n])) for n in range(len(parts), -1, -1))
    place = next(place for place in places if place is not None)
    return f"cuda:{place}" if isinstance(place, int) else str(place)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor, Stored | None]]:
    """Name and values of every parameter of `model`, one by one, and where offloaded ones rest.

    Weights that are tied to others come once, as in `named_parameters`.
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
    """Whether the weight called `name` is another one's second name."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return name.replace("_original_component.", "") in tied
