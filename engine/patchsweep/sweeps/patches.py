"""`Patch`: patch values for one place of a run; and the checks of sets of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import index_sets, position_axis
from patchsweep.data.pairs import PromptPairs
from patchsweep.errors import ConfigError, PlanError
from patchsweep.spec.batch import pair_shape
from patchsweep.spec.directions import check_directions
from patchsweep.spec.interventions import (
    Direction,
    Intervention,
    Mean,
    ValueFn,
    check_constant,
    check_labels,
    get_intervention,
    sees_source,
)
from patchsweep.spec.plan import ModelShape, PairShape
from patchsweep.spec.planner import END, span_of
from patchsweep.spec.reference import MeansFrom, check_means, means_attrs, with_reference
from patchsweep.spec.sites import Site, get_sites
from patchsweep.sweeps.identity import intervention_words


@dataclass(frozen=True)
class Patch:
    """Patch values for one site and place of a run; several patches may act in one run."""

    site: str  # such as z or mlp_out, see `patchsweep.spec.sites`
    layer: int | Sequence[int] | None = None  # several: all at once; None: a site without layers
    # a position (negative: from the prompt's end), a label of the pairs or "end", several of them
    # at once, or "all"
    pos: int | str | Sequence[int | str] = "all"
    head: int | Sequence[int] | None = None  # head, key head, or neuron of mlp_post; None: all
    intervention: str | Intervention | float | Tensor | ValueFn = "resample"

    def as_json(self) -> dict[str, Any]:
        """Return the patch as JSON data; a custom intervention only by its name."""
        intervention = self.intervention
        name = (
            intervention
            if isinstance(intervention, str | float | int)
            else getattr(intervention, "name", "custom")
        )
        return {
            "site": self.site,
            "layer": _plain(self.layer),
            "pos": _plain(self.pos),
            "head": _plain(self.head),
            "intervention": name,
        }

    def means(self, pairs: PromptPairs) -> dict[str, Any]:
        """See `reference.means_attrs`."""
        return means_attrs(get_intervention(self.intervention), pairs, get_sites([self.site]))

    def identity(self) -> dict[str, Any]:
        """Return the patch as JSON data; values by content, or by name and version."""
        values = intervention_words(get_intervention(self.intervention))
        return {**self.as_json(), "intervention": values}


def _plain(given: Any) -> Any:
    return given if given is None or isinstance(given, int | str) else list(given)


@dataclass(frozen=True)
class CheckedPatch:
    """A patch whose arguments fit the model."""

    site: int  # index into the request's sites
    layers: tuple[int, ...]
    positions: tuple[int | str, ...] | None  # None: all
    units: tuple[int, ...] | None  # None: all
    value: int  # index into the request's interventions

    def positions_in(self, pair: PairShape) -> set[int]:
        """Return the positions of the base prompt that the patch covers."""
        places = (None,) if self.positions is None else self.positions
        return {pos for place in places for pos in range(*span_of(place, pair))}


class PatchChecks:
    """Checks patches one by one; equal sites and interventions are kept once."""

    def __init__(
        self,
        model: TransformerBridge,
        pairs: PromptPairs,
        shape: ModelShape,
        means_from: MeansFrom,
    ) -> None:
        self.model, self.pairs, self.shape, self.means_from = model, pairs, shape, means_from
        self.sites: dict[str, Site] = {}
        self.interventions: list[Intervention] = []
        self.used: dict[tuple[str, int], None] = {}
        self._layers_of: dict[tuple[str, int], set[int]] = {}
        self._values: dict[Any, int] = {}
        self._kept: list[Any] = []  # keeps what `_values` and `_patches` name by id alive
        self._patches: dict[int, CheckedPatch] = {}
        self._labels = set.intersection(*(set(pair.labels) for pair in pairs))

    def patch_set(self, number: int, given: Any) -> tuple[CheckedPatch, ...]:
        """Return one set of patches, checked."""
        members = [given] if isinstance(given, Patch) else given
        if isinstance(members, str) or not isinstance(members, Sequence) or not members:
            raise PlanError(f"patches[{number}]={given!r} must be a Patch or a list of them")
        return tuple(self._patch(number, patch) for patch in members)

    def _patch(self, number: int, patch: Any) -> CheckedPatch:
        if id(patch) in self._patches:
            return self._patches[id(patch)]
        if not isinstance(patch, Patch):
            raise PlanError(
                f"patches[{number}] holds {patch!r}, which is no Patch; write "
                "Patch(site='z', layer=3, head=1)"
            )
        (site,) = get_sites([patch.site])
        if site.cells:
            raise PlanError("joint patches take rows of a pattern, not cells; use site='pattern'")
        self.sites.setdefault(site.name, site)
        index = [*self.sites].index(site.name)
        value = self._value(patch.intervention)
        self.used[site.name, value] = None
        self._kept.append(patch)
        layers = self._layers(site, patch.layer)
        self._layers_of.setdefault((site.name, value), set()).update(layers)
        checked = CheckedPatch(
            site=index,
            layers=layers,
            positions=self._positions(patch.pos),
            units=self._units(site, patch.head),
            value=value,
        )
        self._patches[id(patch)] = checked
        return checked

    def _layers(self, site: Site, layer: Any) -> tuple[int, ...]:
        if not site.layered:
            if layer is not None:
                raise PlanError(f"site {site.name} has no layers; leave layer out for it")
            return (0,)
        if layer is None:
            raise PlanError(f"a patch of {site.name} needs a layer; give one, such as layer=3")
        return _indices("layer", layer, self.shape.n_layers)

    def _units(self, site: Site, head: Any) -> tuple[int, ...] | None:
        if head is None:
            return None
        if site.unit is None:
            raise PlanError(f"site {site.name} has no heads; leave head out for it")
        return _indices("head", head, self.shape.n_units(site))

    def _positions(self, pos: Any) -> tuple[int | str, ...] | None:
        if isinstance(pos, str) and pos == "all":
            return None
        places = position_axis([pos] if isinstance(pos, str) else pos)
        if not places:
            raise PlanError("pos is empty; choose at least one, or 'all'")
        for place in places:
            if isinstance(place, str) and place not in (END, *self._labels):
                known = ", ".join(sorted(self._labels))
                remedy = f"use one of {known}" if known else "use positions, or label the pairs"
                raise PlanError(f"pos={place!r} is no label that every pair carries; {remedy}")
        return places

    def _value(self, given: Any) -> int:
        plain = isinstance(given, str | int | float) and not isinstance(given, bool)
        key = given if plain else id(given)
        if key not in self._values:
            intervention = get_intervention(given)
            if isinstance(intervention, Mean) and self.means_from is not None:
                intervention = with_reference(intervention, self.means_from, self.model)
            self._values[key] = len(self.interventions)
            self._kept.append(given)
            self.interventions.append(intervention)
        return self._values[key]

    def check_positions(self, pairs: Sequence[PairShape]) -> None:
        """Check that every base prompt has the positions of each patch, and values for them."""
        first = -min(pair.n_prompt for pair in pairs)
        past = min(pair.length for pair in pairs)
        for patch in self._patches.values():
            for place in patch.positions or ():
                if isinstance(place, int) and not first <= place < past:
                    raise PlanError(
                        f"pos={place} is no position of the shortest prompt; use "
                        f"{first}..{past - 1}, or a label"
                    )
            if not sees_source(self.interventions[patch.value]):
                continue
            for i, pair in enumerate(pairs):
                if pair.alone and (alone := patch.positions_in(pair).intersection(pair.alone)):
                    raise PlanError(
                        f"a patch of {[*self.sites][patch.site]} covers position {min(alone)} of "
                        f"pair {i}, to which no position of the source prompt corresponds; choose "
                        "other positions, or the other direction, whose base prompt is shorter"
                    )

    def check_values(self, direction: Direction) -> None:
        """Check that each intervention fits the sites that it is used at."""
        means = [isinstance(x, Mean) for x in self.interventions]
        if self.means_from is not None and not any(means):
            raise ConfigError(
                "means_from is for the interventions mean, mean_all and mean_label; leave it out"
            )
        lengths = {pair_shape(pair, direction, -1).length for pair in self.pairs}
        for i, intervention in enumerate(self.interventions):
            sites = [self.sites[name] for name, value in self.used if value == i]
            if self.means_from is None:
                check_labels(intervention, [pair.labels for pair in self.pairs])
            check_means(intervention, self.pairs, sites)
            for site in sites:
                shapes = [found for n in lengths if (found := self.shape.values(site, n))]
                check_constant(intervention, site, shapes)
                layers = [[*self._layers_of[site.name, i]]]
                d_head = self.shape.d_head
                check_directions(intervention, site, shapes, d_head, layers, sweep=False)


def _indices(name: str, given: Any, n: int) -> tuple[int, ...]:
    """Return one set of indices below `n`."""
    (chosen,) = index_sets(name, [given])
    if not chosen:
        raise PlanError(f"{name} is empty; choose at least one")
    for index in chosen:
        if not 0 <= index < n:
            raise PlanError(f"{name}={index} is none of the {n} that the model has; use 0..{n - 1}")
    return chosen


def listed(patches: Any) -> list[Any]:
    """Return the sets of patches as a list.

    Raises:
        PlanError: `patches` is no list of them.
    """
    if isinstance(patches, Patch):
        raise PlanError(
            f"patches={patches!r} is one Patch; give a list: each entry is a Patch, or a list of "
            "patches that act together"
        )
    if isinstance(patches, str | Mapping) or not isinstance(patches, Iterable):
        raise PlanError(f"patches={patches!r} must be a list of Patch, or of lists of them")
    return list(patches)
