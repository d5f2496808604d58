"""Interventions: the patch values, which replace activations of the base run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from patchsweep.data.pairs import PromptPair, PromptPairs
from patchsweep.errors import ConfigError
from patchsweep.spec.sites import Site

Direction = Literal["denoising", "noising"]
# (site, layer, base activations, source activations) -> patch values; all are of one pair,
# `[1, pos, width]` (`pattern`: `[1, head, dest, src]`)
ValueFn = Callable[[Site, int, Tensor, Tensor], Tensor]
Spans = Mapping[str, tuple[int, int]]  # label -> [first, past last) position
# tokens `[prompt, pos]` -> site name -> per layer activations `[prompt, pos, width]`
Activations = Callable[[Tensor], Mapping[str, Sequence[Tensor]]]
# (site, layer, group): the group is a prompt length in tokens, a label, or "" for all positions
MeanKey = tuple[str, int, int | str]


@dataclass(frozen=True)
class Prompts:
    """Clean prompts of one length."""

    tokens: Tensor  # [prompt, pos]
    spans: tuple[Spans, ...]  # label spans, one entry a prompt


@dataclass(frozen=True)
class Reader:
    """`Activations` that name their origin, so that their means can be stored and found again."""

    name: str  # of the runner: two may read one site at different places (q before, after rotary)
    sites: tuple[Site, ...]  # sites that `read` returns
    read: Activations

    def __call__(self, tokens: Tensor) -> Mapping[str, Sequence[Tensor]]:
        return self.read(tokens)


class MeansKept(Protocol):
    """A store of means that outlives the process."""

    def get(
        self,
        per: str,
        prompts: Sequence[Prompts],
        reader: Reader,
        compute: Callable[[], dict[MeanKey, Tensor]],
    ) -> dict[MeanKey, Tensor]:
        """Return the stored means; if there are none, store and return those of `compute`."""


@runtime_checkable
class Intervention(Protocol):
    """Turns the activations of a base and a source run into patch values."""

    name: str
    from_source: bool  # values equal the base run's wherever base and source cannot differ
    default_direction: Direction

    def prepare(self, prompts: Sequence[Prompts], activations: Activations) -> None:
        """Learn from the clean prompts. Called once with all of them, before any patch runs."""

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        """Return patch values in the shape of `base`: `[pair, pos, width]`.

        Those of `pattern` are `[pair, head, dest, src]`. `spans` has one entry a pair, in the order
        of `base`. `values_of` passes one pair at a time to interventions of other modules.
        """


class Plain:
    """An intervention that learns nothing from the prompts."""

    def prepare(self, prompts: Sequence[Prompts], activations: Activations) -> None:
        """See `Intervention`."""


@dataclass
class Resample(Plain):
    """Patches in the source run's activation at the same place."""

    name: str = "resample"
    from_source: bool = True
    default_direction: Direction = "denoising"

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        return source


@dataclass
class Base(Plain):
    """Writes back the base run's own activation, whatever other patches do upstream: freezes it."""

    name: str = "base"
    from_source: bool = True
    default_direction: Direction = "denoising"

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        return base


@dataclass
class Zero(Plain):
    """Patches in zeros. By default the base is the clean run."""

    name: str = "zero"
    from_source: bool = False
    default_direction: Direction = "noising"

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        return torch.zeros_like(base)


MEAN_NAMES = {"position": "mean", "all": "mean_all", "label": "mean_label"}


