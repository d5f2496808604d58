"""The oracle: one full forward pass per patch, through the bridge, by a hook."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from patchsweep.spec.batch import Batch
from patchsweep.spec.interventions import Intervention
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import Site
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


def hook_of(model: TransformerBridge, site: Site, layer: int) -> str:
    name = site.hook_name(layer)
    return name if name in model.hook_dict else name.replace("hook_rot_", "hook_")


def site_values(model: TransformerBridge, site: Site, tokens: Tensor) -> list[Tensor]:
    """Per layer the activation as the hook sees it, one prompt after the other."""
    layers = range(model.cfg.n_layers if site.layered else 1)
    found: dict[str, Tensor] = {}
    hooks = [
        (hook_of(model, site, layer), lambda x, hook, layer=layer: found.update({layer: x.clone()}))
        for layer in layers
    ]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert len(found) == len(layers), f"{site.name} never fired"
    return [found[layer] for layer in layers]


def oracle_activations(model: TransformerBridge, site: Site):
    """What `Intervention.prepare` asks for."""

    def activations(tokens: Tensor) -> dict[str, list[Tensor]]:
        found = site_values(model, site, tokens)
        return {site.name: found if site.name == "pattern" else [x.flatten(2) for x in found]}

    return activations


def donors(
    model: TransformerBridge, site: Site, batch: Batch, intervention: Intervention
) -> list[Tensor]:
    base = site_values(model, site, batch.base)
    source = site_values(model, site, batch.source)
    values = []
    for layer, (b, s) in enumerate(zip(base, source, strict=True)):
        if site.name == "pattern":
            values.append(intervention.values(site, layer, b, s, batch.spans))
        else:
            flat = intervention.values(site, layer, b.flatten(2), s.flatten(2), batch.spans)
            values.append(flat.reshape(b.shape))
    return values


def loop_logit_diff(
    model: TransformerBridge,
    plan: SitePlan,
    batch: Batch,
    values: list[Tensor],
    patches: Iterable[int],
) -> np.ndarray:
    """logit_diff of every patch; the patched span comes from the plan's axes, not its pruning."""
    results = []
    for patch in patches:
        pair = batch.local[int(plan.pair[patch])]
        _, layer_set, pos, unit = np.unravel_index(plan.cell[patch], plan.shape)
        axis = plan.axes.positions
        span = slice(None) if axis is None else slice(axis[pos], axis[pos] + 1)
        units = slice(None) if plan.axes.units is None else list(plan.axes.units[unit])

        def patch_in(x: Tensor, hook: object, layer: int, pair=pair, span=span, units=units):
            new = values[layer][pair]
            if plan.site.name == "pattern":
                x[0, units, span] = new[units, span]
            elif plan.axes.units is None:
                x[0, span] = new[span]
            elif plan.site.unit == "neuron":
                x[0, span, units] = new[span, units]
            else:
                x[0, span, units] = new[span, units]
            return x

        hooks = [
            (hook_of(model, plan.site, layer), lambda x, hook, at=layer: patch_in(x, hook, at))
            for layer in plan.axes.layers[layer_set]
        ]
        with torch.no_grad():
            logits = model.run_with_hooks(batch.base[pair : pair + 1], fwd_hooks=hooks)
        read = logits[0, batch.reads[-1]]
        results.append(float(read[batch.answer[pair, 0]] - read[batch.wrong[pair, 0]]))
    return np.array(results)
