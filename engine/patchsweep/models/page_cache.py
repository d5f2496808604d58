"""The page cache of weight files: where weights lie on disk, and dropping their pages after use.

Weights mapped from a file occupy the page cache, which all processes of a machine share. A process
that reads more weights in a cycle than memory holds never finds a page again, and the pages it has
used evict those it needs next. In that case each page is dropped after use.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from accelerate.utils import PrefixedDataset
from torch import nn

from patchsweep.models.memory import free_memory
from patchsweep.models.offload import Stored, home_of

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Extent:
    """The part of a file that holds the values of a weight."""

    file: str
    first: int  # offset of the first byte
    n_bytes: int


def extent_of(stored: Stored, name: str) -> Extent | None:
    """Return where the weight called `name` lies on disk; None if it is in memory."""
    if not isinstance(stored, PrefixedDataset):
        return None
    entry = getattr(stored.dataset, "index", {}).get(f"{stored.prefix}{name}", {})
    if "safetensors_file" not in entry:
        return None
    file = entry["safetensors_file"]
    first, last = _offsets(file)[entry.get("weight_name", f"{stored.prefix}{name}")]
    return Extent(file, first, last - first)


@cache
def _offsets(file: str) -> dict[str, tuple[int, int]]:
    """Return the byte range [first, past last) of each tensor of a safetensors file."""
    with open(file, "rb") as opened:
        header = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(header))
    entries.pop("__metadata__", None)
    start = 8 + header
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1])
        for name, entry in entries.items()
    }


def extents_of(module: nn.Module) -> list[Extent]:
    """Return where the offloaded weights of `module` (without its children) lie on disk."""
    home = home_of(module)
    if home is None or home.away is None:
        return []
    places = [extent_of(home.away, name) for name, p in module._parameters.items() if p is not None]
    return [extent for extent in places if extent is not None]


def overflows(extents: Iterable[Extent]) -> bool:
    """Whether `extents` are larger than the free memory."""
    return sum(extent.n_bytes for extent in extents) > free_memory(_CPU)


def forget(extents: Iterable[Extent]) -> None:
    """Drop the pages of `extents` from the page cache, except those that a process has mapped."""
    if not hasattr(os, "posix_fadvise"):  # not Linux
        return
    for extent in extents:
        with open(extent.file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), extent.first, extent.n_bytes, os.POSIX_FADV_DONTNEED)


def forget_after_use(model: nn.Module) -> None:
    """Make each module of `model` drop its weights' pages after use, if not all fit in memory."""
    extents = {module: extents_of(module) for module in model.modules()}
    if not overflows(extent for some in extents.values() for extent in some):
        return
    for module, some in extents.items():
        if some:
            # this hook runs after accelerate's wrapper, which has released the weights by then
            module.register_forward_hook(lambda *_, some=some: forget(some))
