"""`dataset.patchsweep`: reading, exporting and drawing a Dataset of results."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import xarray as xr

from patchsweep.results import accessor as summary
from patchsweep.results import export
from patchsweep.results.rounding import noise_floor
from patchsweep.store.attributes import attributes

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from patchsweep.notebook.drawing import Drawing
    from patchsweep.notebook.report import Report


P = ParamSpec("P")
R = TypeVar("R")


def _of_dataset(
    function: Callable[Concatenate[xr.Dataset, P], R],
) -> Callable[Concatenate[PatchsweepAccessor, P], R]:
    """Return the method that calls `function` with the accessor's Dataset."""

    @wraps(function)
    def method(self: PatchsweepAccessor, *args: P.args, **kwargs: P.kwargs) -> R:
        return function(self._ds, *args, **kwargs)

    return method


class PatchsweepAccessor:
    """`ds.patchsweep`: effects, tables, files and figures of a Dataset."""

    def __init__(self, ds: xr.Dataset) -> None:
        self._ds = ds

    @property
    def attributes(self) -> dict[str, Any]:
        """See `patchsweep.store.attributes.attributes`."""
        return attributes(self._ds)

    @property
    def sites(self) -> tuple[str, ...]:
        """See `patchsweep.results.accessor.sites`."""
        return summary.sites(self._ds)

    effect = _of_dataset(summary.effect)
    recovered = _of_dataset(summary.recovered)
    noise_floor = _of_dataset(noise_floor)
    effect_mean = _of_dataset(summary.effect_mean)
    recovered_mean = _of_dataset(summary.recovered_mean)
    n_pairs = _of_dataset(summary.n_pairs)
    to_dataframe = _of_dataset(export.to_dataframe)
    to_parquet = _of_dataset(export.to_parquet)
    to_netcdf = _of_dataset(export.to_netcdf)

    def largest(
        self,
        site: str,
        n: int = 10,
        *,
        metric: str | None = None,
        pair: int | None = None,
        placebo: xr.Dataset | None = None,
    ) -> summary.Effects:
        """See `patchsweep.results.accessor.largest`; `pair=None` ranks the mean over pairs."""
        return summary.largest(self._ds, site, metric, n, pair=pair, placebo=placebo)

    def plot(
        self,
        site: str,
        *,
        metric: str | None = None,
        pair: int | None = None,
        quantity: str | None = None,
        placebo: xr.Dataset | None = None,
    ) -> go.Figure:
        """See `patchsweep.notebook.figures.plot`."""
        from patchsweep.notebook import figures

        return figures.plot(
            self._ds, site, metric=metric, pair=pair, quantity=quantity, placebo=placebo
        )

    def scatter(self, site: str, method: str, *, metric: str | None = None) -> go.Figure:
        """See `patchsweep.notebook.figures.scatter`."""
        from patchsweep.notebook import figures

        return figures.scatter(self._ds, site, method, metric=metric)

    def plot_edges(self, n: int = 40, *, metric: str | None = None) -> Drawing:
        """See `patchsweep.notebook.drawing.plot_edges`."""
        from patchsweep.notebook import drawing

        return drawing.plot_edges(self._ds, n, metric=metric)

    def report(self) -> Report:
        """See `patchsweep.notebook.report.report`."""
        from patchsweep.notebook import report

        return report.report(self._ds)
