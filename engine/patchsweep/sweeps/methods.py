"""The parsed `method=` argument: exact values, estimates, or a screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from patchsweep.attribution import Method, get_methods
from patchsweep.attribution.run import pairs_per_block, token_layers
from patchsweep.errors import MethodError
from patchsweep.spec.spec import Request
from patchsweep.store.layout import Variable
from patchsweep.sweeps.estimates import variables_of
from patchsweep.sweeps.identity import method_identity
from patchsweep.sweeps.layout import pair_variables
from patchsweep.sweeps.screen_settings import Screen

MethodLike = str | Method | Screen
BOUND = "_bound"  # suffix of the variable with the bound of a site
ASSUMPTION = (
    "a patch's mean effect among random subsets of the patches that were not run stands for its "
    "effect alone; patches that cancel or back each other up can hide"
)


@dataclass(frozen=True)
class MethodSpec:
    """The parsed `method=` argument."""

    exact: bool  # patches run exactly: all, or those that the screen selects
    methods: tuple[Method, ...]
    screen: Screen | None

    def variables(self, request: Request) -> tuple[Variable, ...]:
        """Return the variables besides the exact ones."""
        variables = variables_of(request, self.methods)
        if self.screen is None or not self.screen.subsets:
            return variables
        text = "largest |effect| that a patch of {} that was not run may have, at the stated level"
        n_pairs = {plan.site.name: pairs_per_block(plan) for plan in request.plans}
        return variables + pair_variables(request, BOUND, text, n_pairs)

    def settings(self) -> dict[str, Any]:
        """Return method name -> settings, as a store records them."""
        methods = {method.name: method_identity(method) for method in self.methods}
        if self.screen is not None:
            return {"screen": self._screen_settings(methods)}
        return {"exact": {}, **methods} if self.exact else methods

    def _screen_settings(self, by: Any) -> dict[str, Any]:
        assert self.screen is not None
        return {**{f.name: getattr(self.screen, f.name) for f in fields(self.screen)}, "by": by}

    def attrs(self, request: Request) -> dict[str, Any]:
        """Return a store's attributes about the methods."""
        if not self.methods:
            return {}
        costs = {
            method.name: {"token_layers": token_layers(request, method)} for method in self.methods
        }
        names = ["exact"] * (self.exact and self.screen is None) + [*costs]
        attrs: dict[str, Any] = {"method": ", ".join(names), "attribution": costs}
        if self.screen is not None:
            attrs["method"] = "screen"
            attrs["screen"] = {
                **self._screen_settings(self.screen.method.name),
                "assumption": ASSUMPTION,
                "cells": "<site> holds exact values where a patch was run or is known to change "
                "nothing, NaN elsewhere; <site>_<method> holds an estimate everywhere",
            }
        return attrs


EXACT = MethodSpec(exact=True, methods=(), screen=None)


def parse_methods(method: MethodLike | Sequence[MethodLike]) -> MethodSpec:
    """Parse the argument `method`.

    Raises:
        MethodError: a method is unknown or repeated, or a screen comes with other methods.
    """
    methods: list[MethodLike] = (
        list(method) if isinstance(method, Sequence) and not isinstance(method, str) else [method]
    )
    screens = [m for m in methods if m == "screen" or isinstance(m, Screen)]
    if screens:
        if len(methods) > 1:
            raise MethodError("method=screen stands alone; its ranking method is Screen(by=...)")
        screen = screens[0] if isinstance(screens[0], Screen) else Screen()
        return MethodSpec(exact=True, methods=(screen.method,), screen=screen)
    others = [m for m in methods if m != "exact"]
    if len(methods) - len(others) > 1:
        raise MethodError("method names exact twice; name each once")
    attribution = get_methods(others) if others or not methods else ()  # type: ignore[arg-type]
    return MethodSpec(exact=len(others) < len(methods), methods=attribution, screen=None)
