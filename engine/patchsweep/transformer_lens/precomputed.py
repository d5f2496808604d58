"""A model for TransformerLens's own sweep function that returns precomputed logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.transformer_lens.packed import PackedCells, Suffix


class PrecomputedModel:
    """The model interface of `generic_activation_patch` with patched runs from packed batches.

    `base` are the logits of the unpatched run. `batches` yields, in order, the logits that each
    of the `n_cells` cells changes (None: no cell changes any). Other attributes are `model`'s.
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
        """Return full logits `[batch, pos, d_vocab]` of the next cell; without hooks, of the base.

        Each call returns a new tensor, since a metric may change or keep it.
        """
        logits = self._base.clone()
        for prompt, start, suffix in next(self._suffixes) if fwd_hooks else ():
            logits[prompt, start:] = suffix
        return logits
