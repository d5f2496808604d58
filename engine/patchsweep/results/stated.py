"""The errors that estimates state: integrals far from converged, ends that dispute a sign."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.data.show import number
from patchsweep.results.accessor import ERROR, estimates

EDGES = "edge_eap_ig"  # variable of integrated estimates of edges
FAR = 0.05  # a stated error above this share of the largest estimate is called far from converged


@dataclass(frozen=True)
class Stated:
    """What the estimates of one site, method and metric state of their errors."""

    name: str  # variable of the estimates
    site: str
    method: str
    metric: str
    largest: float  # largest stated error, in the metric's unit
    share: float  # of the largest |estimate| of its pair; the largest over pairs
    n_far: int  # cells whose error is above `FAR` of the largest estimate of their pair
    n_disputed: int  # cells whose error exceeds their estimate, among those not negligible
    n_cells: int  # cells with an estimate that is not zero
    residual: float  # largest |residual| of a path, in the metric's unit; NaN: none is stored
    nodes: float  # most gradients in one integral; NaN: as many as were asked for

    @property
    def words(self) -> str:
        """The statement as a sentence."""
        if self.method == "atp_ends":
            return (
                f"{self.name}: the gradients of both prompts dispute the sign of "
                f"{self.n_disputed} of {self.n_cells} estimates in {self.metric}; look at these "
                "exactly first"
            )
        text = (
            f"{self.name}: integrals are within {number(self.largest)} in {self.metric} of "
            f"converged, {self.share:.1%} of the largest estimate"
        )
        if np.isfinite(self.nodes):
            text += f", with up to {self.nodes:.0f} gradients"
        if np.isfinite(self.residual):
            text += f"; what adds up misses the true effect by up to {number(self.residual)}"
        if self.share > FAR:
            text += (
                f". {self.n_far} of {self.n_cells} are far from converged: use more steps, or auto"
            )
        return text


def stated_errors(ds: xr.Dataset) -> list[Stated]:
    """Return what estimates state, by variable and metric; empty if none does."""
    found = []
    of_edges = {EDGES: ("edges", EDGES.removeprefix("edge_"))} if EDGES in ds else {}
    for name, (site, method) in (of_edges or estimates(ds)).items():
        if name + ERROR not in ds:
            continue
        for metric in [str(m) for m in ds["metric"].values]:
            one = ds.sel(metric=metric)
            found.append(_stated(one, name, site, method, metric))
    return found


def _stated(ds: xr.Dataset, name: str, site: str, method: str, metric: str) -> Stated:
    estimate = np.abs(ds[name].transpose("pair", ...).values)
    error = ds[name + ERROR].transpose("pair", ...).values
    estimate, error = estimate.reshape(len(estimate), -1), error.reshape(len(error), -1)
    scale = np.nanmax(estimate, axis=1, initial=0.0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = np.where(scale > 0, error / scale, 0.0)
    real = estimate > 0
    residuals = [ds[x] for x in (f"{name}_residual", f"{method}_residual") if x in ds]
    nodes = [ds[x] for x in (f"{name}_nodes", f"{method}_nodes") if x in ds]
    return Stated(
        name=name,
        site=site,
        method=method,
        metric=metric,
        largest=float(np.nanmax(error, initial=0.0)),
        share=float(np.nanmax(shares, initial=0.0)),
        n_far=int((shares > FAR).sum()),
        n_disputed=int((real & (error > estimate) & (error > 1e-3 * scale)).sum()),
        n_cells=int(real.sum()),
        residual=float(np.nanmax(np.abs(residuals[0].values))) if residuals else np.nan,
        nodes=float(np.nanmax(nodes[0].values)) if nodes else np.nan,
    )
