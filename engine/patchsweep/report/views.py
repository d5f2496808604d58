"""The views that a reader can select: the mean over pairs, or one pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from patchsweep.data.show import visible
from patchsweep.results import accessor as summary

MAX_PAIRS = 64  # up to this many pairs, each can be chosen in the page
FEW_PAIRS = 8  # beyond that, only the mean and this many
MAX_BYTES = 4_000_000  # all single pairs together add at most this much to the page

_BASE64 = 4 / 3
_FLOAT32 = 4


@dataclass(frozen=True)
class View:
    """The mean over pairs or one pair, with tokens as labels of its positions."""

    key: str  # unique in the page: "mean", or the pair's number
    pair: int | None  # pair coordinate; None for the mean over pairs
    label: str  # text in the selector
    first: int  # index of its prompt's first position in the store
    n_pos: int  # past the last of them
    base_tokens: tuple[str, ...]  # visible text per position; "" where the pairs differ
    source_tokens: tuple[str, ...]  # likewise
    differs: tuple[bool, ...]  # per position: base and source token differ in any of its pairs
    n_pairs: tuple[int, ...] = ()  # of a mean: pairs per position; () where all have it


def by_intervention(ds: xr.Dataset) -> xr.Dataset:
    """Return the Dataset of several interventions with each metric once for each of them.

    The page's selector of metrics then chooses both. Another Dataset is returned as it is.
    """
    if "intervention" not in ds.dims:
        return ds
    parts = []
    for name in ds["intervention"].values:
        one = ds.sel(intervention=name, drop=True)
        labels = [f"{metric}, {name}" for metric in one["metric"].values]
        parts.append(one.assign_coords(metric=np.array(labels, dtype=object)))
    return xr.concat(parts, "metric", data_vars="minimal", combine_attrs="override")


def has_source(ds: xr.Dataset) -> bool:
    """Whether the run has a source prompt, so that recovered fractions exist."""
    resampled = ds.attrs.get("intervention", "resample") == "resample"
    return resampled or bool(ds["source_metric"].notnull().any())


def choose_views(ds: xr.Dataset, names: tuple[str, ...]) -> tuple[View, ...]:
    """Return the mean (if there are several pairs), then the pairs that fit into the page."""
    pairs = [int(p) for p in ds["pair"].values]
    cells = sum(ds[name].size for name in names) // max(1, len(pairs))
    fit = int(MAX_BYTES // max(1.0, cells * _FLOAT32 * _BASE64))
    n = len(pairs) if len(pairs) <= MAX_PAIRS else FEW_PAIRS
    single = [_one(ds, pair) for pair in pairs[: max(1, min(n, fit))]]
    return tuple(single) if len(pairs) == 1 else (_mean(ds, len(pairs)), *single)


def _mean(ds: xr.Dataset, n_pairs: int) -> View:
    base, source = _tokens(ds, "base_token", None), _tokens(ds, "source_token", None)
    return View(
        "mean",
        None,
        f"mean over {n_pairs} pairs",
        0,
        ds.sizes.get("pos", 0),
        base,
        source,
        _differs(ds),
        _pairs_per_position(ds),
    )


def _one(ds: xr.Dataset, pair: int) -> View:
    base, source = _tokens(ds, "base_token", pair), _tokens(ds, "source_token", pair)
    at = [i for i, token in enumerate(base) if token] or range(ds.sizes.get("pos", 0))
    first, n_pos = (at[0], at[-1] + 1) if at else (0, 0)
    label = f"pair {pair}"
    if {"answer", "wrong_answer"} <= set(ds.variables):
        right, wrong = (
            visible(str(ds[name].sel(pair=pair).item())) for name in ("answer", "wrong_answer")
        )
        label += f": {right} / {wrong}"
    differs = _differs(ds.sel(pair=[pair]))
    return View(str(pair), pair, label, first, n_pos, base, source, differs)


def _pairs_per_position(ds: xr.Dataset) -> tuple[int, ...]:
    """Return how many pairs have each position; () if all pairs have all of them."""
    if "base_token" not in ds.variables or "pos" not in ds["base_token"].dims:
        return ()
    counts = (ds["base_token"].transpose("pair", "pos").values != "").sum(axis=0).tolist()
    return () if set(counts) <= {ds.sizes["pair"]} else tuple(counts)


def _tokens(ds: xr.Dataset, name: str, pair: int | None) -> tuple[str, ...]:
    return tuple(visible(t or "") for t in summary.shared_tokens(ds, pair, name))


def _differs(ds: xr.Dataset) -> tuple[bool, ...]:
    known = {"base_token", "source_token"} <= set(ds.variables) and "pos" in ds["base_token"].dims
    if not (known and has_source(ds)):
        return (False,) * ds.sizes.get("pos", 0)
    unequal = ds["base_token"].values != ds["source_token"].values
    return tuple(bool(x) for x in unequal.any(axis=0))
