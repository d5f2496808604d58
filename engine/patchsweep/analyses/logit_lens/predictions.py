"""Predictions from residual streams by the model's own final norm and unembedding."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from patchsweep.analyses.logit_lens.stream import Streams
from patchsweep.spec.batch import Batch

# most bytes of a chunk of fp32 logits
CHUNK_BYTES = 32 * 2**20


@torch.no_grad()
def read_streams(
    model: TransformerBridge, streams: Streams, batch: Batch, top: int
) -> dict[str, NDArray[Any]]:
    """Return predictions by name, `[place, pair, pos]`, with a last axis `top` for `top_*`.

    `answer_*` and `wrong_*`: probability, its log in nats, and rank (number of more probable
    tokens) of each answer's first token that differs from the other answer's. `top_id` and
    `top_prob`: the `top` most probable tokens. Logits are computed a chunk of rows at a time.
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
        predictions = {"top_id": best.indices, "top_prob": (best.values - log_z).exp()}
        for kind, ids in (("answer", right), ("wrong", wrong)):
            answer_logits = logits.gather(1, ids[chunk].to(logits.device).unsqueeze(1))
            log_prob = (answer_logits - log_z).squeeze(1)
            predictions |= {
                f"{kind}_log_prob": log_prob,
                f"{kind}_prob": log_prob.exp(),
                f"{kind}_rank": (logits > answer_logits).sum(dim=-1).float(),
            }
        for name, values in predictions.items():
            parts.setdefault(name, []).append(values.cpu())
    return {
        name: torch.cat(values).reshape(*lead, *values[0].shape[1:]).numpy()
        for name, values in parts.items()
    }