@dataclass
class Mean:
    """Patches in the mean over clean prompts: those of the sweep, or those of `reference`.

    `per="position"`: over prompts of the same length, position by position.
    `per="all"`: over all positions of all prompts.
    `per="label"`: over all positions with the same label, whatever the prompts' lengths; positions
    without a label get the mean over all. Where labels overlap, the shorter span wins.
    """

    per: Literal["position", "all", "label"] = "position"
    name: str = ""  # default: from `per`, so that a store can tell the three apart
    from_source: bool = False
    default_direction: Direction = "noising"
    reference: PromptPairs | None = None  # None: the sweep's own pairs
    kept: MeansKept | None = field(default=None, repr=False)  # None: each process computes them
    _means: dict[MeanKey, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.per not in MEAN_NAMES:
            raise ConfigError(
                f"mean per={self.per!r} is not known; use 'position', 'all' or 'label'"
            )
        self.name = self.name or MEAN_NAMES[self.per]

    def prepare(self, prompts: Sequence[Prompts], activations: Activations) -> None:
        """Compute the means, or load them from `kept` if `activations` is a `Reader`.

        Raises:
            ConfigError: `per` is label, and no pair has labels.
            StoreError: stored means are damaged.
        """
        if self.reference is not None:
            prompts = _reference_prompts(self.reference, prompts[0].tokens.device)
        check_labels(self, [spans for group in prompts for spans in group.spans])

        def compute() -> dict[MeanKey, Tensor]:
            return _means(self.per, prompts, activations)

        if self.kept is not None and isinstance(activations, Reader):
            self._means = self.kept.get(self.per, prompts, activations, compute)
        else:
            self._means = compute()

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        def mean(which: int | str) -> Tensor:
            return self._means[site.name, layer, which].to(base)

        if self.per == "position" or site.is_pattern:
            return mean(base.shape[-2] if site.is_pattern else base.shape[1]).expand_as(base)
        values = mean("").expand_as(base).clone()
        for row, labels in enumerate(spans if self.per == "label" else ()):
            longest_first = sorted(labels.items(), key=lambda item: item[1][0] - item[1][1])
            for label, (first, stop) in longest_first:
                values[row, first:stop] = mean(label)
        return values


def _reference_prompts(pairs: Sequence[PromptPair], device: torch.device) -> list[Prompts]:
    """Return the clean prompts of `pairs`, one entry per length.

    The answer's tokens but the last follow each prompt, as they do in a run.
    """
    groups: dict[int, list[tuple[tuple[int, ...], Spans]]] = {}
    for pair in pairs:
        tokens = (*pair.clean, *pair.answer[:-1])
        groups.setdefault(len(tokens), []).append((tokens, pair.labels))
    return [
        Prompts(
            torch.tensor([tokens for tokens, _ in group], device=device),
            tuple(spans for _, spans in group),
        )
        for group in groups.values()
    ]


def check_labels(intervention: Intervention, spans: Sequence[Spans]) -> None:
    """Check that means by label have labels; `spans` has one entry a pair.

    Raises:
        ConfigError: the intervention is mean_label, and no pair has a label.
    """
    if isinstance(intervention, Mean) and intervention.per == "label" and not any(spans):
        raise ConfigError(
            "intervention=mean_label takes means by label, and no pair has labels; label the "
            "pairs, or use mean or mean_all"
        )


def _means(per: str, prompts: Sequence[Prompts], activations: Activations) -> dict[MeanKey, Tensor]:
    """Return fp64 means of all activations. Runs 16 prompts at a time and keeps only their sums."""
    sums: dict[MeanKey, tuple[Tensor, int]] = {}

    def add(key: MeanKey, x: Tensor) -> None:
        total, count = sums.get(key, (torch.zeros_like(x[0]), 0))
        sums[key] = (total + x.sum(dim=0), count + len(x))

    def add_all(name: str, layer: int, x: Tensor, spans: Sequence[Spans]) -> None:
        if per == "position" or name.startswith("pattern"):
            add((name, layer, x.shape[-2] if x.ndim == 4 else x.shape[1]), x)
            return
        add((name, layer, ""), x.flatten(0, 1))
        for row, labels in enumerate(spans if per == "label" else ()):
            for label, (first, stop) in labels.items():
                add((name, layer, label), x[row, first:stop])

    for group in prompts:
        for first in range(0, len(group.spans), 16):
            tokens, spans = group.tokens[first : first + 16], group.spans[first : first + 16]
            for name, layers in activations(tokens).items():
                for layer, x in enumerate(layers):
                    add_all(name, layer, x.double(), spans)
    return {key: total / count for key, (total, count) in sums.items()}


@dataclass
class Shuffle(Resample):
    """Patches in another pair's source activation: that of the next pair of the same length."""

    name: str = "shuffle"
    from_source: bool = False


@dataclass
class Custom(Plain):
    """Patches in a user's values: a constant, or a function of base and source activations.

    A constant is one number, `[width]` or `[pos, width]` (`pattern`: up to `[head, dest, src]`).
    A function takes and returns `[1, pos, width]`, one pair at a time.
    A store identifies a constant by its content, and a function by `name` and `version` alone: set
    a new version whenever the function, or the data it reads, changes.
    """

    value: float | Tensor | ValueFn
    name: str = "custom"
    from_source: bool = False
    default_direction: Direction = "noising"
    version: str | None = None  # None: a store cannot tell this function from another

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        if callable(self.value):
            return self.value(site, layer, base, source)
        constant = torch.as_tensor(self.value)
        fits = constant.ndim < base.ndim and all(
            size in (1, wanted)
            for size, wanted in zip(constant.shape[::-1], base.shape[::-1], strict=False)
        )
        # a constant with a pair axis is refused: equal sizes could make it look like positions
        return constant.expand_as(base) if fits else constant


INTERVENTIONS: dict[str, Callable[[], Intervention]] = {
    "resample": Resample,
    "base": Base,
    "zero": Zero,
    "mean": Mean,
    "mean_all": partial(Mean, per="all"),
    "mean_label": partial(Mean, per="label"),
    "shuffle": Shuffle,
}


def get_intervention(given: str | Intervention | float | Tensor | ValueFn) -> Intervention:
    """Return the intervention for a name, a constant or a callable; an `Intervention` as it is.

    Raises:
        ConfigError: the name is unknown, the type unsupported, or the constant not finite.
    """
    if isinstance(given, str):
        if given not in INTERVENTIONS:
            raise ConfigError(
                f"intervention {given!r} is not known; use one of {', '.join(INTERVENTIONS)}, "
                "a constant, or a callable"
            )
        return INTERVENTIONS[given]()
    if hasattr(given, "values") and hasattr(given, "from_source"):
        if type(given) is Custom:
            get_intervention(given.value)
        return given  # type: ignore[return-value]
    constant = isinstance(given, float | int | np.ndarray | np.number | Tensor)
    if isinstance(given, bool) or not (constant or callable(given)):
        raise ConfigError(
            f"intervention={given!r} is no intervention; use one of {', '.join(INTERVENTIONS)}, "
            "a constant, or a callable (site, layer, base, source) -> values"
        )
    if not constant:
        check_callable(given)
    if constant and not bool(torch.as_tensor(given).isfinite().all()):
        raise ConfigError(f"intervention={given!r} must be finite; give numbers")
    return Custom(given)


def check_callable(function: Any) -> None:
    """Raise unless `function` can be called with a site, a layer and two activations.

    Raises:
        ConfigError: it takes other arguments.
    """
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # of a builtin, which tells nothing
        return
    try:
        signature.bind(None, None, None, None)
    except TypeError as error:
        raise ConfigError(
            f"intervention={getattr(function, '__name__', function)!r} cannot be called: {error}; "
            "give a callable (site, layer, base, source) -> values"
        ) from None


def check_constant(
    intervention: Intervention, site: Site, shapes: Iterable[tuple[int, ...]]
) -> None:
    """Raise unless a constant of the user's own fits `site`, of these `shapes` in the prompts.

    Raises:
        ConfigError: an axis has another size, or there are more of them.
    """
    if type(intervention) is not Custom or callable(intervention.value):
        return
    given = tuple(torch.as_tensor(intervention.value).shape)
    for shape in shapes:
        sizes = zip(given[::-1], shape[::-1], strict=False)
        if len(given) > len(shape) or not all(size in (1, wanted) for size, wanted in sizes):
            raise ConfigError(
                f"intervention={intervention.name} is a constant of the shape {given}, and "
                f"{site.name} has {shape} in a prompt; give a number, [width] or [pos, width]"
            )


def takes_source(intervention: Intervention) -> bool:
    """Whether patch values are the source run's, so that they can differ only where tokens do."""
    return type(intervention) in (Resample, Shuffle)


def sees_source(intervention: Intervention) -> bool:
    """Whether patch values are made from the source run's."""
    own = isinstance(intervention, Base)
    return (intervention.from_source and not own) or isinstance(intervention, Custom)


def shuffles(intervention: Intervention) -> bool:
    """Whether the source run is that of the next pair of the same length."""
    return isinstance(intervention, Shuffle) or bool(getattr(intervention, "shuffles", False))


def values_of(
    intervention: Intervention,
    site: Site,
    layer: int,
    base: Tensor,
    source: Tensor,
    spans: Sequence[Spans],
) -> Tensor:
    """Return the patch values for `base` `[pair, pos, width]`, in the same shape.

    A user's intervention runs pair by pair on copies of the activations. So its values cannot
    depend on the other pairs of the batch, and it cannot modify the activations of others.

    Raises:
        ConfigError: the intervention returns another shape.
    """
    built_in = type(intervention) in (Resample, Base, Shuffle, Zero, Mean)
    # a wrapper of another intervention may call it pair by pair itself
    if built_in or getattr(intervention, "asks_pair_by_pair", False):
        return intervention.values(site, layer, base, source, spans)
    rows = []
    for i in range(len(base)):
        one = slice(i, i + 1)
        values = intervention.values(
            site, layer, base[one].clone(), source[one].clone(), spans[one]
        )
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if shape != tuple(base[one].shape):
            raise ConfigError(
                f"intervention={intervention.name} gave values of the shape {shape} for "
                f"{site.name} {tuple(base[one].shape)}; give one value for each (a constant may "
                "be a number, [width] or [pos, width])"
            )
        rows.append(values.detach().to(base))
    return torch.cat(rows)
