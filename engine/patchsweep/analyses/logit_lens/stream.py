"""The residual stream at every place of a run, what the model would predict from it, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from patchsweep.analyses.logit_lens.patches import Sublayer
from patchsweep.errors import MethodError, ModelError
from patchsweep.runners.hook_points import Hook, forward, keeping
from patchsweep.spec.batch import Batch
from patchsweep.spec.spec import model_shape

POINTS = ("resid_pre", "resid_mid", "resid_post")
# largest difference between log-probabilities from the last place and the model's own, as a share
# of their range; rounding gives 1e-6 (1e-2 in bf16), a missing step about 1
TOLERANCE = 0.1
# most bytes of a chunk of fp32 logits
CHUNK_BYTES = 32 * 2**20

Place = tuple[int, str]  # layer and point
Streams = dict[Place, Float[Tensor, "pair pos d_model"]]


def check_readable(model: TransformerBridge) -> None:
    """Check that TransformerLens can read a stream of this model; runs no prompt.

    Raises:
        MethodError: TransformerLens cannot.
    """
    try:
        logit_readout(model, torch.zeros(1, model_shape(model).d_model), top_k=1)
    except (ValueError, NotImplementedError) as error:
        raise MethodError(f"the lens cannot read {model.cfg.model_name}: {error}") from error


@torch.no_grad()
def run_streams(
    model: TransformerBridge, tokens: Int[Tensor, "pair pos"], hooks: Sequence[Hook] = ()
) -> Streams:
    """Return the stream at each place of a run under `hooks`.

    `resid_post` is kept only for the last layer; elsewhere it is the next layer's `resid_pre`.

    Raises:
        MethodError: the last place does not give the model's own predictions.
        ModelError: the stream holds NaN or infinity.
    """
    n_layers = int(model.cfg.n_layers)
    places = [(layer, point) for layer in range(n_layers) for point in POINTS[:2]]
    places.append((n_layers - 1, "resid_post"))
    names = {place: f"blocks.{place[0]}.hook_{place[1]}" for place in places}
    kept, reads = keeping(name for name in names.values() if name in model.hook_dict)
    logits = forward(model, tokens, hooks, reads)
    streams: Streams = {place: kept[name] for place, name in names.items() if name in kept}
    _check_finite(streams)
    _check_readout(model, streams[n_layers - 1, "resid_post"][:, -1], logits[:, -1])
    return streams


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


def place_index(streams: Streams, n_layers: int) -> dict[tuple[int, int], int]:
    """Return (layer, index of the point) -> index of the place in `streams`."""
    index = {place: i for i, place in enumerate(streams)}
    for layer in range(n_layers - 1):
        index[layer, "resid_post"] = index[layer + 1, "resid_pre"]
    return {(layer, POINTS.index(point)): i for (layer, point), i in index.items()}


def check_removed(streams: Streams, remove: Sublayer, n_layers: int) -> None:
    """Check that the stream does not change across the removed sublayer.

    Raises:
        MethodError: the stream changes.
    """
    kind, layer = remove
    last = (layer, "resid_post") if layer == n_layers - 1 else (layer + 1, "resid_pre")
    middle = (layer, "resid_mid")
    before, after = ((layer, "resid_pre"), middle) if kind == "attn" else (middle, last)
    captured = before in streams and after in streams
    if captured and not torch.equal(streams[before], streams[after]):
        raise MethodError(
            f"remove={remove!r}: zeroing the hook {kind}_out does not take the write out of this "
            "model's stream"
        )


def _check_finite(streams: Streams) -> None:
    for (layer, point), x in streams.items():
        if not bool(torch.isfinite(x).all()):
            row, pos = torch.nonzero(~torch.isfinite(x).all(dim=-1))[0].tolist()
            raise ModelError(
                f"the residual stream holds NaN or infinity, first in {point} of layer {layer} at "
                f"position {pos} of prompt {row}; check the weights, or load the model in float32 "
                "or bfloat16 if float16 overflows"
            )


def _check_readout(model: TransformerBridge, final: Tensor, logits: Tensor) -> None:
    ours = logit_readout(model, final, return_type="log_probs").values.float()
    theirs = logits.float().log_softmax(dim=-1).to(ours.device)
    spread = float((theirs - theirs.mean(dim=-1, keepdim=True)).abs().max())
    difference = float((ours - theirs).abs().max())
    if not difference <= TOLERANCE * spread:
        raise MethodError(
            f"the final norm and the unembedding of {model.cfg.model_name} do not give its own "
            f"predictions from the last block's output (they differ by {difference:.2g} nats), "
            "so the lens would mislead"
        )
