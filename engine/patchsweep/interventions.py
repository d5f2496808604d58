"""Interventions: which values a patch puts in place of the base run's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from patchsweep.errors import ConfigError
from patchsweep.sites import Site

Direction = Literal["denoising", "noising"]
# (site, layer, base activations, source activations) -> values, all `[pair, pos, width]`
ValueFn = Callable[[Site, int, Tensor, Tensor], Tensor]
# tokens `[prompt, pos]` -> site name -> per layer activations `[prompt, pos, width]`
Activations = Callable[[Tensor], Mapping[str, Sequence[Tensor]]]


class Intervention(Protocol):
    """Turns the activations of a base and a source run into the values patched in."""

    name: str
    from_source: bool  # values equal the base run's wherever the prompts cannot differ
    default_direction: Direction

    def prepare(self, prompts: Mapping[int, Tensor], activations: Activations) -> None:
        """Called once with the clean prompts by length `[prompt, pos]`, before any sweep."""

    def values(self, site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        """What replaces `base` `[pair, pos, width]`; `pattern`: `[pair, head, dest, src]`."""


@dataclass
class Resample:
    """The paired prompt's activation at the same place."""

    name: str = "resample"
    from_source: bool = True
    default_direction: Direction = "denoising"

    def prepare(self, prompts: Mapping[int, Tensor], activations: Activations) -> None: ...

    def values(self, site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return source


@dataclass
class Zero:
    """Zeros. The base is the clean run unless said otherwise."""

    name: str = "zero"
    from_source: bool = False
    default_direction: Direction = "noising"

    def prepare(self, prompts: Mapping[int, Tensor], activations: Activations) -> None: ...

    def values(self, site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return torch.zeros_like(base)


@dataclass
class Mean:
    """The mean over the sweep's clean prompts.

    `per="position"`: over prompts of the same length, position by position.
    `per="all"`: over every position of every prompt.
    """

    per: Literal["position", "all"] = "position"
    name: str = "mean"
    from_source: bool = False
    default_direction: Direction = "noising"
    _sums: dict[tuple[str, int, int], tuple[Tensor, int]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.per not in ("position", "all"):
            raise ConfigError(f"mean per={self.per!r} is not known; use 'position' or 'all'")

    def prepare(self, prompts: Mapping[int, Tensor], activations: Activations) -> None:
        self._sums.clear()
        for length, tokens in prompts.items():
            for chunk in tokens.split(16):  # streamed: only sums are kept
                for name, layers in activations(chunk).items():
                    for layer, x in enumerate(layers):
                        self._add(name, layer, length, x.double())

    def _add(self, name: str, layer: int, length: int, x: Tensor) -> None:
        total, count = x.sum(dim=0), len(x)
        key = (name, layer, length)
        if self.per == "all" and not name.startswith("pattern"):
            total, count = total.sum(dim=0), count * length
            key = (name, layer, 0)
        old_total, old_count = self._sums.get(key, (torch.zeros_like(total), 0))
        self._sums[key] = (old_total + total, old_count + count)

    def values(self, site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        length = base.shape[-2] if site.is_pattern else base.shape[1]
        over_all = self.per == "all" and not site.is_pattern
        total, count = self._sums[(site.name, layer, 0 if over_all else length)]
        mean = (total / count).to(base)
        return mean.expand_as(base)


@dataclass
class Shuffle:
    """Another pair's source activation: the next pair of the same length."""

    name: str = "shuffle"
    from_source: bool = False
    default_direction: Direction = "denoising"

    def prepare(self, prompts: Mapping[int, Tensor], activations: Activations) -> None:
        for length, tokens in prompts.items():
            if len(tokens) < 2:
                raise ConfigError(
                    f"intervention=shuffle takes values from another pair of the same length, "
                    f"but only one pair has {length} tokens; add pairs or use resample"
                )

    def values(self, site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        return source.roll(1, dims=0)


@dataclass
class Custom:
    """Values of the user's own: a constant, or a function of base and source activations."""

    value: float | Tensor | ValueFn
    name: str = "custom"
    from_source: bool = False
    default_direction: Direction = "noising"

    def prepare(self, prompts: Mapping[int, Tensor], activations: Activations) -> None: ...

    def values(self, site: Site, layer: int, base: Tensor, source: Tensor) -> Tensor:
        if callable(self.value):
            return self.value(site, layer, base, source).to(base).expand_as(base)
        return torch.as_tensor(self.value).to(base).expand_as(base)


INTERVENTIONS: dict[str, Callable[[], Intervention]] = {
    "resample": Resample,
    "zero": Zero,
    "mean": Mean,
    "shuffle": Shuffle,
}


def get_intervention(given: str | Intervention | float | Tensor | ValueFn) -> Intervention:
    """The intervention of a name, of a constant, of a callable, or the one given.

    Raises:
        ConfigError: the name is unknown.
    """
    if isinstance(given, str):
        if given not in INTERVENTIONS:
            raise ConfigError(
                f"intervention {given!r} is not known; use one of {', '.join(INTERVENTIONS)}, "
                "a constant, or a callable"
            )
        return INTERVENTIONS[given]()
    if hasattr(given, "values") and hasattr(given, "from_source"):
        return given  # type: ignore[return-value]
    return Custom(given)
