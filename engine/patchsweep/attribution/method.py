"""What an attribution method is."""

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
        """As stores and the command line know it."""

    @property
    def at_base(self) -> bool:
        """Whether it looks at the gradient of the base run alone."""

    def run(self, work: Work) -> Found:
        """The estimates of all sites of `work`."""

    def extra_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """Sites whose activations it needs besides those it is asked about."""

    def passes(self, plans: tuple[SitePlan, ...], n_layers: int, n_metrics: int) -> float:
        """Full forward passes it makes, a backward pass counted as one (weights take none)."""
