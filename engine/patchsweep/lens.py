"""The lens: what the model would predict if it stopped at each place of the residual stream.

Every place is read through the model's own final norm and unembedding, by TransformerLens's
`logit_readout`. One sublayer's write can be removed from the run first, which asks whether it is
that sublayer that brings the answer in.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis.logit_lens import logit_readout

from patchsweep.batch import Batch, make_batches
from patchsweep.errors import MethodError, PlanError
from patchsweep.interventions import Direction
from patchsweep.pairs import PromptPairs
from patchsweep.request import device_of, model_shape
from patchsweep.results import model_provenance

Which = Literal["base", "source"]
Sublayer = tuple[Literal["attn", "mlp"], int]
POINTS = ("resid_pre", "resid_mid", "resid_post")
WRITES = {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}
# a chunk of fp32 logits stays within this many bytes
CHUNK_BYTES = 32 * 2**20
# tokens of prompts that run together
MAX_TOKENS = 2048
# largest difference between the last place read and the model's own log-probabilities, as a
# share of their range; rounding gives 1e-6 (1e-2 in bf16), a step left out about 1
TOLERANCE = 0.1


def lens(
    model: TransformerBridge,
    pairs: PromptPairs,
    *,
    which: Which = "base",
    direction: Direction = "denoising",
    remove: Sublayer | None = None,
    top: int = 5,
) -> xr.Dataset:
    """Predictions from every place of the stream, dims [pair, layer, point, pos(, top)].

    Points are `resid_pre` (before attention), `resid_mid` (before the MLP) and `resid_post`;
    parallel blocks have no `resid_mid`. Variables: `top_token` (text) and `top_prob`;
    `answer_prob`, `answer_log_prob` (nats) and `answer_rank` (tokens above it, 0 is the best),
    and the same of the wrong answer as `wrong_*`. Of answers of several tokens the first is
    read. NaN, or "", beyond a prompt's end and where there is no such point.

    Args:
        which: the run to look at; with `direction="denoising"` the base is the corrupted prompt
            and the source the clean one.
        remove: a sublayer whose write is zeroed, such as `("mlp", 19)`; the run goes on without.
        top: how many of the most probable tokens to keep.

    Raises:
        PlanError: an argument is out of range.
        MethodError: the model's stream is not what its final norm and unembedding read.
    """
    _check(model, which, direction, remove, top)
    n_layers = int(model.cfg.n_layers)
    length = max(len(pair.clean) + len(pair.answer) - 1 for pair in pairs)
    shape = (len(pairs), n_layers, len(POINTS), length)
    numbers = {
        f"{kind}_{name}": np.full(shape, np.nan, np.float32)
        for kind in ("answer", "wrong")
        for name in ("prob", "log_prob", "rank")
    }
    numbers["top_prob"] = np.full((*shape, top), np.nan, np.float32)
    ids = np.full((*shape, top), -1)
    token = np.full((len(pairs), length), "", dtype=object)
    tokenizer: Any = model.tokenizer
    for batch in _batches(model, pairs, direction):
        tokens = batch.base if which == "base" else batch.source
        rows, n_pos = list(batch.pairs), batch.length
        for row, members in zip(rows, tokens.tolist(), strict=True):
            token[row, :n_pos] = [tokenizer.decode([i]) for i in members]
        streams = _run(model, tokens, remove)
        found = _read(model, streams, batch, top)
        for (layer, point), index in _places(streams, n_layers).items():
            for name, values in numbers.items():
                values[rows, layer, point, :n_pos] = found[name][index]
            ids[rows, layer, point, :n_pos] = found["top_id"][index]
    names = {i: tokenizer.decode([i]) for i in np.unique(ids).tolist() if i >= 0} | {-1: ""}
    dims = ("pair", "layer", "point", "pos")
    return xr.Dataset(
        {
            "top_token": ((*dims, "top"), np.vectorize(names.get, otypes=[object])(ids)),
            **{
                name: ((*dims, "top") if name == "top_prob" else dims, values)
                for name, values in numbers.items()
            },
        },
        coords={
            "pair": np.arange(len(pairs)),
            "layer": np.arange(n_layers),
            "point": np.array(POINTS, dtype=object),
            "pos": np.arange(length),
            "token": (("pair", "pos"), token),
            "answer": ("pair", _strings([pair.answer_text for pair in pairs])),
            "wrong_answer": ("pair", _strings([pair.wrong_answer_text for pair in pairs])),
        },
        attrs={
            "patchsweep_version": version("patchsweep"),
            "method": "lens",
            "which": which,
            "direction": direction,
            "removed": "" if remove is None else f"{remove[0]} {remove[1]}",
            "provenance": model_provenance(model),
        },
    )


def _check(model: TransformerBridge, which: Any, direction: Any, remove: Any, top: Any) -> None:
    shape = model_shape(model)
    if which not in ("base", "source"):
        raise PlanError(f"which={which!r} is no run of a pair; use 'base' or 'source'")
    if direction not in ("denoising", "noising"):
        raise PlanError(
            f"direction={direction!r} is not known; use 'denoising' (base is the corrupted "
            "prompt) or 'noising' (base is the clean prompt)"
        )
    if not isinstance(top, int) or not 1 <= top <= shape.d_vocab:
        raise PlanError(f"top={top} tokens of {shape.d_vocab}; use 1..{shape.d_vocab}")
    if remove is not None:
        if not isinstance(remove, Sequence) or len(remove) != 2 or remove[0] not in WRITES:
            raise PlanError(
                f"remove={remove!r} is no sublayer; write ('attn', layer) or ('mlp', layer)"
            )
        kind, layer = remove
        if not isinstance(layer, int) or not 0 <= layer < shape.n_layers:
            raise PlanError(
                f"remove={remove!r}: there is no such layer; use 0..{shape.n_layers - 1}"
            )
        if f"blocks.{layer}.{WRITES[kind]}" not in model.hook_dict:
            raise MethodError(
                f"remove={remove!r}: this model has no {WRITES[kind]} in block {layer}; choose "
                "another sublayer"
            )
    try:  # what TransformerLens refuses, it refuses here, before a prompt runs
        logit_readout(model, torch.zeros(1, shape.d_model), top_k=1)
    except (ValueError, NotImplementedError) as error:
        raise MethodError(f"the lens cannot read {model.cfg.model_name}: {error}") from error


def _batches(model: TransformerBridge, pairs: PromptPairs, direction: Direction) -> list[Batch]:
    longest = max(len(pair) for pair in pairs)
    size = max(1, MAX_TOKENS // longest)
    device = device_of(model)
    return [
        batch
        for first in range(0, len(pairs), size)
        for batch in make_batches(
            pairs, range(first, min(first + size, len(pairs))), direction, -1, device
        )
    ]


@torch.no_grad()
def _run(
    model: TransformerBridge, tokens: Int[Tensor, "pair pos"], remove: Sublayer | None
) -> dict[tuple[int, str], Float[Tensor, "pair pos d_model"]]:
    """The stream at each place, (layer, point); resid_post of the last layer alone, since it is
    the next one's resid_pre elsewhere.

    Raises:
        MethodError: the last place does not give the model's own predictions, or the write could
            not be removed.
    """
    n_layers = int(model.cfg.n_layers)
    wanted = [(layer, point) for layer in range(n_layers) for point in POINTS[:2]]
    wanted.append((n_layers - 1, "resid_post"))
    kept: dict[tuple[int, str], Tensor] = {}

    def keep(place: tuple[int, str]) -> Any:
        return lambda x, hook: kept.update({place: x.detach().clone()})

    hooks = [
        (f"blocks.{layer}.hook_{point}", keep((layer, point)))
        for layer, point in wanted
        if f"blocks.{layer}.hook_{point}" in model.hook_dict
    ]
    if remove is not None:
        kind, at = remove
        hooks.insert(0, (f"blocks.{at}.{WRITES[kind]}", lambda x, hook: torch.zeros_like(x)))
    logits: Tensor = model.run_with_hooks(tokens, fwd_hooks=hooks)
    _check_readout(model, kept[n_layers - 1, "resid_post"][:, -1], logits[:, -1])
    if remove is not None:
        _check_removed(kept, remove, n_layers)
    return kept


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


def _check_removed(kept: dict[tuple[int, str], Tensor], remove: Sublayer, n_layers: int) -> None:
    kind, layer = remove
    last = (layer, "resid_post") if layer == n_layers - 1 else (layer + 1, "resid_pre")
    middle = (layer, "resid_mid")
    before, after = ((layer, "resid_pre"), middle) if kind == "attn" else (middle, last)
    if before in kept and after in kept and not torch.equal(kept[before], kept[after]):
        raise MethodError(
            f"remove={remove!r}: zeroing {WRITES[kind]} does not take the write out of this "
            "model's stream"
        )


def _places(streams: dict[tuple[int, str], Tensor], n_layers: int) -> dict[tuple[int, int], int]:
    """(layer, number of the point) -> which of `streams` it is."""
    index = {place: i for i, place in enumerate(streams)}
    for layer in range(n_layers - 1):
        index[layer, "resid_post"] = index[layer + 1, "resid_pre"]
    return {(layer, POINTS.index(point)): i for (layer, point), i in index.items()}


@torch.no_grad()
def _read(
    model: TransformerBridge,
    streams: dict[tuple[int, str], Tensor],
    batch: Batch,
    top: int,
) -> dict[str, NDArray[Any]]:
    """Per name `[place, pair, pos]` (`top_*`: and top), a chunk of rows at a time."""
    stack = torch.stack([x.to(batch.base.device) for x in streams.values()])
    lead = stack.shape[:-1]
    rows = stack.reshape(-1, stack.shape[-1])
    right, wrong = (
        ids[:, :1].expand(lead[1:]).expand(lead).reshape(-1) for ids in (batch.answer, batch.wrong)
    )
    size = max(1, CHUNK_BYTES // (4 * int(model.cfg.d_vocab)))
    parts: dict[str, list[Tensor]] = {}
    for first in range(0, len(rows), size):
        chunk = slice(first, first + size)
        readout = logit_readout(model, rows[chunk], chunk_size=size)
        logits = readout.values.float()
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


def _strings(values: Any) -> NDArray[Any]:
    return np.array(values, dtype=object)
