"""The unembedding: computes logits from final residuals with the model's own modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from patchsweep_kernels.answer_logits import answer_logits
from patchsweep_kernels.checks import check_indices
from patchsweep_kernels.unembedding import Unembedding
from patchsweep_kernels.vocab import log_z, total_variation, vocab_kl
from torch import Tensor, nn

from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.models.memory import free_memory
from patchsweep.models.offload import device_of
from patchsweep.spec.metrics import Sum

# a chunk of logits stays within this many bytes; on a GPU, where each chunk reads the whole
# unembedding, within more, but no more than this share of the free memory
CHUNK_BYTES = 32 * 2**20
GPU_CHUNK_BYTES = 2**30
CHUNK_SHARE = 0.1


class Unembed:
    """Computes logits of final residuals: `[row, d_model]` to `[row, d_vocab]`, or some tokens'.

    Full logits come from the model's own forward pass, in which one block that returns the residual
    replaces all blocks. Some tokens' logits and vocabulary reductions come from the final norm and
    the unembedding directly, if these were checked to give the same logits.
    """

    def __init__(self, unwrapped: UnwrappedModel) -> None:
        self.unwrapped = unwrapped
        self.d_vocab: int = unwrapped.bridge.cfg.d_vocab
        self._norm: Any = unwrapped.module_of(getattr(unwrapped.bridge, "ln_final", None))
        self._unembed: Any = unwrapped.module_of(getattr(unwrapped.bridge, "unembed", None))
        self._scale, self._softcap = _logit_scale(unwrapped.model.config)
        self._direct: bool | None = None

    @torch.no_grad()
    def logits(self, resid: Tensor) -> Tensor:
        """Return logits `[row, d_vocab]` of final residuals `[row, d_model]`; callers chunk."""
        # each row is a prompt of one token, so that learned positions always suffice
        tokens = torch.zeros(len(resid), 1, dtype=torch.long, device=resid.device)
        with self.unwrapped.replacing_blocks([_StandIn(resid.unsqueeze(1))]):
            output = self.unwrapped.model(tokens, use_cache=False)
        logits: Tensor = output.logits[:, 0].to(resid.device)
        return logits

    def checked(self, tokens: Tensor) -> Tensor:
        """Return `tokens`, once they are known to be in the vocabulary; waits for their device.

        Raises:
            ValueError: a token is not.
        """
        check_indices("tokens", tokens, self.d_vocab)
        return tokens

    def chunk_rows(self, n_reads: int = 1) -> int:
        """Return the number of rows whose fp32 logits fit a chunk."""
        device, most = device_of(self.unwrapped.bridge), CHUNK_BYTES
        if device.type == "cuda":
            most = min(GPU_CHUNK_BYTES, max(most, int(CHUNK_SHARE * free_memory(device))))
        return max(1, most // (4 * self.d_vocab * n_reads))

    def chunks(self, n_rows: int, n_reads: int = 1) -> Iterator[slice]:
        """Yield slices of rows whose fp32 logits fit a chunk."""
        size = self.chunk_rows(n_reads)
        for first in range(0, n_rows, size):
            yield slice(first, min(first + size, n_rows))

    @torch.no_grad()
    def token_logits(self, resid: Tensor, tokens: Tensor, *, checked: bool = False) -> Tensor:
        """Return fp32 logits `[row, k]` of `tokens` `[row, k]` for residuals `[row, d_model]`.

        `checked`: `tokens` are known to be in the vocabulary, see `checked`.
        """
        if self.is_direct(resid):
            # the model's own norm module, of any kind
            final = self._norm(resid)
            unembedding, rows = self._rows_of(tokens, final.device, final.dtype)
            return answer_logits(final, unembedding, rows, checked=checked).to(resid.device)
        with self.unwrapped.unembed_in_memory():
            parts = [
                self.logits(resid[rows]).float().gather(1, tokens[rows])
                for rows in self.chunks(len(resid))
            ]
        return torch.cat(parts) if parts else resid.new_zeros(tokens.shape)

    @torch.no_grad()
    def sum_over_vocab(
        self, name: Sum, resid: Tensor, reference: Tensor, reference_row: Tensor
    ) -> Tensor:
        """Return a vocabulary reduction `[row]` of final residuals, fp32, without full logits.

        Row i of `resid` `[row, d_model]` is compared with row `reference_row[i]` of `reference`;
        `log_z` reads neither. Call it only if `is_direct`.
        """
        with self.unwrapped.unembed_in_memory():
            unembedding = self._unembedding()
            device = unembedding.w_u.device
            final = self._norm(resid).to(device)
            if name == "log_z":
                return log_z(final, unembedding).to(resid.device)
            compare = vocab_kl if name.startswith("kl") else total_variation
            base = self._norm(reference).to(device)
            reduced = compare(
                base, final, unembedding, base_row=reference_row.to(device), checked=True
            )
            return reduced.to(resid.device)

    @torch.no_grad()
    def is_direct(self, resid: Tensor) -> bool:
        """Whether final norm and unembedding give the model's logits; tried once, on four rows."""
        if self._direct is None:
            with self.unwrapped.unembed_in_memory():
                self._direct = self._check(resid[:4])
        return self._direct

    def _check(self, resid: Tensor) -> bool:
        if self._norm is None or self._unembed is None:
            return False
        if not isinstance(getattr(self._unembed, "weight", None), Tensor):
            return False
        unembedding = self._unembedding()
        product = nn.functional.linear(
            self._norm(resid).to(unembedding.w_u.device), unembedding.w_u
        )
        direct = unembedding.finish(product.float(), unembedding.bias).to(resid.device)
        full = self.logits(resid).float()
        if direct.shape != full.shape:
            return False
        # 16-bit logits are rounded: the model's at the end, these before bias and soft-cap
        wide = resid.dtype in (torch.float32, torch.float64)
        atol, rtol = (1e-4, 1e-5) if wide else (0.1, 2**-6)
        return bool(torch.allclose(direct, full, atol=atol, rtol=rtol))

    def _unembedding(self) -> Unembedding:
        weight, bias = self._unembed.weight.detach(), getattr(self._unembed, "bias", None)
        return Unembedding(weight, bias, self._scale, self._softcap)

    def _rows_of(
        self, tokens: Tensor, device: torch.device, dtype: torch.dtype
    ) -> tuple[Unembedding, Tensor]:
        """Return an unembedding on `device` in `dtype`, and the rows of `tokens` in it.

        If the weight is offloaded or needs a cast, only the rows of `tokens` are fetched.
        """
        weight = self.unwrapped.values_of(self._unembed, "weight")
        bias = self.unwrapped.values_of(self._unembed, "bias")
        assert weight is not None
        if weight.device == device and not self.unwrapped.is_away(self._unembed):
            return Unembedding(weight, bias, self._scale, self._softcap), tokens
        token_ids, numbers = tokens.cpu().unique(return_inverse=True)

        def rows(x: Tensor) -> Tensor:
            return x[token_ids.to(x.device)].to(device, dtype)

        unembedding = Unembedding(
            rows(weight), None if bias is None else rows(bias), self._scale, self._softcap
        )
        if self.unwrapped.rests_elsewhere(self._unembed):
            self.unwrapped.traffic.n_bytes += (
                unembedding.w_u.numel() * unembedding.w_u.element_size()
            )
        return unembedding, numbers


class _StandIn(nn.Module):
    """A block that returns a fixed output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.attention_type = "full_attention"  # some models read it from their blocks

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output


def _logit_scale(config: Any) -> tuple[float, float | None]:
    """Return the factor and the soft-cap after the unembedding, from known config names."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, None if softcap is None else float(softcap)
