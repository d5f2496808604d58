"""Rounding error that a run measured: the noise floor of its values, and the error of bf16.

Both are read from the run's Dataset. A run in fp32 has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.errors import SiteError

BF16, NOISE = "_bf16", "_noise"  # suffixes of the variables: raw bf16 values, noise floor


def noise_floor(ds: xr.Dataset, site: str) -> xr.DataArray | None:
    """Return the noise floor [metric, pair] at `site`; None if not measured.

    Effects below it are rounding noise. Estimates have none: rounding changes the product of
    two numbers only by a fraction of itself.
    """
    if site not in ds:
        raise SiteError(f"site={site!r} is not in the store; name a site that was swept")
    if site + NOISE not in ds:
        return None
    return ds[site + NOISE].transpose("metric", "pair").rename("noise")


def floor_of_mean(effects: xr.DataArray, floor: xr.DataArray) -> xr.DataArray:
    """Return the noise floor of the mean of `effects` over pairs, per cell, without the metric dim.

    Pairs round independently of each other, so the squares of their floors add up.
    """
    ran = effects.notnull()
    total = (floor**2).where(ran).sum("pair") ** 0.5 / ran.sum("pair").clip(min=1)
    dims = [dim for dim in effects.dims if dim not in ("pair", "metric")]
    return total.squeeze("metric", drop=True).transpose(*dims)


@dataclass(frozen=True)
class Noise:
    """The noise floor of one site and metric."""

    site: str
    metric: str
    floor: float  # largest over the pairs
    n_above: int  # cells of single pairs with an effect above the floor
    n_cells: int  # cells of single pairs that have run and have a nonzero effect


def noise_of(ds: xr.Dataset) -> list[Noise]:
    """Return the noise floors of a run and the number of effects above; empty in fp32."""
    floors = []
    for site in _sites_with(ds, NOISE):
        floor = noise_floor(ds, site)
        assert floor is not None
        size = abs(ds[site] - ds["base_metric"])
        for metric in ds["metric"].values:
            sizes, limit = size.sel(metric=metric), floor.sel(metric=metric)
            floors.append(
                Noise(
                    site=site,
                    metric=str(metric),
                    floor=float(limit.max()),
                    n_above=int((sizes > limit).sum()),
                    n_cells=int((sizes > 0).sum()),
                )
            )
    return floors


@dataclass(frozen=True)
class Bf16Error:
    """Error of a bf16 sweep at one site, over all metrics and pairs, measured by rechecks."""

    site: str
    n_again: int  # patches rechecked in fp32
    median: float  # of |bf16 - fp32| over rechecked patches
    quantile_99: float
    worst: float
    spearman: float  # of the effects in bf16 and in fp32
    noise: float  # largest noise floor of the effects that were not rechecked


def bf16_error(ds: xr.Dataset) -> list[Bf16Error]:
    """Return the measured error of every site swept in bf16; empty for other sweeps."""
    from scipy.stats import rankdata  # a local import, so that reading a store does not load scipy

    errors = []
    for site in _sites_with(ds, BF16):
        final, raw = ds[site], ds[site + BF16].transpose(*ds[site].dims)
        base = ds["base_metric"]
        rechecked = (final != raw).values & ~np.isnan(final.values)
        error = np.abs((final - raw).values[rechecked])
        if not len(error):
            continue
        ranks = [
            rankdata((x - base).transpose(*final.dims).values[rechecked]) for x in (final, raw)
        ]
        errors.append(
            Bf16Error(
                site=site,
                n_again=len(error),
                median=float(np.median(error)),
                quantile_99=float(np.quantile(error, 0.99)),
                worst=float(error.max()),
                spearman=float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(error) > 1 else 1.0,
                noise=float(ds[site + NOISE].max()),
            )
        )
    return errors


def _sites_with(ds: xr.Dataset, end: str) -> Iterator[str]:
    """Return the sites that have a variable with the suffix `end`."""
    return (str(name) for name in ds.data_vars if f"{name}{end}" in ds)
