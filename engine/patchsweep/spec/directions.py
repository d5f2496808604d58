"""Interventions on directions: add one, take one's component from the source run, remove one.

They change the activation that they meet. In a sweep that is the base run's. In `run_patches` it is
the running value, so that several of them act one after the other, layer by layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchsweep.arguments import is_whole, number
from patchsweep.errors import ConfigError
from patchsweep.spec.interventions import Direction, Plain, Spans
from patchsweep.spec.sites import Site

# one for all layers, or a table by layer
PerLayer = Tensor | Mapping[int, Tensor]
# singular values below this share of the largest are rounding: the direction is a combination of
# the others
_RANK = 1e-6


class Live(Plain, ABC):
    """An intervention that changes the activation it meets, vector by vector."""

    name: str
    from_source: bool = False
    default_direction: Direction = "noising"
    asks_pair_by_pair = True  # each vector by itself: batches of pairs are all right
    version = "1"  # of these classes' arithmetic, for stores

    @abstractmethod
    def applied(self, site: Site, layer: int, x: Tensor, source: Tensor) -> Tensor:
        """Return the new values of vectors `x` `[..., width]`; `source`: the source run's."""

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        """See `Intervention`."""
        return self.applied(site, layer, base, source)

    def check_site(self, site: Site, shapes: Iterable[tuple[int, ...]], unit: int) -> None:
        """Check that the directions fit `site`, of these `shapes`; `unit`: the width of a head.

        Raises:
            ConfigError: the site is an attention pattern, or has another width.
        """
        if site.is_pattern:
            raise ConfigError(
                f"intervention={self.name} changes vectors, and {site.name} is an attention "
                "pattern; use a site such as resid_pre or z"
            )


class Numbered(Live):
    """Adds to each write a vector of its own: the unit of a write is the number of its vector."""

    @abstractmethod
    def vectors(self, numbers: Tensor) -> Tensor:
        """Return the vectors `[write, width]` of these numbers, fp32."""

    def applied(self, site: Site, layer: int, x: Tensor, source: Tensor) -> Tensor:
        """See `Live`; numbers decide, so that values alone say nothing."""
        return x


@dataclass
class Scale(Live):
    """Multiplies the activation by `factor`: 0 removes it, 1 leaves it as it is."""

    factor: float
    name: str = "scale"

    def __post_init__(self) -> None:
        number("factor", self.factor, error=ConfigError)

    def applied(self, site: Site, layer: int, x: Tensor, source: Tensor) -> Tensor:
        """See `Live`."""
        return self.factor * x


class _Directional(Live):
    """What interventions with directions share: a table of them, as wide as the site or a head."""

    _table: PerLayer

    def values(
        self, site: Site, layer: int, base: Tensor, source: Tensor, spans: Sequence[Spans]
    ) -> Tensor:
        """See `Intervention`; the base run's at a layer without directions, which none patches."""
        table = self._table
        if isinstance(table, Mapping) and layer not in table:
            return base
        return self.applied(site, layer, base, source)

    def _at(self, layer: int, x: Tensor) -> Tensor:
        """Return the table's entry of `layer`, on the device and in the dtype of `x`."""
        table = self._table
        entry = table[layer] if isinstance(table, Mapping) else table
        return entry.to(x)

    def check_site(self, site: Site, shapes: Iterable[tuple[int, ...]], unit: int) -> None:
        """See `Live`."""
        super().check_site(site, shapes, unit)
        widths = {shape[-1] for shape in shapes}
        if site.unit in ("head", "kv_head") and site.name != "result":
            widths.add(unit)
        for width in sorted(_widths(self._table)):
            if widths and width not in widths:
                known = " or ".join(map(str, sorted(widths)))
                raise ConfigError(
                    f"intervention={self.name} has directions of the width {width}, and "
                    f"{site.name} has vectors of {known}; give directions of that width"
                )

    def check_layers(self, layers: Iterable[int]) -> None:
        """Check that a table by layer has each of `layers`.

        Raises:
            ConfigError: it lacks one.
        """
        table = self._table
        missing = [layer for layer in layers if isinstance(table, Mapping) and layer not in table]
        if missing:
            raise ConfigError(
                f"intervention={self.name} has no direction for layer {missing[0]}; give one for "
                "each layer that is patched, or one tensor for all"
            )


@dataclass
class Add(_Directional):
    """Adds `coefficient` times `direction` (steering). `direction` is not normalised.

    `direction` is `[width]`, or a mapping from layers to such; of the site's width, or of a head's,
    which is then added to every head that is patched.
    """

    direction: PerLayer
    coefficient: float = 1.0
    name: str = "add"
    seed: int | None = None  # of a random direction, see `random_like`

    def __post_init__(self) -> None:
        number("coefficient", self.coefficient, error=ConfigError)
        self.direction = self._table = _checked("direction", self.direction, ndim=1)

    def applied(self, site: Site, layer: int, x: Tensor, source: Tensor) -> Tensor:
        """See `Live`."""
        direction = self._at(layer, x)
        return (_by(x, direction) + self.coefficient * direction).view_as(x)

    def random_like(self, seed: int) -> Add:
        """Return the control: a random direction of the same norm in each layer.

        A store keeps the seed with the intervention.
        """
        direction = _random(self.direction, seed)
        return Add(direction, self.coefficient, f"{self.name}_random", seed)


class _Subspace(_Directional):
    """An intervention on the span of some directions."""

    directions: PerLayer

    def __post_init__(self) -> None:
        self.directions = _checked("directions", self.directions, ndim=2)
        self._table = _each(self.directions, _basis)

    def _projected(self, layer: int, x: Tensor) -> Tensor:
        """Return the component of `x` in the subspace."""
        basis = self._at(layer, x)
        flat = _by(x, basis)
        return ((flat @ basis.T) @ basis).reshape(x.shape)


