"""What a run with a tolerance says of its values: its thresholds, its sample's errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from patchsweep.store.attributes import attributes

TOKEN_LAYERS = "_token_layers"


def tolerance_notes(ds: xr.Dataset) -> list[str]:
    """Return a sentence per site of a run with `tolerance=`; none for other runs."""
    recorded = attributes(ds).get("adaptive")
    if not isinstance(recorded, dict):
        return []
    return [
        _note(ds, str(name), site, recorded.get("tolerance"))
        for name, site in recorded.get("sites", {}).items()
    ]


def allowed_error(ds: xr.Dataset) -> np.ndarray[Any, Any]:
    """Return the tolerance `[metric, pair]` in units of each metric; 0 for exact runs."""
    recorded = attributes(ds).get("adaptive")
    given = recorded.get("tolerance") if isinstance(recorded, dict) else 0.0
    gap = np.abs(ds["source_metric"].values - ds["base_metric"].values)
    if isinstance(given, str):
        return gap * float(given.removesuffix("%")) / 100
    return np.full_like(gap, float(given or 0.0))


def _note(ds: xr.Dataset, name: str, site: dict[str, Any], tolerance: Any) -> str:
    if not site["tau"]:
        return f"{name}: exact; no thresholds met the tolerance {tolerance} on the sample"
    errors = "; ".join(
        f"largest error {error:.2g}, median {site['median_error'][metric]:.2g} in {metric}"
        for metric, error in site["largest_error"].items()
    )
    counts = ds[name + TOKEN_LAYERS].isel(metric=0).values
    plan = attributes(ds)["plan"][name]
    ran = int((counts > 0).sum())
    return (
        f"{name}: tolerance {tolerance}; on a sample of {site['n']} patches run both ways: "
        f"{errors}; {ran} of {plan['n_live']} live patches ran, the others are linear "
        f"estimates; {np.nansum(counts) / max(1, plan['token_layers']):.1%} of the exact "
        "sweep's token-layers"
    )
