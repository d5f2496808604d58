"""Stations: modules whose weights are brought together while they run, and let go afterwards.

`accelerate` fetches the weights of an offloaded module whenever that module runs, layer by layer of
the smallest kind. Here a whole block is one streamed module: its weights are fetched once for all
rows of a packed batch, and what comes in is moved to the device where the block runs. Weights of 16
bits that are to be computed with in fp32 are cast up in the same way, a block's at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from patchsweep.models.arithmetic import SIXTEEN_BITS
from patchsweep.models.memory import give_memory_back
from patchsweep.models.offload import Home, Stored
from patchsweep.models.page_cache import extent_of, forget, overflows


class SplitBlock(Exception):
    """A block's weights run on several devices; the text names them."""


@dataclass
class WeightTraffic:
    """What was fetched so far."""

    n_bytes: int = 0  # of weights
    n_fetches: int = 0  # streamed modules brought together


@dataclass(frozen=True)
class Away:
    """A weight that is elsewhere, or in another dtype, while its module rests."""

    owner: nn.Module
    name: str
    stored: Stored  # its values, under the same name
    placeholder: nn.Parameter  # what the module holds meanwhile
    device: torch.device  # where it is needed
    dtype: torch.dtype  # in which it is needed

    @property
    def n_bytes(self) -> int:
        """What one visit fetches: nothing of a weight that is there and is only cast."""
        if not self.placeholder.is_meta:
            return 0
        return self.placeholder.numel() * self.placeholder.element_size()

    def zeros(self) -> Tensor:
        """Zeros of its shape, which take no memory, if it is there to be cast."""
        if self.placeholder.is_meta:
            return self.values()
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        return zero.expand(self.placeholder.shape)

    def values(self) -> Tensor:
        """The weight as it is needed."""
        # on the CPU a weight of a safetensors file stays mapped: nothing is copied
        return self.stored[self.name].detach().to(self.device, self.dtype, non_blocking=True)


