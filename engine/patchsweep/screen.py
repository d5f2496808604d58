"""Screening: attribution ranks all patches, the exact engine runs the foremost, and random
subsets of the rest bound what was missed.

The bound follows AtP* (Kramár et al., arXiv 2403.00745, section on diagnostics). Random subsets
of the patches that were not run are patched jointly. For each patch, the mean metric of the
subsets that hold it minus the mean of those that do not estimates its effect among random
others; a one-sided Welch test rejects "|effect| >= theta". "Some patch is >= theta" takes the
largest p-value, so it is rejected at the stated level for every theta above

    max over patches of |difference of means| + t * (Welch standard error).

**Assumption**: a patch's effect among random others says what its effect alone is. Patches that
cancel or stand in for one another (backup heads) can hide from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from patchsweep.attribution import Attribution, Method, get_methods
from patchsweep.attribution.run import token_layers
from patchsweep.attribution.tape import Place, Prefix, Tape
from patchsweep.attribution.units import variable_name, variables_of
from patchsweep.batch import Batch, make_batches
from patchsweep.errors import MethodError
from patchsweep.metrics import Logits, compute
from patchsweep.plan import SitePlan
from patchsweep.probe import Choice
from patchsweep.request import Request, device_of
from patchsweep.results import shape_of
from patchsweep.store import Variable

Values = NDArray[np.float32]
# tokens of one pass of jointly patched rows
MAX_TOKENS = 4096
ASSUMPTION = (
    "a patch's mean effect among random subsets of the patches that were not run stands for its "
    "effect alone; patches that cancel or back each other up can hide"
)


@dataclass(frozen=True)
class Screen:
    """How to screen. Patches are ranked, site by site, by their mean |estimate| over the pairs
    for the first metric; a chosen one runs on every pair.

    Raises:
        MethodError: a number is out of range.
    """

    by: str | Method = "atp"  # the method that ranks
    k: int = 100  # patches of each site that run exactly; with `margin`: the top ones sought
    # go on until the k-th largest exact effect is (1 + margin) times every remaining estimate
    margin: float | None = None
    subsets: int = 64  # random subsets per pair and site; 0: no bound
    share: float = 0.1  # chance of a patch to be in a subset
    level: float = 0.05  # of the one-sided test
    seed: int = 0

    def __post_init__(self) -> None:
        rules = {
            "k": (self.k >= 1, "k >= 1"),
            "margin": (self.margin is None or self.margin >= 0, "margin >= 0"),
            "subsets": (self.subsets == 0 or self.subsets >= 8, "subsets >= 8, or 0 for no bound"),
            "share": (0 < self.share < 1, "0 < share < 1"),
            "level": (0 < self.level < 0.5, "0 < level < 0.5"),
        }
        for name, (kept, rule) in rules.items():
            if not kept:
                raise MethodError(f"screen has {name}={getattr(self, name)}; use {rule}")

    @property
    def method(self) -> Method:
        """The method that ranks."""
        return get_methods([self.by])[0]

    def check(self, request: Request, n_slices: int) -> None:
        """Raise unless `request` can be screened so.

        Raises:
            MethodError: k is larger than the plan, or the run is cut into slices.
        """
        if n_slices > 1:
            raise MethodError(
                f"n_slices={n_slices} with method=screen: the ranking needs all pairs at once; "
                "screen in one process"
            )
        for plan in request.plans:
            n_live = int((live_of(plan)).any(axis=0).sum())
            if self.k > n_live:
                raise MethodError(
                    f"screen has k={self.k}, and site {plan.site.name} has {n_live} patches that "
                    f"can change the metric; use k <= {n_live}, or method=exact"
                )


MethodLike = str | Method | Screen


@dataclass(frozen=True)
class Asked:
    """What `method=` asked for."""

    exact: bool  # patches run exactly: all, or those that the screen chooses
    methods: tuple[Method, ...]
    screen: Screen | None

    def variables(self, request: Request) -> tuple[Variable, ...]:
        """The variables besides the exact ones."""
        found = variables_of(request, self.methods)
        if self.screen is None or not self.screen.subsets:
            return found
        n_metrics, n_pairs = len(request.metrics), len(request.pairs)
        return found + tuple(
            Variable(
                name=bound_name(plan.site.name),
                dims=("metric", "pair"),
                shape=(n_metrics, n_pairs),
                unit=(n_pairs, 1),
                attrs={
                    "long_name": f"largest |effect| that a patch of {plan.site.name} that was not "
                    "run may have, at the stated level"
                },
            )
            for plan in request.plans
        )

    def attrs(self, request: Request) -> dict[str, Any]:
        """What a store records of the methods."""
        if not self.methods:
            return {}
        costs = {
            method.name: {"token_layers": token_layers(request, method)} for method in self.methods
        }
        names = ["exact"] * (self.exact and self.screen is None) + [*costs]
        found: dict[str, Any] = {"method": ", ".join(names), "attribution": costs}
        if self.screen is not None:
            screen = self.screen
            found["method"] = "screen"
            found["screen"] = {
                "by": screen.method.name,
                "k": screen.k,
                "margin": screen.margin,
                "subsets": screen.subsets,
                "share": screen.share,
                "level": screen.level,
                "seed": screen.seed,
                "assumption": ASSUMPTION,
                "cells": "<site> holds exact values where a patch was run or is known to change "
                "nothing, NaN elsewhere; <site>_<method> holds an estimate everywhere",
            }
        return found


def get_asked(given: MethodLike | Sequence[MethodLike]) -> Asked:
    """What `method=given` asks for.

    Raises:
        MethodError: a method is unknown, or screening stands beside other methods.
    """
    several = isinstance(given, Sequence) and not isinstance(given, str)
    methods: list[MethodLike] = list(given) if several else [given]  # type: ignore[arg-type]
    screens = [m for m in methods if m == "screen" or isinstance(m, Screen)]
    if screens:
        if len(methods) > 1:
            raise MethodError("method=screen stands alone; its ranking method is Screen(by=...)")
        screen = screens[0] if isinstance(screens[0], Screen) else Screen()
        return Asked(exact=True, methods=(screen.method,), screen=screen)
    others = [m for m in methods if m != "exact"]
    found = get_methods(others) if others or not methods else ()  # type: ignore[arg-type]
    return Asked(exact=len(others) < len(methods), methods=found, screen=None)
