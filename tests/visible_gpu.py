"""A machine with a GPU that nothing may touch: `torch.cuda` sees one, and tells on its users."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

CUDA, META = 1, 14  # c10/core/DeviceType.h


def device_guards() -> Any:
    """The guards of C++ by device type, a table that c10 exports; 0: none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    return (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")


class Touched(AssertionError):
    """Something put a tensor on the GPU, or asked it for something."""


@contextmanager
def visible_gpu() -> Iterator[list[str]]:
    """Inside, one GPU is visible. What touches it raises `Touched`, and is in the list given."""
    touched: list[str] = []

    def touch(*_: object, **__: object) -> None:
        touched.append("CUDA was initialised")
        raise Touched("CUDA was initialised beside a model on the CPU")

    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "mem_get_info": touch,
        "synchronize": touch,
        "init": touch,
        "_lazy_init": touch,  # any tensor that is made on or moved to CUDA
    }
    # a virtual GPU that other tests ran on left its guard, with which nothing is initialised
    guards = device_guards()
    guard = guards[CUDA]
    if guard == guards[META]:
        guards[CUDA] = None
    try:
        with mock.patch.multiple(torch.cuda, **answers):
            yield touched
    finally:
        guards[CUDA] = guard
