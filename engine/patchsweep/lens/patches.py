"""Patches of a run that is looked at: what they are, and the hooks that do them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.batch import Batch, clean_prompts
from patchsweep.errors import MethodError, PlanError
from patchsweep.hooked import HookedRunner
from patchsweep.identity import intervention_words
from patchsweep.interventions import Direction, Intervention, ValueFn, get_intervention
from patchsweep.pairs import PromptPairs
from patchsweep.request import Request, make_request, model_shape
from patchsweep.sites import SITES, Site, get_sites

Sublayer = tuple[Literal["attn", "mlp"], int]
Hook = tuple[str, Callable[[Tensor, Any], Tensor]]


@dataclass(frozen=True)
class Patch:
    """Values put in place of a run's own, at one place; several act together in one run."""

    site: str  # such as z or mlp_out, see `patchsweep.sites`
    layer: int | Sequence[int] | None = None  # several: all at once; None: a site of no layer
    pos: int | str = "all"  # a position, a label of the pairs, or all
    head: int | Sequence[int] | None = None  # or key head, or neuron of mlp_post; None: all
    intervention: str | Intervention | float | Tensor | ValueFn = "resample"

    def told(self) -> dict[str, Any]:
        """The patch as JSON takes it; values of the user's own by their name alone."""
        given = self.intervention
        name = given if isinstance(given, str | float | int) else getattr(given, "name", "custom")
        return {
            "site": self.site,
            "layer": _plain(self.layer),
            "pos": self.pos,
            "head": _plain(self.head),
            "intervention": name,
        }

    def identity(self) -> dict[str, Any]:
        """The patch as JSON takes it; values by their content, or by name and version."""
        values = intervention_words(get_intervention(self.intervention))
        return {**self.told(), "intervention": values}


def removal(model: TransformerBridge, remove: Any) -> Patch:
    """The patch that zeroes a sublayer's write, after any norm of its own.

    Raises:
        PlanError: `remove` is no sublayer of the model.
        MethodError: the model has no hook for it.
    """
    n_layers = model_shape(model).n_layers
    named = isinstance(remove, Sequence) and not isinstance(remove, str) and len(remove) == 2
    if not named or remove[0] not in ("attn", "mlp"):
        raise PlanError(
            f"remove={remove!r} is no sublayer; write ('attn', layer) or ('mlp', layer)"
        )
    kind, layer = remove
    if not isinstance(layer, int) or not 0 <= layer < n_layers:
        raise PlanError(f"remove={remove!r}: there is no such layer; use 0..{n_layers - 1}")
    hook = SITES[f"{kind}_out"].hook_name(layer)
    if hook not in model.hook_dict:
        raise MethodError(
            f"remove={remove!r}: this model has no hook {hook}; choose another sublayer"
        )
    return Patch(f"{kind}_out", layer, intervention="zero")