class StreamedModule:
    """One module, with all modules below it whose weights are brought together for it."""

    def __init__(self, device: torch.device, away: Sequence[Away], traffic: WeightTraffic) -> None:
        self.device = device
        self.away = list(away)
        self._traffic = traffic
        self._n_users = 0
        found = (extent_of(w.stored, w.name) for w in self.away if w.placeholder.is_meta)
        self.extents = tuple(extent for extent in found if extent is not None)  # of its files
        self.forgetful = False  # whether their pages leave memory after each visit
        self.at_hand: dict[int, Away] = {}  # address of the values -> the weight, while it runs

    @property
    def n_bytes(self) -> int:
        """What one visit fetches."""
        return sum(weight.n_bytes for weight in self.away)

    def fetch(self, *, nothing_passes: bool = False) -> None:
        """Bring the weights together, if nobody has; their shapes will do where no row passes."""
        self._n_users += 1
        if self._n_users > 1 or not self.away:
            return
        for weight in self.away:
            values = weight.zeros() if nothing_passes else weight.values()
            weight.owner._parameters[weight.name] = nn.Parameter(values, requires_grad=False)
            self.at_hand[values.untyped_storage().data_ptr()] = weight
        self._traffic.n_bytes += self.n_bytes
        self._traffic.n_fetches += self.n_bytes > 0

    def release(self) -> None:
        """Let the weights go, if nobody else needs them."""
        self._n_users -= 1
        if self._n_users or not self.away:
            return
        for weight in self.away:
            weight.owner._parameters[weight.name] = weight.placeholder
        self.at_hand.clear()
        if self.forgetful:
            forget(self.extents)
        if self.device.type == "cpu" and self.n_bytes:
            give_memory_back()

    def leave(self, owners: Collection[nn.Module]) -> None:
        """Let the weights of `owners` that are there as they rest, also while the module runs."""
        self.away = [w for w in self.away if w.placeholder.is_meta or w.owner not in owners]

    def serve(self, module: nn.Module) -> list[RemovableHandle]:
        """Fetch and release around every call of `module`, and move what comes in."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            passing = [x.numel() for x in args if isinstance(x, Tensor)]
            self.fetch(nothing_passes=bool(passing) and not any(passing))
            return send_to_device(args, self.device), send_to_device(kwargs, self.device)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.release()

        return [
            module.register_forward_pre_hook(before, with_kwargs=True),
            # a call that fails lets go too
            module.register_forward_hook(after, always_call=True),
        ]


def stream_modules(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    homes: Mapping[nn.Module, Home],
    traffic: WeightTraffic,
    dtype: torch.dtype | None,
) -> dict[nn.Module, StreamedModule]:
    """The streamed modules of `model`: each of `blocks`, and each other module that has weights
    itself.

    Weights of 16 bits become `dtype` while their streamed module is visited (None: they stay as
    they are). Modules that have neither such weights nor a home need no streamed module.

    Raises:
        SplitBlock: a block has weights on several devices.
    """
    find = _Finder(homes, dtype)
    find.settle(model)
    stations: dict[nn.Module, StreamedModule] = {}
    inside: set[nn.Module] = set()
    for layer, block in enumerate(blocks):
        members = [module for module in block.modules() if find.cares_for(module)]
        inside.update(block.modules())
        devices = {find.device_of(module) for module in members}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise SplitBlock(f"block {layer} is split over {names}")
        if devices:
            stations[block] = StreamedModule(devices.pop(), find.away(members), traffic)
    for module in model.modules():
        if module not in inside and find.cares_for(module):
            stations[module] = StreamedModule(find.device_of(module), find.away([module]), traffic)
    forgetful = overflows(extent for station in stations.values() for extent in station.extents)
    for station in stations.values():
        station.forgetful = forgetful
    return stations


class _Finder:
    """Which weights are not where, or in which dtype, they are needed."""

    def __init__(self, homes: Mapping[nn.Module, Home], dtype: torch.dtype | None) -> None:
        self.homes, self.dtype = homes, dtype

    def cares_for(self, module: nn.Module) -> bool:
        """Whether the module needs a streamed module: it has a home, or weights to cast."""
        if module in self.homes:
            return bool(module._parameters) or bool(module._buffers)
        own = (p for p in module._parameters.values() if p is not None)
        return any(p.dtype != self._needed(p) for p in own)

    def device_of(self, module: nn.Module) -> torch.device:
        """Where it runs."""
        if module in self.homes:
            return self.homes[module].device
        return next(p.device for p in module._parameters.values() if p is not None)

    def settle(self, model: nn.Module) -> None:
        """Bring vectors (norms, biases) and buffers for good: they are small, and may be looked
        at at any time."""
        for module in model.modules():
            for weight in self._weights(module):
                if weight.placeholder.ndim < 2:
                    module._parameters[weight.name] = nn.Parameter(
                        weight.values().clone(), requires_grad=False
                    )
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self._needed(buffer))

    def away(self, members: Sequence[nn.Module]) -> list[Away]:
        """The weights that a streamed module of `members` brings together, vectors left out."""
        return [
            weight
            for module in members
            for weight in self._weights(module)
            if weight.placeholder.ndim > 1
        ]

    def _weights(self, module: nn.Module) -> Iterator[Away]:
        home = self.homes.get(module)
        stored = None if home is None else home.away
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            dtype = self._needed(parameter)
            if stored is not None and parameter.is_meta:
                assert home is not None
                yield Away(module, name, stored, parameter, home.device, dtype)
            elif dtype != parameter.dtype:
                yield Away(module, name, {name: parameter}, parameter, parameter.device, dtype)

    def _needed(self, weight: Tensor) -> torch.dtype:
        """The dtype in which a weight is computed with."""
        cast = self.dtype is not None and weight.dtype in SIXTEEN_BITS
        return self.dtype if cast else weight.dtype  # type: ignore[return-value]
