"""Findings of latents: those with the largest effects, and how far estimates agree with them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.arguments import whole_number


@dataclass(frozen=True)
class LatentEffect:
    """One latent at one position of one pair, and what patching it does to the metric."""

    dictionary: str
    layer: int
    latent: int
    pos: int
    token: str
    change: float  # of its activation
    effect: float  # exact, in the metric's unit
    estimates: dict[str, float]  # method -> estimate


@dataclass(frozen=True)
class Agreement:
    """How far the estimates of one method agree with the exact effects."""

    method: str
    pearson: float
    same_sign: float  # share of the patches, each weighed by its |effect|
    n: int  # live patches that ran exactly


def effects_of(ds: xr.Dataset, metric: str | None = None) -> xr.DataArray:
    """Return the exact effects [pair, pos, latent] of one metric, by default the first."""
    name = str(ds["metric"].values[0]) if metric is None else metric
    one = ds.sel(metric=name)
    return (one["patched"] - one["base_metric"]).transpose("pair", "pos", "latent")


def largest_latents(
    ds: xr.Dataset, metric: str | None = None, pair: int = 0, n: int = 10
) -> list[LatentEffect]:
    """Return the `n` latents and positions of one pair with the largest |effect|, largest first.

    Where nothing ran exactly, the first method's estimates decide. `metric` defaults to the first.
    """
    whole_number("n", n, least=1)
    name = str(ds["metric"].values[0]) if metric is None else metric
    one = ds.sel(metric=name).isel(pair=pair)
    methods = methods_of(ds)
    estimates = {m: one[m].transpose("pos", "latent").values for m in methods}
    exact = effects_of(ds, name).isel(pair=pair).values
    ranked = exact if np.isfinite(exact).any() or not methods else estimates[methods[0]]
    change = one["change"].transpose("pos", "latent").values
    size = np.where(change != 0, np.abs(np.nan_to_num(ranked)), 0.0)
    order = np.argsort(-size, axis=None, kind="stable")[: min(n, int((size > 0).sum()))]
    found = []
    for pos, column in (np.unravel_index(i, size.shape) for i in order):
        found.append(
            LatentEffect(
                dictionary=str(ds["dictionary"].values[column]),
                layer=int(ds["latent_layer"].values[column]),
                latent=int(ds["latent_number"].values[column]),
                pos=int(pos),
                token=str(one["base_token"].values[pos]),
                change=float(change[pos, column]),
                effect=float(exact[pos, column]),
                estimates={m: float(x[pos, column]) for m, x in estimates.items()},
            )
        )
    return found


def agreement(ds: xr.Dataset, metric: str | None = None) -> list[Agreement]:
    """Return Pearson's r of each method's estimates with the exact effects, over live patches."""
    name = str(ds["metric"].values[0]) if metric is None else metric
    exact = effects_of(ds, name).values
    change = ds["change"].transpose("pair", "pos", "latent").values
    live = np.isfinite(exact) & (np.nan_to_num(change) != 0)
    found = []
    for method in methods_of(ds):
        estimate = ds[method].sel(metric=name).transpose("pair", "pos", "latent").values[live]
        effect = exact[live]
        able = len(effect) > 1 and effect.std() > 0 and estimate.std() > 0
        weight = np.abs(effect)
        same = (weight * (np.sign(estimate) == np.sign(effect))).sum()
        found.append(
            Agreement(
                method=method,
                pearson=float(np.corrcoef(estimate, effect)[0, 1]) if able else float("nan"),
                same_sign=float(same / weight.sum()) if weight.sum() else float("nan"),
                n=int(live.sum()),
            )
        )
    return found


def methods_of(ds: xr.Dataset) -> list[str]:
    """Return the methods whose estimates a Dataset of latents holds."""
    return [str(x) for x in ds.data_vars if ds[x].attrs.get("role") == "estimate"]
