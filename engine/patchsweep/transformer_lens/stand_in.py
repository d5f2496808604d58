"""A stand-in for the model, driven by TransformerLens's own sweep: it looks the logits up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.transformer_lens.waves import CellWaves, Suffix

Metric = Callable[[Tensor], Any]


class PatchedLogits:
    """Full logits `[batch, pos, d_vocab]` of one cell after the other, in one reused buffer.

    Only the positions that a cell changes are written; the next cell gets them back as the base
    run's. A metric may change what it is given, or keep it: both are noticed.
    """

    def __init__(self, base: Tensor, waves: CellWaves | None, n_cells: int) -> None:
        self.base = base
        self.is_base = True  # whether the logits given last are the base run's, unchanged
        self._suffixes: Iterator[list[Suffix]] = (
            iter([[] for _ in range(n_cells)]) if waves is None else waves.suffixes(range(n_cells))
        )
        self._buffer = base.clone()
        self._version = _version(self._buffer)
        # per prompt the first position that no longer holds the base run's logits
        self._dirty = [base.shape[1]] * len(base)

    def next(self) -> Tensor:
        """The logits of the next cell."""
        changed = next(self._suffixes)
        with torch.no_grad():
            self._write(changed)
        self.is_base = not changed
        return self._buffer.view(self._buffer.shape)  # a tensor of its own for each cell

    def kept(self) -> None:
        """Somebody kept the logits given last: they stay as they are from now on."""
        self._buffer = self.base.clone()
        self._version = _version(self._buffer)
        self._dirty = [self.base.shape[1]] * len(self.base)

    @property
    def n_holders(self) -> int:
        """Tensors and arrays that share the buffer's memory."""
        return int(torch._C._storage_Use_Count(self._buffer.untyped_storage()._cdata))

    def _write(self, changed: list[Suffix]) -> None:
        length = self.base.shape[1]
        if _version(self._buffer) != self._version or self._version is None:
            self._buffer.copy_(self.base)
            self._dirty = [length] * len(self.base)
        first = [length] * len(self.base)
        for prompt, start, logits in changed:
            first[prompt] = start
            self._buffer[prompt, start:] = logits
        for prompt, (dirty, start) in enumerate(zip(self._dirty, first, strict=True)):
            if dirty < start:
                self._buffer[prompt, dirty:start] = self.base[prompt, dirty:start]
        self._dirty = first
        self._version = _version(self._buffer)


def _version(x: Tensor) -> int | None:
    """Counts the changes of `x` in place; None in inference mode, where nothing counts them."""
    return None if x.is_inference() else x._version


class StandIn:
    """What `generic_activation_patch` needs of a model, its patched runs known in advance."""

    def __init__(self, model: TransformerBridge, logits: PatchedLogits) -> None:
        self._model, self._logits = model, logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        """The logits of the next cell; without hooks, those of the base run."""
        return self._logits.next() if fwd_hooks else self._logits.base.clone()


def watched(metric: Metric, logits: PatchedLogits) -> Metric:
    """`metric`, called once for all the cells that leave the base run as it is."""
    of_base: list[Any] = []

    def call(x: Tensor) -> Any:
        if logits.is_base and of_base:
            return of_base[0]
        names, holders = sys.getrefcount(x), logits.n_holders
        value = torch.as_tensor(metric(x)).detach().clone()
        if sys.getrefcount(x) > names or logits.n_holders > holders:
            logits.kept()
        if logits.is_base:
            of_base.append(value)
        return value

    return call


def watch_metrics(
    metric: Metric | Mapping[str, Metric], logits: PatchedLogits
) -> Metric | dict[str, Metric]:
    """`watched` for one metric or for each of a mapping."""
    if isinstance(metric, Mapping):
        return {name: watched(one, logits) for name, one in metric.items()}
    return watched(metric, logits)
