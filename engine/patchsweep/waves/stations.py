"""Stations: modules whose weights are brought together while they run, and let go afterwards.

`accelerate` fetches the weights of an offloaded module whenever that module runs, layer by layer
of the smallest kind. Here a whole block is one station: its weights are fetched once for all rows
of a wave, and what comes in is moved to the device where the block runs.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from patchsweep.memory import free_memory
from patchsweep.models.homes import Extent, Home, Stored, extent_of

_CPU = torch.device("cpu")


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
        self._passing: tuple[Extent, ...] = ()  # of files, not worth keeping in memory

    @property
    def n_bytes(self) -> int:
        """What one visit fetches."""
        return sum(weight.n_bytes for weight in self.away)

    def pass_by(self) -> None:
        """Take the pages of its weights out of memory after each visit."""
        extents = (extent_of(weight.stored, weight.name) for weight in self.away)
        self._passing = tuple(extent for extent in extents if extent is not None)

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
        for extent in self._passing:
            forget(extent)
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


def forget(extent: Extent) -> None:
    """Take the pages of `extent` out of memory, those that no process has mapped."""
    if not hasattr(os, "posix_fadvise"):  # not Linux
        return
    with open(extent.file, "rb") as opened:
        os.posix_fadvise(opened.fileno(), extent.first, extent.n_bytes, os.POSIX_FADV_DONTNEED)


def give_memory_back() -> None:
    """Return what was freed to the system: between blocks glibc would keep hundreds of MB."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # no libc that can be named so, such as on Windows
        return None


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
    # whoever goes round and round through more than memory holds finds no page again; but the old
    # pages crowd out the new ones before they are used
    too_many = sum(station.n_bytes for station in stations.values()) > free_memory(_CPU)
    for module, station in stations.items():
        station.serve(module)
        if too_many:
            station.pass_by()
    return stations


def _has_tensors(module: nn.Module) -> bool:
    return bool(module._parameters) or bool(module._buffers)


def _away(members: Sequence[nn.Module], homes: Mapping[nn.Module, Home]) -> list[Away]:
    found = []
    for module in members:
        stored = homes[module].away
        for name, parameter in module._parameters.items():
            if stored is not None and parameter is not None and parameter.is_meta:
                found.append(Away(module, name, stored, parameter))
    return found
