"""Predictions read from streams, by the model's own final norm and unembedding."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from patchsweep.analyses.logit_lens.stream import Streams
from patchsweep.spec.batch import Batch

# a chunk of fp32 logits stays within this many bytes
CHUNK_BYTES = 32 * 2**20


@torch.no_grad()
def read_streams(
    model: TransformerBridge, streams: Streams, batch: Batch, top: int
) -> dict[str, NDArray[Any]]:
    """Per name `[place, pair, pos]` (`top_*`: and top), a chunk of rows at a time.

    `answer_*` and `wrong_*`: probability, its log in nats, and rank (tokens above it) of each
    answer's first token that the other one does not have there; `top_id` and `top_prob`: the `top`
    most probable tokens.
    """
    stack = torch.stack([x.to(batch.base.device) for x in streams.values()])
    lead = stack.shape[:-1]
    rows = stack.reshape(-1, stack.shape[-1])
    right, wrong = (
        ids.gather(1, batch.differ.unsqueeze(1)).expand(lead[1:]).expand(lead).reshape(-1)
        for ids in (batch.answer, batch.wrong)
    )
    size = max(1, CHUNK_BYTES // (4 * int(model.cfg.d_vocab)))
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, len(rows), size):
        chunk = slice(first, first + size)
        unembed = logit_readout(model, rows[chunk], chunk_size=size)
        logits = unembed.values.float()
        log_z = logits.logsumexp(dim=-1, keepdim=True)
        best = logits.topk(top, dim=-1)
        found = {"top_id": best.indices, "top_prob": (best.values - log_z).exp()}
        for kind, ids in (("answer", right), ("wrong", wrong)):
            own = logits.gather(1, ids[chunk].to(logits.device).unsqueeze(1))
            log_prob = (own - log_z).squeeze(1)
            found |= {
                f"{kind}_log_prob": log_prob,
                f"{kind}_prob": log_prob.exp(),
                f"{kind}_rank": (logits > own).sum(dim=-1).float(),
            }
        for name, values in found.items():
            parts.setdefault(name, []).append(values.cpu())
    return {
        name: torch.cat(values).reshape(*lead, *values[0].shape[1:]).numpy()
        for name, values in parts.items()
    }
