"""Disagreement of each ablation with resample, class by class."""

from __future__ import annotations

import numpy as np
import xarray as xr

from patchsweep.analyses.heads.ablations import REFERENCE
from patchsweep.results.statistics import spearman

ALL = "all"  # further row of the table: every head
_TABLES = ("mean_effect", "disagreement", "rank_correlation")
TRAINED = "with_constant"  # further row with optimal ablation: heads that have a constant


def effects(ds: xr.Dataset) -> xr.DataArray:
    """Return ablated - clean, [ablation, metric, pair, layer(, pos), head], in the metric's unit.

    Negative where ablating the head lowers the metric, that is, where the head raises it.
    """
    return (ds["ablated"] - ds["base_metric"]).transpose(*ds["ablated"].dims)


def disagreement(ds: xr.Dataset) -> xr.Dataset:
    """Compare each ablation with resample, [metric, ablation, table_class].

    Table classes are the head classes, `all` and, with optimal ablation, `with_constant`, whose
    heads are the same for all ablations. Effects are means over pairs, in the metric's unit.

    `mean_effect`: mean effect over the heads of a class. `disagreement`: mean over heads of
    |effect - resample's effect|. `rank_correlation`: Spearman's over heads; NaN for fewer than
    three heads, or if all effects are equal. `n_heads` [ablation, table_class]: number of heads
    compared; optimal covers those with a constant. With single positions, each position of a head
    counts as one.
    """
    mean = (
        effects(ds).mean("pair", skipna=False).transpose("ablation", "metric", "head", "layer", ...)
    )
    values = mean.values.reshape(*mean.shape[:4], -1)  # [ablation, metric, head, layer, cell]
    member = ds["member"].transpose("head_class", "head", "layer").values
    names = [*ds["head_class"].values.tolist(), ALL]
    masks = [*member, np.ones_like(member[0])]
    if "optimal_loss" in ds:
        loss = ds["optimal_loss"].isel(training=0).transpose("head", "layer").values
        names.append(TRAINED)
        masks.append(np.isfinite(loss))
    reference = ds["ablation"].values.tolist().index(REFERENCE)
    n_ablations, n_metrics = values.shape[:2]
    shape = (n_metrics, n_ablations, len(names))
    tables = {name: np.full(shape, np.nan) for name in _TABLES}
    n_heads = np.zeros(shape[1:], int)
    for a in range(n_ablations):
        for c, mask in enumerate(masks):
            ablation_effects = values[a][:, mask].reshape(n_metrics, -1)
            resample_effects = values[reference][:, mask].reshape(n_metrics, -1)
            ran = np.isfinite(ablation_effects).all(axis=0) & np.isfinite(resample_effects).all(
                axis=0
            )
            n_heads[a, c] = ran.sum()
            for m in range(n_metrics):
                x, y = ablation_effects[m, ran], resample_effects[m, ran]
                if len(x):
                    tables["mean_effect"][m, a, c] = x.mean()
                    tables["disagreement"][m, a, c] = np.abs(x - y).mean()
                tables["rank_correlation"][m, a, c] = spearman(x, y)
    dims = ("metric", "ablation", "table_class")
    return xr.Dataset(
        {
            **{name: (dims, table.astype(np.float32)) for name, table in tables.items()},
            "n_heads": (dims[1:], n_heads),
        },
        coords={
            "table_class": np.array(names, dtype=object),
            **{dim: ds[dim] for dim in ("metric", "ablation") if dim in ds.coords},
        },
    )
