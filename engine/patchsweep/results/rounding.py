"""What a run measured of its own rounding: the noise floor of its values, the error of bf16.

Both are read from the Dataset of a run. A run in fp32 has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

BF16, NOISE = "_bf16", "_noise"  # ends of the variables, see `proof` and `noise`


def noise_floor(ds: xr.Dataset, site: str) -> xr.DataArray | None:
    """[metric, pair]: effects at `site` below it are rounding; None where none was measured.

    Of estimates there is none: rounding changes a product of two numbers by a share of it.
    """
    if site + NOISE not in ds:
        return None
    return ds[site + NOISE].transpose("metric", "pair").rename("noise")


def floor_of_mean(effects: xr.DataArray, floor: xr.DataArray) -> xr.DataArray:
    """The noise floor of the mean over pairs of `effects`, cell by cell, its metric dropped.

    Pairs round independently of each other, so their floors add up as squares do.
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
    n_above: int  # cells of single pairs whose effect is above the floor
    n_cells: int  # that have run and whose effect is not exactly zero


def noise_of(ds: xr.Dataset) -> list[Noise]:
    """The noise floors of a run, and how many of its effects lie above; empty in fp32."""
    found = []
    for site in _sites_with(ds, NOISE):
        floor = noise_floor(ds, site)
        assert floor is not None
        size = abs(ds[site] - ds["base_metric"])
        for metric in ds["metric"].values:
            mine, limit = size.sel(metric=metric), floor.sel(metric=metric)
            found.append(
                Noise(
                    site=site,
                    metric=str(metric),
                    floor=float(limit.max()),
                    n_above=int((mine > limit).sum()),
                    n_cells=int((mine > 0).sum()),
                )
            )
    return found


@dataclass(frozen=True)
class Bf16Error:
    """What a bf16 sweep measured of its own error at one site, over all metrics and pairs."""

    site: str
    n_again: int  # patches that were run again in fp32
    median: float  # of |bf16 - fp32| over them
    quantile_99: float
    worst: float
    spearman: float  # of the effects in bf16 and in fp32
    noise: float  # the noise floor of the effects that were not run again, the largest


def bf16_error(ds: xr.Dataset) -> list[Bf16Error]:
    """The measured error of every site that was swept in bf16; empty for other sweeps."""
    from scipy.stats import rankdata  # here, so that reading a store does not load it

    found = []
    for site in _sites_with(ds, BF16):
        proven, raw = ds[site], ds[site + BF16].transpose(*ds[site].dims)
        base = ds["base_metric"]
        again = (proven != raw).values & ~np.isnan(proven.values)
        error = np.abs((proven - raw).values[again])
        if not len(error):
            continue
        ranks = [rankdata((x - base).transpose(*proven.dims).values[again]) for x in (proven, raw)]
        found.append(
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
    return found


def _sites_with(ds: xr.Dataset, end: str) -> Iterator[str]:
    """The sites of which there is a variable with this end."""
    return (str(name) for name in ds.data_vars if f"{name}{end}" in ds)