@dataclass
class Project(_Subspace):
    """Takes the component in a subspace from the source run, and leaves the rest (interchange).

    `directions` is `[direction, width]`, or a mapping from layers to such; they need not be
    orthogonal. All directions of a basis give `resample`, none of them change nothing. A large
    effect does not show that the model uses the subspace (Makelov et al., arXiv 2311.17030):
    compare with `random_like`, and with `placebo=True`, whose source is that of another pair.
    """

    directions: PerLayer
    name: str = "project"
    placebo: bool = False
    seed: int | None = None  # of random directions, see `random_like`

    def __post_init__(self) -> None:
        super().__post_init__()
        self.default_direction = "denoising"
        self.from_source = not self.placebo
        if self.placebo and self.name == "project":
            self.name = "project_placebo"

    @property
    def shuffles(self) -> bool:
        """Whether the source run is another pair's."""
        return self.placebo

    def applied(self, site: Site, layer: int, x: Tensor, source: Tensor) -> Tensor:
        """See `Live`."""
        return x + self._projected(layer, source - x)

    def random_like(self, seed: int) -> Project:
        """Return the control: as many random directions of the same norms in each layer."""
        return Project(_random(self.directions, seed), f"{self.name}_random", self.placebo, seed)


@dataclass
class Ablate(_Subspace):
    """Removes the component in a subspace: what is left is orthogonal to all `directions`.

    `directions` as in `Project`.
    """

    directions: PerLayer
    name: str = "ablate"
    seed: int | None = None  # of random directions, see `random_like`

    def applied(self, site: Site, layer: int, x: Tensor, source: Tensor) -> Tensor:
        """See `Live`."""
        return x - self._projected(layer, x)

    def random_like(self, seed: int) -> Ablate:
        """Return the control: as many random directions of the same norms in each layer."""
        return Ablate(_random(self.directions, seed), f"{self.name}_random", seed)


def check_directions(
    intervention: object,
    site: Site,
    shapes: Iterable[tuple[int, ...]],
    d_head: int,
    layer_sets: Sequence[Sequence[int]],
    *,
    sweep: bool,
) -> None:
    """Check that an intervention of this module fits `site` at these sets of layers.

    Raises:
        ConfigError: directions of another width, or none for a layer; or a sweep patches several
            layers at once.
    """
    if not isinstance(intervention, Live):
        return
    if sweep and any(len(layers) > 1 for layers in layer_sets):
        raise ConfigError(
            f"intervention={intervention.name} changes the value that it meets, and a sweep makes "
            "all values from unpatched runs; patch several layers at once with run_patches"
        )
    intervention.check_site(site, shapes, d_head)
    if isinstance(intervention, _Directional):
        intervention.check_layers(layer for layers in layer_sets for layer in layers)


def _checked(name: str, given: Any, ndim: int) -> PerLayer:
    """Return directions as fp32 tensors of `ndim` axes, on the CPU.

    Raises:
        ConfigError: they have another shape, are not finite, or one has norm 0.
    """
    axes = "[width]" if ndim == 1 else "[direction, width]"
    if isinstance(given, Mapping):
        if not given or not all(is_whole(layer) for layer in given):
            raise ConfigError(f"{name} must map layers to {axes}, got the keys {[*given]!r}")
        return {int(layer): _one(f"{name}[{layer}]", x, ndim, axes) for layer, x in given.items()}
    return _one(name, given, ndim, axes)


def _one(name: str, given: Any, ndim: int, axes: str) -> Tensor:
    try:
        x = torch.as_tensor(given).detach().to("cpu", torch.float32)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} must be a tensor {axes}, got {type(given).__name__}") from None
    if x.ndim != ndim:
        raise ConfigError(f"{name} has the shape {tuple(x.shape)}; give {axes}")
    if not bool(x.isfinite().all()):
        raise ConfigError(f"{name} must be finite; give numbers")
    norms = x.reshape(-1, x.shape[-1]).norm(dim=-1)
    if bool((norms == 0).any()):
        where = "" if ndim == 1 else f"; number {int((norms == 0).nonzero()[0])} has"
        raise ConfigError(f"{name} must have a norm above 0{where}; leave that direction out")
    return x


def _each(table: PerLayer, function: Any) -> PerLayer:
    if isinstance(table, Mapping):
        return {layer: function(x) for layer, x in table.items()}
    return function(table)


def _basis(directions: Tensor) -> Tensor:
    """Return an orthonormal basis `[rank, width]` of the span."""
    if not len(directions):
        return directions
    _, sizes, basis = torch.linalg.svd(directions.double(), full_matrices=False)
    return basis[sizes > _RANK * sizes[0]].float()


def _widths(table: PerLayer) -> set[int]:
    entries = table.values() if isinstance(table, Mapping) else (table,)
    return {int(x.shape[-1]) for x in entries}


def _by(x: Tensor, directions: Tensor) -> Tensor:
    """Return `x` `[..., width]` as vectors of the directions' width: each head by itself."""
    return x.unflatten(-1, (-1, directions.shape[-1]))


def _random(table: PerLayer, seed: int) -> PerLayer:
    """Return directions drawn at random, with the norms of those in `table`."""
    if not is_whole(seed) or seed < 0:
        raise ConfigError(f"seed={seed!r} must be a whole number of at least 0")
    generator = torch.Generator().manual_seed(int(seed))

    def drawn(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator, device="cpu")
        return noise * x.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)

    return _each(table, drawn)
