"""A stand-in for the model, driven by TransformerLens's own sweep: it looks the logits up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.transformer_lens.packed import PackedCells, Suffix


class PrecomputedModel:
    """What `generic_activation_patch` needs of a model, its patched runs known in advance.

    `base` are the logits of the unpatched run; `packed batches` give what each of the `n_cells`
    cells changes in them, in order (None: no cell changes anything).
    """

    def __init__(
        self, model: TransformerBridge, base: Tensor, batches: PackedCells | None, n_cells: int
    ) -> None:
        self._model, self._base = model, base
        self._suffixes: Iterator[list[Suffix]] = (
            iter([[] for _ in range(n_cells)])
            if batches is None
            else batches.suffixes(range(n_cells))
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.no_grad()
    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        """Full logits `[batch, pos, d_vocab]` of the next cell; without hooks, the base run's.

        A tensor of its own each time: a metric may write into it, or keep it.
        """
        logits = self._base.clone()
        for prompt, start, suffix in next(self._suffixes) if fwd_hooks else ():
            logits[prompt, start:] = suffix
        return logits
