"""A machine with a GPU that nothing may touch: `torch.cuda` sees one, and tells on its users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch


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
    with mock.patch.multiple(torch.cuda, **answers):
        yield touched
