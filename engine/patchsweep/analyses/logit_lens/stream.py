"""Captures the residual stream at every place of a run, and checks that the lens can read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from patchsweep.analyses.logit_lens.patches import Sublayer
from patchsweep.errors import MethodError, ModelError
from patchsweep.runners.hook_points import Hook, forward
from patchsweep.spec.spec import model_shape

POINTS = ("resid_pre", "resid_mid", "resid_post")
# largest difference between log-probabilities from the last place and the model's own, as a share
# of their range; rounding gives 1e-6 (1e-2 in bf16), a missing step about 1
TOLERANCE = 0.1

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
    streams: Streams = {}

    def keep(place: Place) -> Any:
        return lambda x, hook: streams.update({place: x.detach().clone()})

    known = model.hook_dict
    keep_hooks = [
        (f"blocks.{layer}.hook_{point}", keep((layer, point)))
        for layer, point in places
        if f"blocks.{layer}.hook_{point}" in known
    ]
    logits = forward(model, tokens, hooks, keep_hooks)
    _check_finite(streams)
    _check_readout(model, streams[n_layers - 1, "resid_post"][:, -1], logits[:, -1])
    return streams


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
