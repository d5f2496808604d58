"""The readout: from final residuals to logits, by the model's own last steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from patchsweep_kernels.answer_logits import answer_logits
from patchsweep_kernels.unembedding import Unembedding
from torch import Tensor, nn

from patchsweep.waves.replica import Replica, Unsupported

# a chunk of logits stays within this many bytes
CHUNK_BYTES = 32 * 2**20


class Readout:
    """Logits of final residuals: `[row, d_model]` to `[row, d_vocab]`, or chosen tokens only.

    The whole vocabulary goes through the model's own tail: its forward pass, with one stand-in
    block that hands over the residual. Chosen tokens go through the final norm and a few rows
    of the unembedding, where that was checked to give the same logits.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.d_vocab: int = replica.bridge.cfg.d_vocab
        self._norm = replica.module_of(getattr(replica.bridge, "ln_final", None))
        self._unembed = replica.module_of(getattr(replica.bridge, "unembed", None))
        self._scale, self._softcap = _logit_scale(replica.model.config)
        self._direct: bool | None = None

    @torch.no_grad()
    def logits(self, resid: Tensor) -> Tensor:
        """Logits `[row, d_vocab]` of final residuals `[row, d_model]`; the caller chunks."""
        parent, name, blocks = _block_list(self.replica)
        # one token a prompt, so that learned positions never run out
        tokens = torch.zeros(len(resid), 1, dtype=torch.long, device=resid.device)
        setattr(parent, name, nn.ModuleList([_StandIn(resid.unsqueeze(1))]))
        try:
            output = self.replica.model(tokens, use_cache=False)
        finally:
            setattr(parent, name, blocks)
        logits: Tensor = output.logits[:, 0]
        return logits

    def chunk_rows(self, n_reads: int = 1) -> int:
        """How many rows have fp32 logits that fit `CHUNK_BYTES`."""
        return max(1, CHUNK_BYTES // (4 * self.d_vocab * n_reads))

    def chunks(self, n_rows: int, n_reads: int = 1) -> Iterator[slice]:
        """Row slices whose fp32 logits fit `CHUNK_BYTES`."""
        size = self.chunk_rows(n_reads)
        for first in range(0, n_rows, size):
            yield slice(first, min(first + size, n_rows))

    @torch.no_grad()
    def token_logits(self, resid: Tensor, tokens: Tensor) -> Tensor:
        """fp32 logits `[row, k]` of `tokens` `[row, k]` for final residuals `[row, d_model]`."""
        if self._direct is None:
            self._direct = self._check(resid[:4], tokens[:4])
        if self._direct:
            return self._direct_logits(resid, tokens)
        return self._gathered(resid, tokens)

    def _gathered(self, resid: Tensor, tokens: Tensor) -> Tensor:
        parts = [
            self.logits(resid[rows]).float().gather(1, tokens[rows])
            for rows in self.chunks(len(resid))
        ]
        return torch.cat(parts) if parts else resid.new_zeros(tokens.shape)

    def _direct_logits(self, resid: Tensor, tokens: Tensor) -> Tensor:
        assert self._norm is not None
        assert self._unembed is not None
        unembedding = Unembedding(
            self._unembed.weight.detach(),  # type: ignore[operator]
            getattr(self._unembed, "bias", None),
            self._scale,
            self._softcap,
        )
        # the model's own norm, whatever kind it is
        return answer_logits(self._norm(resid), unembedding, tokens)

    def _check(self, resid: Tensor, tokens: Tensor) -> bool:
        if self._norm is None or self._unembed is None:
            return False
        if not isinstance(getattr(self._unembed, "weight", None), Tensor):
            return False
        whole = self._gathered(resid, tokens)
        tolerance = 1e-4 if resid.dtype == torch.float32 else 0.1
        return bool(torch.allclose(self._direct_logits(resid, tokens), whole, atol=tolerance))


class _StandIn(nn.Module):
    """A block whose output is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.attention_type = "full_attention"  # some models ask their blocks for it

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output


def _block_list(replica: Replica) -> tuple[nn.Module, str, nn.Module]:
    """The module that holds the list of blocks, the list's name, and the list."""
    for parent in replica.model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList) and tuple(child) == replica.blocks:
                return parent, name, child
    raise Unsupported("the model keeps its blocks in no list")


def _logit_scale(config: Any) -> tuple[float, float | None]:
    """Factor and soft-cap that follow the unembedding, by the names that configs use."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)
