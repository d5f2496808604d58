"""Activation store: keeps activations within a byte budget and spills the rest to mapped files.

A mapped tensor behaves like any CPU tensor: the operating system writes its pages to disk when
memory runs short and reads them on access. The files are unlinked once they are mapped, so nothing
is left behind, however the process ends.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref

import torch
from torch import Tensor

from patchsweep.errors import ModelError


class Budget:
    """The bytes of activations that may stay in memory; all captures of a runner share one."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.n_used = 0
        self.n_spilled = 0  # total bytes written to files

    def take(self, n_bytes: int) -> bool:
        """Reserve `n_bytes` if they fit the budget; return whether they do."""
        if self.n_used + n_bytes > self.n_bytes:
            return False
        self.n_used += n_bytes
        return True

    def give_back(self, n_bytes: list[int]) -> None:
        """Return reserved bytes to the budget."""
        self.n_used -= sum(n_bytes)


class ActivationStore:
    """Keeps the tensors of one capture; when deleted, it returns its bytes to the budget."""

    def __init__(self, budget: Budget | None = None) -> None:
        self._budget = budget
        self._taken: list[int] = []
        if budget is not None:
            weakref.finalize(self, budget.give_back, self._taken)

    def copy(self, x: Tensor) -> Tensor:
        """Return a contiguous copy of `x`, in memory on its device or mapped on the CPU."""
        kept = self.keep(x)
        return kept.clone(memory_format=torch.contiguous_format) if kept is x else kept

    def keep(self, x: Tensor) -> Tensor:
        """Return `x` itself, or a mapped copy on the CPU if the budget is used up.

        Raises:
            ModelError: the copy does not fit the disk.
        """
        n_bytes = x.numel() * x.element_size()
        if self._budget is None or self._budget.take(n_bytes):
            self._taken.append(n_bytes)
            return x
        self._budget.n_spilled += n_bytes
        return _mapped(x, n_bytes)


def _mapped(x: Tensor, n_bytes: int) -> Tensor:
    if not n_bytes:
        return x.cpu()
    with tempfile.TemporaryFile(prefix="patchsweep-") as file:
        try:
            # reserve all of it now: otherwise a write to a full disk would kill the process later
            os.posix_fallocate(file.fileno(), 0, n_bytes)
        except OSError as error:
            raise ModelError(
                f"activations of {n_bytes / 1e6:.0f} MB exceed runner.cache_budget and do not fit "
                f"{tempfile.gettempdir()} ({error.strerror}); set TMPDIR to a larger disk, or "
                "raise the budget"
            ) from error
        pages = mmap.mmap(file.fileno(), n_bytes)
    flat = torch.frombuffer(pages, dtype=x.dtype, count=math.prod(x.shape))
    return flat.view(x.shape).copy_(x)
