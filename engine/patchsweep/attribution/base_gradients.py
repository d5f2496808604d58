"""Gradients on the base run: the estimates of all patches, and what adaptive runs need."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.attribution.atp import differentiable_run
from patchsweep.attribution.estimates import Estimates, Work, backward_each
from patchsweep.forward.grad import Gradients, Place
from patchsweep.spec.sites import SITES, Site

STREAM: tuple[Site, ...] = (SITES["resid_pre"], SITES["resid_post"])


def base_gradients(work: Work) -> tuple[Estimates, Gradients]:
    """Return the estimates of `atp`, and the gradients in the stream and at attention's output.

    One forward and one backward pass per metric. The gradient model must hold the sites `STREAM`
    besides the swept ones. Gradients before the first token that runs are 0: nothing changes there.
    """
    return _gradients(work)


def run_gradients(
    work: Work,
    layer: int,
    resid: Float[Tensor, "row pos d_model"],
    base_logits: Float[Tensor, "pair read d_vocab"],
) -> Gradients:
    """Return the gradients on runs that begin with `resid` at the input of block `layer`.

    They are 0 below that block. `resid` holds a multiple of the batch's rows, and metrics take
    references from `base_logits`, the base run's.
    """
    return _gradients(work, layer, {layer: resid.detach().requires_grad_()}, base_logits)[1]


def _gradients(
    work: Work,
    first: int = 0,
    entries: Mapping[int, Tensor] | None = None,
    base_logits: Tensor | None = None,
) -> tuple[Estimates, Gradients]:
    estimates = work.empty()
    n_metrics, n_layers = len(work.metrics), work.shape.n_layers
    stream: list[list[Tensor]] = [[] for _ in range(n_layers + 1)]
    z: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def padded(grad: Tensor) -> Tensor:  # [..., pos, d]
        return torch.nn.functional.pad(grad, (0, 0, work.start, 0))

    def on_gradient(place: Place, grad: Tensor) -> None:
        layer = place.layer + place.site.shift
        final = place.site.name == "resid_post" and layer == n_layers
        if place.site.name == "resid_pre" or final:
            stream[layer].append(padded(grad))

    def on_output(layer: int, x: Tensor) -> None:
        x.register_hook(lambda grad: z[layer].append(padded(grad.detach())))

    logits = differentiable_run(
        work,
        estimates,
        (*work.sites, *(site for site in STREAM if site not in work.sites)),
        on_output=on_output,
        on_gradient=on_gradient,
        entries=entries,
    )
    references = logits.detach() if base_logits is None else base_logits
    with torch.enable_grad():
        backward_each(work.score(logits, references), estimates)
    assert all(len(of_layer) == n_metrics for of_layer in (*stream[first:], *z[first:]))
    return estimates, Gradients(*(_stacked(of_layers, first) for of_layers in (stream, z)))


def _stacked(of_layers: list[list[Tensor]], first: int) -> list[Tensor]:
    """Return one tensor `[metric, ...]` a layer; zeros, which take no memory, below `first`."""
    made = [torch.stack(of_layer) for of_layer in of_layers[first:]]
    return [made[0].new_zeros(()).expand(made[0].shape)] * first + made
