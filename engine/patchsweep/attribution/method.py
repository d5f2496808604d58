"""The protocol of an attribution method."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from patchsweep.attribution.estimates import Found, Work
from patchsweep.spec.plan import SitePlan
from patchsweep.spec.sites import Site


@runtime_checkable
class Method(Protocol):
    """Estimates metric(patched) - metric(base) for every patch of some sites.

    Estimates are signed, per pair, in the metric's unit.
    """

    @property
    def name(self) -> str:
        """Name in stores and on the command line."""

    @property
    def at_base(self) -> bool:
        """Whether the method takes gradients only at the base run."""

    def run(self, work: Work) -> Found:
        """Return the estimates for all sites of `work`."""

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Return the sites whose activations the method needs besides `sites`."""

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """Return the number of full forward passes; a backward pass counts as one forward pass."""


def states_of(method: Method) -> tuple[str, ...]:
    """Return what a method states besides its estimates: "error", "residual", "nodes"."""
    return tuple(getattr(method, "states", ()))
