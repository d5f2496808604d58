"""Where a model goes: its device, or the map of GPUs, CPU and disk that hold its parts."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from patchsweep.errors import ModelError
from patchsweep.models.memory import free_memory

log = logging.getLogger("patchsweep")
# exists where NVIDIA's kernel module is loaded, whether or not torch can use the GPU
_DRIVER = Path("/proc/driver/nvidia/version")
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


def choose_device(device: str | None, placement: Placement | None) -> str | None:
    """Return `device`, else `cuda` if torch can use a GPU, else `cpu`; None with a `placement`.

    Logs a warning if the machine has a GPU that torch cannot use.

    Raises:
        ModelError: `device` and `placement` are both given, or the device does not exist.
    """
    if placement is not None:
        if device is not None:
            raise ModelError(
                f"device={device!r} and device_map={placement.device_map!r} exclude each other; "
                "give one"
            )
        return None
    if device is not None:
        _check(device)
        return device
    if torch.cuda.is_available():
        return "cuda"
    if _DRIVER.exists():
        log.warning("the model runs on the CPU although this machine has a GPU: %s", why_no_gpu())
    return "cpu"


def _check(device: str) -> None:
    """Raise a ModelError unless torch can put tensors on `device`."""
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"device={device!r} is no device of torch; use cpu, cuda, or one GPU such as cuda:1"
        ) from error
    if parsed.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError(f"device={device!r} cannot be used: {why_no_gpu()}; use device='cpu'")
        n = torch.cuda.device_count()
        if parsed.index is not None and parsed.index >= n:
            raise ModelError(
                f"device={device!r} does not exist; this process sees cuda:0..cuda:{n - 1}"
            )


def why_no_gpu() -> str:
    """Return the reason why torch uses no GPU here, and a remedy if one is known."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build for the CPU; install a CUDA build"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            return f"torch {torch.__version__} says: {str(error).splitlines()[0]}"
    return "it has no GPU that this process may see"
