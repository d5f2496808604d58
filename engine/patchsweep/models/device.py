"""The choice of a device for a model without a device map."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import torch

from patchsweep.errors import ModelError
from patchsweep.models.device_map import Placement

log = logging.getLogger("patchsweep")
# exists where NVIDIA's kernel module is loaded, whether or not torch can use the GPU
_DRIVER = Path("/proc/driver/nvidia/version")


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
