"""Stations: modules whose weights are brought together while they run, and let go afterwards.

`accelerate` fetches the weights of an offloaded module whenever that module runs, layer by layer
of the smallest kind. Here a whole block is one station: its weights are fetched once for all rows
of a wave, and what comes in is moved to the device where the block runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from patchsweep.memory import give_memory_back
from patchsweep.models.homes import Home, Stored
from patchsweep.models.pages import extent_of, forget, overflows


class SplitBlock(Exception):
    """A block's weights run on several devices; the text names them."""


@dataclass
class Traffic:
    """What was fetched so far."""

    n_bytes: int = 0  # of weights
    n_fetches: int = 0  # stations brought together


@dataclass(frozen=True)
class Away:
    """A weight that is elsewhere while its module rests."""

    owner: nn.Module
    name: str
    stored: Stored  # its values, under the same name
    placeholder: nn.Parameter  # on the meta device

    @property
    def n_bytes(self) -> int:
        return self.placeholder.numel() * self.placeholder.element_size()


class Station:
    """One module, with all modules below it that have a home."""

    def __init__(self, device: torch.device, away: Sequence[Away], traffic: Traffic) -> None:
        self.device = device
        self.away = tuple(away)
        self._traffic = traffic
        self._n_users = 0
        found = (extent_of(weight.stored, weight.name) for weight in self.away)
        self.extents = tuple(extent for extent in found if extent is not None)  # of its files
        self.forgetful = False  # whether their pages leave memory after each visit

    @property
    def n_bytes(self) -> int:
        """What one visit fetches."""
        return sum(weight.n_bytes for weight in self.away)

    def fetch(self) -> None:
        """Bring the weights together, if nobody has."""
        self._n_users += 1
        if self._n_users > 1 or not self.away:
            return
        for weight in self.away:
            # on the CPU a weight of a safetensors file stays mapped: nothing is copied
            values = weight.stored[weight.name].to(self.device, non_blocking=True)
            self._traffic.n_bytes += weight.n_bytes
            weight.owner._parameters[weight.name] = nn.Parameter(values, requires_grad=False)
        self._traffic.n_fetches += 1

    def release(self) -> None:
        """Let the weights go, if nobody else needs them."""
        self._n_users -= 1
        if self._n_users or not self.away:
            return
        for weight in self.away:
            weight.owner._parameters[weight.name] = weight.placeholder
        if self.forgetful:
            forget(self.extents)
        if self.device.type == "cpu":
            give_memory_back()

    def serve(self, module: nn.Module) -> None:
        """Fetch and release around every call of `module`, and move what comes in."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            self.fetch()
            return send_to_device(args, self.device), send_to_device(kwargs, self.device)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.release()

        module.register_forward_pre_hook(before, with_kwargs=True)
        # a call that fails lets go too
        module.register_forward_hook(after, always_call=True)


def build_stations(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    homes: Mapping[nn.Module, Home],
    traffic: Traffic,
) -> dict[nn.Module, Station]:
    """The stations of `model`: each of `blocks`, and each other module that has weights itself.

    Raises:
        SplitBlock: a block has weights on several devices.
    """
    _settle(homes)
    stations: dict[nn.Module, Station] = {}
    inside: set[nn.Module] = set()
    for layer, block in enumerate(blocks):
        members = [module for module in block.modules() if module in homes]
        inside.update(block.modules())
        devices = {homes[module].device for module in members if _has_tensors(module)}
        if len(devices) > 1:
            names = " and ".join(sorted(str(device) for device in devices))
            raise SplitBlock(f"block {layer} is split over {names}")
        if devices:
            stations[block] = Station(devices.pop(), _away(members, homes), traffic)
    for module in model.modules():
        if module not in inside and module in homes and _has_tensors(module):
            stations[module] = Station(homes[module].device, _away([module], homes), traffic)
    forgetful = overflows(extent for station in stations.values() for extent in station.extents)
    for module, station in stations.items():
        station.forgetful = forgetful
        station.serve(module)
    return stations


def _has_tensors(module: nn.Module) -> bool:
    return bool(module._parameters) or bool(module._buffers)


def _settle(homes: Mapping[nn.Module, Home]) -> None:
    """Fetch vectors (norms, biases) for good: they are small, and may be looked at at any time."""
    for module, home in homes.items():
        for name, parameter in module._parameters.items():
            if home.away is not None and parameter is not None and _is_vector(parameter):
                values = home.away[name].to(home.device, copy=True)
                module._parameters[name] = nn.Parameter(values, requires_grad=False)


def _is_vector(parameter: nn.Parameter) -> bool:
    return parameter.is_meta and parameter.ndim < 2


def _away(members: Sequence[nn.Module], homes: Mapping[nn.Module, Home]) -> list[Away]:
    found = []
    for module in members:
        stored = homes[module].away
        for name, parameter in module._parameters.items():
            if stored is not None and parameter is not None and parameter.is_meta:
                found.append(Away(module, name, stored, parameter))
    return found
