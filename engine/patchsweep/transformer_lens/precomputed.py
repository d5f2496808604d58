"""A model for TransformerLens's own sweep function that returns precomputed logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.transformer_lens.packed import Written


class PrecomputedModel:
    """The model interface of `generic_activation_patch` with patched runs from packed batches.

    `base` are the logits of the unpatched run. `cells` yields, in order, the logits that each cell
    changes. Other attributes are `model`'s.
    """

    def __init__(
        self, model: TransformerBridge, base: Tensor, cells: Iterator[list[Written]]
    ) -> None:
        self._model, self._base, self._patched = model, base, cells

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @torch.no_grad()
    def run_with_hooks(self, tokens: Tensor, fwd_hooks: list[Any]) -> Tensor:
        """Return full logits `[batch, pos, d_vocab]` of the next cell; without hooks, of the base.

        Each call returns a new tensor, since a metric may change or keep it.
        """
        return self.patched(next(self._patched) if fwd_hooks else ())

    def patched(self, written: Sequence[Written]) -> Tensor:
        """Return the base run's logits with `written` over them."""
        logits = self._base.clone()
        for where, values in written:
            logits[where] = values
        return logits
