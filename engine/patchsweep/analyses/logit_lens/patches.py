"""Patches of a run that the lens reads: their arguments, and the hooks that apply them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import is_whole
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import MethodError, PlanError
from patchsweep.runners.hook_points import Hook
from patchsweep.runners.hooked import HookedRunner
from patchsweep.spec.batch import Batch, clean_prompts
from patchsweep.spec.interventions import Direction, values_of
from patchsweep.spec.sites import SITES, Site, get_sites
from patchsweep.spec.spec import Request, SweepSpec, make_request, model_shape
from patchsweep.sweeps.patches import Patch

Sublayer = tuple[Literal["attn", "mlp"], int]


def removal(model: TransformerBridge, remove: Any) -> Patch:
    """Return the patch that zeroes a sublayer's output, after the sublayer's own norm if any.

    Raises:
        PlanError: `remove` is not a sublayer of the model.
        MethodError: the model has no hook for it.
    """
    n_layers = model_shape(model).n_layers
    named = isinstance(remove, Sequence) and not isinstance(remove, str) and len(remove) == 2
    if not named or remove[0] not in ("attn", "mlp"):
        raise PlanError(
            f"remove={remove!r} is no sublayer; write ('attn', layer) or ('mlp', layer)"
        )
    kind, layer = remove
    if not is_whole(layer) or not 0 <= layer < n_layers:
        raise PlanError(f"remove={remove!r}: there is no such layer; use 0..{n_layers - 1}")
    hook = SITES[f"{kind}_out"].hook_name(layer)
    if hook not in model.hook_dict:
        raise MethodError(
            f"remove={remove!r}: this model has no hook {hook}; choose another sublayer"
        )
    return Patch(f"{kind}_out", layer, intervention="zero")


class Patching:
    """Checked patches of the base runs of `pairs`; `hooks` applies them to a batch.

    Resampled values come from the other prompt of the pair. All values come from unpatched runs,
    also for a patch downstream of another.

    Raises:
        PatchsweepError: the model or the pairs lack the place of a patch.
    """

    def __init__(
        self,
        model: TransformerBridge,
        pairs: PromptPairs,
        patches: Sequence[Patch],
        direction: Direction,
    ) -> None:
        self.model = model
        self.requests = [_request(model, pairs, patch, direction) for patch in patches]
        sites: dict[str, Site] = {s.name: s for request in self.requests for s in request.sites}
        self.runner = HookedRunner(model, list(sites.values()))

    def prepare(self) -> None:
        """Check that the sites' hooks have an effect, and prepare interventions, such as means.

        Raises:
            SiteError: a hook of a site has no effect in this model.
        """
        for request in self.requests:
            batches = request.batches(range(len(request.pairs)))
            self.runner.check(batches[0].base[:1])
            clean = clean_prompts(batches, request.direction)
            request.intervention.prepare(clean, self.runner.activations)

    def hooks(self, batch: Batch) -> list[Hook]:
        """Return the hooks that patch a run of `batch.base`."""
        base = self.runner.activations(batch.base)
        sources: dict[bool, Mapping[str, Sequence[Tensor]]] = {}
        hooks: list[Hook] = []
        for request in self.requests:
            (plan,) = request.plans
            shuffled = request.source_of is not None
            if shuffled not in sources:
                (source_batch,) = request.batches(batch.pairs)
                sources[shuffled] = self.runner.source(source_batch)
            name = plan.site.name
            values = [
                values_of(request.intervention, plan.site, layer, b, s, batch.spans)
                for layer, (b, s) in enumerate(
                    zip(base[name], sources[shuffled][name], strict=True)
                )
            ]
            patches = plan.patches(batch.pairs)  # a shorter prompt may not have the position
            rows = np.array([batch.local[pair] for pair in plan.pair[patches].tolist()], np.int64)
            hooks += self.runner.patch_hooks(batch, values, plan, patches, rows)
        return hooks


def _request(
    model: TransformerBridge, pairs: PromptPairs, patch: Patch, direction: Direction
) -> Request:
    """Return the request of a sweep with this one patch per pair."""
    if not isinstance(patch, Patch):
        raise PlanError(f"patch={patch!r} is no Patch; write Patch(site='z', layer=3, head=1)")
    (site,) = get_sites([patch.site])
    if site.cells:
        raise PlanError("a lens patches rows of a pattern, not cells; use site='pattern'")
    if site.layered and patch.layer is None:
        raise PlanError(f"a patch of {site.name} needs a layer; give one, such as layer=3")
    if patch.head is not None and site.unit is None:
        raise PlanError(f"site {site.name} has no heads; leave head out for it")
    if not isinstance(patch.pos, str) and not is_whole(patch.pos):
        raise PlanError(f"pos={patch.pos!r} must be a position, a label of the pairs, or 'all'")
    positions: Any = "all" if patch.pos == "all" else [patch.pos]
    units: Any = "all" if patch.head is None else [patch.head]
    return make_request(
        model,
        pairs,
        SweepSpec(
            patch.site,
            direction=direction,
            intervention=patch.intervention,
            layers=[patch.layer] if patch.layer is not None and site.layered else None,
            positions=positions,
            heads=None if site.unit == "neuron" else units,
            neurons=units if site.unit == "neuron" else None,
        ),
        aligned=True,
    )
