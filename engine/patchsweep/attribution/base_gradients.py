"""Gradients on the base run: the estimates of all patches, and what adaptive runs need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patchsweep.attribution.estimates import Estimates, Work, backward_each
from patchsweep.forward.grad import Place
from patchsweep.spec.sites import SITES, Site

STREAM: tuple[Site, ...] = (SITES["resid_pre"], SITES["resid_post"])


@dataclass(frozen=True)
class BaseGradients:
    """Gradients of each metric on the base run of one batch."""

    estimates: Estimates  # of the swept sites: atp
    stream: list[Float[Tensor, "metric pair pos d_model"]]  # at each block's input; + final
    z: list[Float[Tensor, "metric pair head pos d_v"]]  # at each block's attention output
    base_logits: Float[Tensor, "pair read d_vocab"]


def base_gradients(work: Work) -> BaseGradients:
    """Return the gradients at the base run, from one forward and one backward pass per metric.

    The gradient model must hold the sites `STREAM` besides the swept ones.
    """
    estimates = work.empty()
    n_metrics, n_layers = len(work.metrics), work.shape.n_layers
    swept = {site.name for site in work.sites}
    stream: list[list[Tensor]] = [[] for _ in range(n_layers + 1)]
    z: list[list[Tensor]] = [[] for _ in range(n_layers)]

    def add_hook(place: Place, x: Tensor) -> None:
        # x holds the hook, so a hook that held x would keep both alive for ever
        base = x.detach()
        name, layer = place.site.name, place.layer + place.site.shift
        final = name == "resid_post" and layer == n_layers
        kept = stream[layer] if name == "resid_pre" or final else None

        def on_gradient(grad: Tensor) -> None:
            if kept is not None:
                kept.append(place.flat(grad).detach())
            if name in swept:
                flat = place.flat(base)
                values = work.values(place.site, place.layer, flat)
                estimates.add(place, values, flat, place.flat(grad))

        x.register_hook(on_gradient)

    def on_output(layer: int, x: Tensor) -> None:
        x.register_hook(lambda grad: z[layer].append(grad.detach()))

    own = tuple(site for site in STREAM if site.name not in swept)
    with torch.enable_grad():
        logits = work.tape.forward(
            work.batch.base,
            add_hook,
            work.batch.reads,
            sites=(*work.sites, *own),
            gradient=True,
            on_output=on_output,
        )
    backward_each(work.score(logits, logits.detach()), estimates)
    assert all(len(of_layer) == n_metrics for of_layer in (*stream, *z))
    return BaseGradients(
        estimates,
        [torch.stack(of_layer) for of_layer in stream],
        [torch.stack(of_layer) for of_layer in z],
        logits.detach(),
    )
