"""`dataset.patchsweep`: reading, exporting and drawing a Dataset of results."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xarray as xr

from patchsweep.results import accessor as summary
from patchsweep.results import export
from patchsweep.results.rounding import noise_floor
from patchsweep.store.attributes import attributes

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from patchsweep.notebook.drawing import Drawing
    from patchsweep.notebook.report import Report


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

    def effect(self, site: str) -> xr.DataArray:
        """See `patchsweep.results.accessor.effect`."""
        return summary.effect(self._ds, site)

    def recovered(self, site: str) -> xr.DataArray:
        """See `patchsweep.results.accessor.recovered`."""
        return summary.recovered(self._ds, site)

    def noise_floor(self, site: str) -> xr.DataArray | None:
        """See `patchsweep.results.rounding.noise_floor`."""
        return noise_floor(self._ds, site)

    def effect_mean(self, site: str) -> xr.DataArray:
        """See `patchsweep.results.accessor.effect_mean`."""
        return summary.effect_mean(self._ds, site)

    def recovered_mean(self, site: str) -> xr.DataArray:
        """See `patchsweep.results.accessor.recovered_mean`."""
        return summary.recovered_mean(self._ds, site)

    def n_pairs(self, site: str) -> xr.DataArray:
        """See `patchsweep.results.accessor.n_pairs`."""
        return summary.n_pairs(self._ds, site)

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

    def to_dataframe(self, site: str | None = None) -> pd.DataFrame:
        """See `patchsweep.results.export.to_dataframe`."""
        return export.to_dataframe(self._ds, site)

    def to_parquet(self, path: str | PathLike[str], site: str | None = None) -> Path:
        """See `patchsweep.results.export.to_parquet`."""
        return export.to_parquet(self._ds, path, site)

    def to_netcdf(self, path: str | PathLike[str]) -> Path:
        """See `patchsweep.results.export.to_netcdf`."""
        return export.to_netcdf(self._ds, path)

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