class Patching:
    """Patches of the base runs of `pairs`, checked; `hooks` does them in a batch.

    Resampled values come from the other prompt of the pair. All values are made from unpatched
    runs, also where one patch lies behind another.

    Raises:
        PatchsweepError: a patch is not one that the model or the pairs have.
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
        """See that the sites can be patched here, and make what values come from, such as means.

        Raises:
            SiteError: a hook of a site does nothing in this model.
        """
        for request in self.requests:
            batches = request.batches(range(len(request.pairs)))
            self.runner.check(batches[0].base[:1])
            clean = clean_prompts(batches, request.direction)
            request.intervention.prepare(clean, self.runner.activations)

    def hooks(self, batch: Batch) -> list[Hook]:
        """Hooks under which a run of `batch.base` is patched."""
        base = self.runner.activations(batch.base)
        sources: dict[bool, Mapping[str, Sequence[Tensor]]] = {}
        found: list[Hook] = []
        for request in self.requests:
            (plan,) = request.plans
            shuffled = request.source_of is not None
            if shuffled not in sources:
                (own,) = request.batches(batch.pairs)
                sources[shuffled] = self.runner.activations(own.source)
            patches = plan.patches(batch.pairs)  # a shorter prompt may not have the position
            spans = {
                batch.local[pair]: slice(start, stop)
                for pair, start, stop in zip(
                    plan.pair[patches].tolist(),
                    plan.start[patches].tolist(),
                    plan.stop[patches].tolist(),
                    strict=True,
                )
            }
            units = None if plan.axes.units is None else list(plan.axes.units[0])
            n_units = 1 if units is None else request.shape.n_units(plan.site)
            for layer in plan.axes.layers[0]:
                name = plan.site.name
                new = request.intervention.values(
                    plan.site, layer, base[name][layer], sources[shuffled][name][layer], batch.spans
                )
                write = _write_pattern if plan.site.is_pattern else _write
                found.append((plan.site.hook_name(layer), write(new, spans, units, n_units)))
        return found

    @contextmanager
    def heads_shown(self) -> Iterator[None]:
        """Inside, the model computes each head's result, if a patch is of those."""
        wanted = "result" in {site.name for site in self.runner.sites}
        before = bool(getattr(self.model.cfg, "use_attn_result", False))
        if wanted and not before:
            self.model.set_use_attn_result(True)
        try:
            yield
        finally:
            if wanted and not before:
                self.model.set_use_attn_result(False)


def _request(
    model: TransformerBridge, pairs: PromptPairs, patch: Patch, direction: Direction
) -> Request:
    """The patch as a sweep of one patch for each pair."""
    if not isinstance(patch, Patch):
        raise PlanError(f"patch={patch!r} is no Patch; write Patch(site='z', layer=3, head=1)")
    (site,) = get_sites([patch.site])
    if site.name == "pattern_cell":
        raise PlanError("a lens patches rows of a pattern, not cells; use site='pattern'")
    if site.layered and patch.layer is None:
        raise PlanError(f"a patch of {site.name} needs a layer; give one, such as layer=3")
    if patch.head is not None and site.unit is None:
        raise PlanError(f"site {site.name} has no heads; leave head out for it")
    units: Any = "all" if patch.head is None else [_set(patch.head)]
    return make_request(
        model,
        pairs,
        patch.site,
        direction=direction,
        intervention=patch.intervention,
        layers=[_set(patch.layer)] if patch.layer is not None and site.layered else None,
        positions="all" if patch.pos == "all" else [patch.pos],
        heads=None if site.unit == "neuron" else units,
        neurons=units if site.unit == "neuron" else None,
    )


def _write(
    new: Tensor, spans: Mapping[int, slice], units: list[int] | None, n_units: int
) -> Callable[[Tensor, Any], Tensor]:
    """A hook that puts `new` `[pair, pos, width]` into its spans, in the given units alone."""

    # in place, so that a residual stream is replaced for every reader of it
    def patch(x: Tensor, hook: Any) -> Tensor:
        for row, span in spans.items():
            own = x[row].reshape(len(x[row]), -1)
            put = new[row].to(own)
            parts = [rearrange(t, "pos (unit d) -> pos unit d", unit=n_units) for t in (own, put)]
            which = slice(None) if units is None else units
            parts[0][span, which] = parts[1][span, which]
            x[row] = parts[0].reshape(x[row].shape)
        return x

    return patch


def _write_pattern(
    new: Tensor, spans: Mapping[int, slice], units: list[int] | None, n_units: int
) -> Callable[[Tensor, Any], Tensor]:
    """A hook that puts `new` `[pair, head, dest, src]` into the rows `dest` of its spans."""

    def patch(x: Tensor, hook: Any) -> Tensor:
        which = slice(None) if units is None else units
        for row, span in spans.items():
            x[row, which, span] = new[row, which, span].to(x)
        return x

    return patch


def _set(given: int | Sequence[int]) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)


def _plain(given: int | Sequence[int] | None) -> int | list[int] | None:
    return given if given is None or isinstance(given, int) else list(given)
