"""Settings of a screen: the ranking method, the number of exact patches, the bound on the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchsweep.arguments import whole_number
from patchsweep.attribution import Method, get_methods
from patchsweep.errors import MethodError
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.spec import Request


@dataclass(frozen=True)
class Screen:
    """Settings of a screen.

    A screen ranks the patches of each site by their mean |estimate| of the first metric over the
    pairs, and runs the top k on every pair.

    Raises:
        MethodError: a number is out of range, or `by` is unknown.
    """

    by: str | Method = "atp"  # the ranking method
    k: int = 100  # patches of each site that run exactly; with `margin`: size of the final top k
    # continue until the k-th largest exact effect is (1 + margin) times every remaining estimate
    margin: float | None = None
    subsets: int = 64  # random subsets per pair and site; 0: no bound
    # probability that a subset includes a patch; with fewer other patches in the subset, the
    # patch's effect there is closer to its effect alone
    inclusion: float = 0.05
    alpha: float = 0.05  # level of the one-sided test
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "subsets", "seed"):
            least = 0 if name == "seed" else None
            whole_number(f"screen's {name}", getattr(self, name), least=least, error=MethodError)
        for name in ("margin", "inclusion", "alpha"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and not (name == "margin" and value is None):
                raise MethodError(f"screen has {name}={value!r}; use a number")
        self.method  # noqa: B018  # raises if `by` is unknown
        rules = {
            "k": (self.k >= 1, "k >= 1"),
            "margin": (self.margin is None or self.margin >= 0, "margin >= 0"),
            "subsets": (self.subsets == 0 or self.subsets >= 8, "subsets >= 8, or 0 for no bound"),
            "inclusion": (0 < self.inclusion < 1, "0 < inclusion < 1"),
            "alpha": (0 < self.alpha < 0.5, "0 < alpha < 0.5"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise MethodError(f"screen has {name}={getattr(self, name)}; use {rule}")

    @property
    def method(self) -> Method:
        """The ranking method."""
        return get_methods([self.by])[0]

    def check(self, request: Request, n_slices: int) -> None:
        """Raise unless `request` can be screened with these settings.

        Raises:
            MethodError: k exceeds a site's live places, the run is sliced, or pattern cells are to
                be bounded.
        """
        if n_slices > 1:
            raise MethodError(
                f"n_slices={n_slices} with method=screen: the ranking needs all pairs at once; "
                "screen in one process"
            )
        for plan in request.plans:
            if plan.axes.n_sources and self.subsets:
                raise MethodError(
                    "single cells of a pattern are patched one by one, not in random subsets; "
                    "use Screen(subsets=0) for pattern_cell"
                )
            n_live = int((live_of(plan)).any(axis=0).sum())
            if self.k > n_live:
                raise MethodError(
                    f"screen has k={self.k}, and site {plan.site.name} has {n_live} patches that "
                    f"can change the metric; use k <= {n_live}, or method=exact"
                )

    def share_of(self, plan: SitePlan) -> float:
        """Return the fraction of the live places of `plan` that run exactly, at least."""
        return self.k / int(live_of(plan).any(axis=0).sum())

    def bound_cost(self, plan: SitePlan, pairs: range) -> int:
        """Return the token-layers of the random subsets of `pairs`, from each first live patch."""
        starts = np.full(plan.shape[0], plan.full_lengths.max())
        live = plan.live_patches()
        np.minimum.at(starts, plan.pair[live], plan.start[live])
        tokens = np.maximum(0, plan.full_lengths - starts)[pairs.start : pairs.stop]
        return int(self.subsets * plan.n_layers * tokens.sum())


def live_of(plan: SitePlan) -> NDArray[np.bool_]:
    """Return `[pair, place]`: whether each patch is live; place: (layer, pos, unit), flattened."""
    live = np.zeros(int(np.prod(plan.shape)), dtype=bool)
    live[plan.cell[plan.live_patches()]] = True
    return live.reshape(plan.shape[0], -1)
