"""Attribution methods: estimates of all patches' effects from a few passes of the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from patchsweep.attribution.atp import Atp, AtpEnds
from patchsweep.attribution.atp_star import AtpStar
from patchsweep.attribution.check import check_request
from patchsweep.attribution.estimates import Method
from patchsweep.attribution.gim import Gim, gim_rules
from patchsweep.attribution.integrated import IntegratedInputs, IntegratedSite
from patchsweep.attribution.relp import Relp, relevance_rules
from patchsweep.attribution.run import Attribution
from patchsweep.errors import MethodError
from patchsweep.forward.unwrapped import UnwrappedModel

__all__ = [
    "METHODS",
    "RULES",
    "Atp",
    "AtpEnds",
    "AtpStar",
    "Attribution",
    "Gim",
    "IntegratedInputs",
    "IntegratedSite",
    "Method",
    "Relp",
    "check_request",
    "get_methods",
]

METHODS: dict[str, Callable[[], Method]] = {
    "atp": Atp,
    "atp_ends": AtpEnds,
    "atp_star": AtpStar,
    "atp_star_drop": lambda: AtpStar(name="atp_star_drop", grad_drop=True),
    "ig": IntegratedSite,
    "ig_inputs": IntegratedInputs,
    "relp": Relp,
    "relp_ah": lambda: Relp(name="relp_ah", fixed_pattern=True),
    "gim": Gim,
}

# methods that modify the backward pass -> a context in which graphs are built; for edges too
RULES: dict[str, Callable[[UnwrappedModel], AbstractContextManager[None]]] = {
    "relp": relevance_rules,
    "gim": gim_rules,
}


def get_methods(given: Sequence[str | Method]) -> tuple[Method, ...]:
    """Return the method for each name; instances of `Method` are returned unchanged.

    Raises:
        MethodError: a name is unknown or repeated, or `given` is empty.
    """
    if not given:
        raise MethodError("method is empty; name at least one, such as atp")
    methods = tuple(_get(method) for method in given)
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise MethodError(f"method={names} names a method twice; name each once")
    return methods


def _get(given: str | Method) -> Method:
    if isinstance(given, Method) and not isinstance(given, type):
        return given
    if not isinstance(given, str) or given not in METHODS:
        raise MethodError(
            f"method {given!r} is not known; use exact, screen or one of {', '.join(METHODS)}"
        )
    return METHODS[given]()
