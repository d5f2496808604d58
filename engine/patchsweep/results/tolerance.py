"""What a run with a tolerance says of its values: its thresholds, its sample's errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from patchsweep.data.show import number
from patchsweep.store.attributes import attributes
from patchsweep.store.difference import ADAPTIVE

LINEAR, TOKEN_LAYERS = "_linear", "_token_layers"  # endings of the variables beside a site's


def in_units(
    tolerance: float | str | None, base: np.ndarray[Any, Any], source: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Return a tolerance in units of each metric, in the shape of `base` and `source`.

    A text such as "1%" is a share of |source - base|; None is 0.
    """
    gap = np.abs(source - base)
    if isinstance(tolerance, str):
        return np.float32(float(tolerance.removesuffix("%")) / 100) * gap
    return np.full_like(gap, float(tolerance or 0.0))


def tolerance_notes(ds: xr.Dataset) -> list[str]:
    """Return a sentence per site of a run with `tolerance=`; none for other runs."""
    recorded = attributes(ds).get(ADAPTIVE)
    if not isinstance(recorded, dict):
        return []
    return [
        _note(ds, str(name), site, recorded.get("tolerance"))
        for name, site in recorded.get("sites", {}).items()
    ]


def allowed_error(ds: xr.Dataset) -> np.ndarray[Any, Any]:
    """Return the tolerance `[metric, pair]` in units of each metric; 0 for exact runs."""
    recorded = attributes(ds).get(ADAPTIVE)
    given = recorded.get("tolerance") if isinstance(recorded, dict) else None
    return in_units(given, ds["base_metric"].values, ds["source_metric"].values)


def _note(ds: xr.Dataset, name: str, site: dict[str, Any], tolerance: Any) -> str:
    if not site["n"]:
        return f"{name}: exact; no patch is one that a tolerance makes cheaper"
    if not site["tau"]:
        return f"{name}: exact; no thresholds met the tolerance {tolerance} on the sample"
    errors = "; ".join(
        f"largest error {number(error)}, median {number(site['median_error'][metric])} in {metric}"
        for metric, error in site["largest_error"].items()
    )
    what, ran, exact = _counts(ds, name, site)
    return (
        f"{name}: tolerance {tolerance}; on a sample of {site['n']} patches run both ways: "
        f"{errors}; {what}; {ran / max(1, exact):.1%} of the exact sweep's token-layers"
    )


def _counts(ds: xr.Dataset, name: str, site: dict[str, Any]) -> tuple[str, float, float]:
    """Return words on a site's live patches, their token-layers, and those of exact runs."""
    if "token_layers" in site:  # of an analysis: all its patches start
        return f"{site['n_live']} live patches", site["token_layers"], site["exact_token_layers"]
    counts = ds[name + TOKEN_LAYERS].isel(metric=0).values
    plan = attributes(ds)["plan"][name]
    linear = (ds[name + LINEAR] != 0).any("metric").values
    estimated = int((linear & (counts == 0)).sum())
    words = f"{estimated} of {plan['n_live']} live patches are linear estimates"
    return words, float(np.nansum(counts)), float(plan["token_layers"])
