"""Attribution of attention patterns: an estimate for each cell (head, query, key).

Two scores share one gradient (the attribution patching demo of N. Nanda, 2023):

- `zero`: -pattern * gradient, the linearised effect of setting the cell to zero;
- `patch`: (patched pattern - pattern) * gradient, the effect of the intervention's value.

Rows of a pattern sum to one, so a patch of a single cell gives a pattern that the model cannot
produce; the scores show where a head's effect comes from. The sum of `patch` over a row is the
AtP estimate of the site `pattern`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.attribution.atp import Atp
from patchsweep.attribution.check import check_request
from patchsweep.attribution.estimates import Work
from patchsweep.data.pairs import PromptPairs
from patchsweep.forward.grad import GradientModel, Heads, Place
from patchsweep.models.running import runs_model
from patchsweep.spec.batch import Batch, clean_prompts
from patchsweep.spec.finite import check_finite, names_of
from patchsweep.spec.sites import SITES
from patchsweep.spec.spec import MetricLike, Request, SweepSpec, make_request


@dataclass(frozen=True)
class HeadRank:
    """A head with the summed scores of its pattern."""

    layer: int
    head: int
    patch: float  # mean over pairs of the sum over cells, signed
    size: float  # mean over pairs of the sum over cells of |patch|
    dest: str  # query token of the cell with the largest |patch| in the first pair
    src: str  # key token of that cell


@dataclass(frozen=True)
class PatternScores:
    """Scores of every pattern cell; NaN beyond a pair's length."""

    scores: xr.Dataset  # `zero`, `patch` [metric, pair, layer, head, dest, src]

    def heads(self, metric: str | None = None, n: int = 10) -> list[HeadRank]:
        """Return the `n` heads with the largest `size`, largest first."""
        name = str(self.scores["metric"].values[0]) if metric is None else metric
        patch = self.scores["patch"].sel(metric=name).transpose("pair", "layer", "head", ...).values
        signed = np.nansum(patch, axis=(3, 4)).mean(axis=0)
        size = np.nansum(np.abs(patch), axis=(3, 4)).mean(axis=0)
        tokens = [str(token) for token in self.scores["base_token"].values[0]]
        ranks = []
        for cell in np.argsort(-size, axis=None, kind="stable")[:n]:
            layer, head = np.unravel_index(cell, size.shape)
            first_pair = np.nan_to_num(np.abs(patch[0, layer, head]))
            dest, src = np.unravel_index(first_pair.argmax(), first_pair.shape)
            ranks.append(
                HeadRank(
                    layer=int(layer),
                    head=int(head),
                    patch=float(signed[layer, head]),
                    size=float(size[layer, head]),
                    dest=f"{dest} {tokens[dest]!r}",
                    src=f"{src} {tokens[src]!r}",
                )
            )
        return ranks


@runs_model
def pattern_scores(
    model: TransformerBridge,
    pairs: PromptPairs,
    metrics: MetricLike | Sequence[MetricLike] = SweepSpec.metrics,
    **selection: Any,
) -> PatternScores:
    """Return the scores of all cells of all attention patterns, signed, in the metric's unit.

    `selection` may hold `direction`, `intervention` and `read`, as for `sweep`.

    Raises:
        PatchsweepError: an argument breaks a rule; raised before any forward pass.
    """
    request = make_request(model, pairs, SweepSpec("pattern", metrics, **selection))
    check_request(request, [Atp()])
    gradients = GradientModel(model, [SITES["pattern"]], compute_dtype=request.compute_dtype)
    shape = request.shape
    longest = int(request.plans[0].full_lengths.max())
    size = (len(request.metrics), len(pairs), shape.n_layers, shape.n_heads, longest, longest)
    zero, patch = np.full(size, np.nan, np.float32), np.full(size, np.nan, np.float32)
    batches = request.batches(range(len(pairs)))
    request.intervention.prepare(
        clean_prompts(batches, request.direction),
        lambda tokens: gradients.activations(tokens).sites,
    )
    for full_batch in batches:
        for pair in full_batch.pairs:  # [head, dest, src] of all layers: one pair at a time
            batch = request.batches([pair])[0]
            with gradients.frozen():
                _one(request, gradients, batch, zero[:, pair], patch[:, pair])
    dims = ("metric", "pair", "layer", "head", "dest", "src")
    tokens = [
        [*(p.corrupted_tokens if request.direction == "denoising" else p.clean_tokens)][:longest]
        for p in pairs
    ]
    return PatternScores(
        xr.Dataset(
            {"zero": (dims, zero), "patch": (dims, patch)},
            coords={
                "metric": names_of(request.metrics),
                "base_token": (
                    ("pair", "dest"),
                    np.array([row + [""] * (longest - len(row)) for row in tokens], dtype=object),
                ),
            },
        )
    )


def _one(
    request: Request, model: GradientModel, batch: Batch, zero: np.ndarray, patch: np.ndarray
) -> None:
    """Fill `zero` and `patch` `[metric, layer, head, dest, src]` of one pair."""
    source = model.activations(batch.source, batch.reads)
    work = Work(model, batch, request.plans, request.metrics, request.intervention, source)
    n = batch.length

    def visit(metric: int, layer: int, base: Tensor, values: Tensor, grad: Tensor) -> None:
        zero[metric, layer, :, :n, :n] = (-base * grad)[0].cpu().numpy()
        patch[metric, layer, :, :n, :n] = ((values - base) * grad)[0].cpu().numpy()

    visit_cells(work, visit)


# metric, layer, then base pattern, patched pattern and gradient `[pair, head, dest, src]`
VisitCells = Callable[[int, int, Tensor, Tensor, Tensor], None]


def _check_gradient(work: Work, metric: int, layer: int, grad: Tensor) -> None:
    """Raise ModelError if `grad` `[pair, head, dest, src]` holds NaN or infinity."""
    if bool(torch.isfinite(grad).all()):
        return
    check_finite(
        grad.unsqueeze(0).float().cpu().numpy(),
        [work.metrics[metric].name],
        lambda pair, head, dest, src: (
            f"the gradient of pattern at pair {work.batch.pairs[pair]}, layer {layer}, "
            f"head {head}, dest {dest}, src {src}"
        ),
    )


def visit_cells(
    work: Work, visit: VisitCells, on_attention: Callable[[int, Heads], None] | None = None
) -> Float[Tensor, "pair read d_vocab"]:
    """Call `visit` with every layer's pattern and gradient, per metric; return the base logits.

    `on_attention` receives each layer's queries, keys, values and pattern in the forward pass.
    """
    metric = [0]

    def watch_gradient(place: Place, x: Tensor) -> None:
        base = x.detach()

        def on_gradient(grad: Tensor) -> None:
            _check_gradient(work, metric[0], place.layer, grad)
            visit(metric[0], place.layer, base, work.values(place.site, place.layer, base), grad)

        x.register_hook(on_gradient)

    with torch.enable_grad():
        logits = work.forward(
            work.batch.base,
            watch_gradient,
            gradient=True,
            on_attention=on_attention,
        )
        scores = work.score(logits, logits.detach())
        for metric[0], row in enumerate(scores):
            row.sum().backward(retain_graph=metric[0] + 1 < len(scores))
    return logits.detach()
