"""Device maps: the GPU, CPU or disk on which each part of a model is placed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchsweep.errors import ModelError
from patchsweep.models.memory import free_memory

DeviceMap = str | Mapping[str, str | int]
MaxMemory = Mapping[str | int, str | int]
# names of maps that `accelerate` computes
INFERRED = ("auto", "balanced", "balanced_low_0", "sequential")
# fraction of the free memory that weights may fill; the rest is for packed batches and caches
WEIGHT_SHARE = 0.7


@dataclass(frozen=True)
class Placement:
    """A device map and its limits."""

    device_map: str | dict[str, str | int]
    max_memory: dict[str | int, str | int] | None  # device -> bytes or a text such as 60GiB
    offload_folder: str | None  # for weights that cannot stay in the model's own files

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments for `from_pretrained`."""
        arguments: dict[str, Any] = {
            "device_map": self.device_map,
            "offload_folder": self.offload_folder,
        }
        if isinstance(self.device_map, str):
            arguments["max_memory"] = self.limits()
        return arguments

    def limits(self) -> dict[str | int, str | int]:
        """Return what each device may hold: `max_memory`, or most of what is free now."""
        return default_memory() if self.max_memory is None else self.max_memory


def as_placement(
    device_map: DeviceMap | None,
    max_memory: MaxMemory | None,
    offload_folder: str | Path | None,
) -> Placement | None:
    """Make a checked `Placement`; None without a device map.

    Raises:
        ModelError: the map is unknown, or `max_memory` comes without a named map.
    """
    if not isinstance(device_map, str | Mapping | None):
        raise ModelError(f"device_map={device_map!r} must be a name such as auto, or a mapping")
    if not isinstance(max_memory, Mapping | None):
        raise ModelError(f"max_memory={max_memory!r} must be a mapping, such as {{'cpu': '9GiB'}}")
    inferred = isinstance(device_map, str)
    if isinstance(device_map, str) and device_map not in INFERRED:
        raise ModelError(
            f"device_map={device_map!r} is not known; use {', '.join(INFERRED)}, or a mapping from "
            "modules to devices; one device is device=..."
        )
    if max_memory is not None and not inferred:
        raise ModelError(
            f"max_memory={dict(max_memory)} is for a device_map of {', '.join(INFERRED)}; give one"
        )
    if device_map is None:
        return None
    return Placement(
        device_map if isinstance(device_map, str) else dict(device_map),
        None if max_memory is None else _numbered(max_memory),
        None if offload_folder is None else str(offload_folder),
    )


def _numbered(max_memory: MaxMemory) -> dict[str | int, str | int]:
    """Convert GPU numbers from text, as config files and command lines give them, to int."""
    return {
        int(key) if isinstance(key, str) and key.isdigit() else key: value
        for key, value in max_memory.items()
    }


def default_memory() -> dict[str | int, str | int]:
    """Return the bytes of weights that each GPU and the CPU may hold."""
    devices: list[str | int] = [*range(torch.cuda.device_count()), "cpu"]
    return {device: int(WEIGHT_SHARE * free_memory(torch.device(device))) for device in devices}
