"""Checks of arguments: devices, dtypes, shapes and indices."""

from __future__ import annotations

import torch
from torch import Tensor


def check_alike(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    """Raise unless all named tensors share one device and one floating-point dtype.

    Raises:
        ValueError: a tensor differs; the text names it.
    """
    name, tensor = first
    if not tensor.dtype.is_floating_point:
        raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")
    for other_name, other in others:
        if other is None:
            continue
        if other.device != tensor.device:
            raise ValueError(f"{other_name} is on {other.device}, {name} on {tensor.device}")
        if other.dtype != tensor.dtype:
            raise ValueError(f"{other_name} is {other.dtype}, {name} is {tensor.dtype}")


def check_shapes(*expected: tuple[str, Tensor, tuple[int, ...]]) -> None:
    """Raise unless each named tensor has its shape.

    Raises:
        ValueError: a shape differs; the text names the tensor.
    """
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def check_indices(name: str, indices: Tensor, limit: int) -> None:
    """Raise unless `indices` is int64 and within 0 .. limit-1.

    Checking a table on a GPU waits for the GPU; checking one on the CPU does not.

    Raises:
        ValueError: the dtype is wrong or a value is out of range; the text names the table.
    """
    if indices.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {indices.dtype}")
    if indices.numel():
        low, high = torch.stack(indices.aminmax()).tolist()
        if low < 0 or high >= limit:
            raise ValueError(f"{name} holds {low if low < 0 else high}, outside 0..{limit - 1}")
