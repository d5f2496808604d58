"""Attributes of results: stored flat, read nested.

netCDF allows only numbers and texts, so any other attribute (a mapping, a list, true, false, None)
is JSON text in `Dataset.attrs` and in a store's `zarr.json`. Write attributes through
`flat_attributes` and read them through `attributes`, which leaves nested values unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

_CONSTANTS = ("null", "true", "false")


def flat_attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `attrs` for netCDF: numbers and texts unchanged, other values as JSON text.

    Raises:
        TypeError: JSON cannot represent a value.
        ValueError: a nested number is NaN or infinite.
    """
    return {key: _flat(value) for key, value in attrs.items()}


def attributes(of: xr.Dataset | Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a Dataset (or the mapping given), with JSON text parsed.

    For example `attributes(ds)["provenance"]["weights_hash"]`. Tuples come back as lists.
    """
    attrs = of.attrs if hasattr(of, "attrs") else of
    return {str(key): _nested(value) for key, value in attrs.items()}


def _flat(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    return json.dumps(value, allow_nan=False)


def _nested(value: Any) -> Any:
    if isinstance(value, str) and (value[:1] in ("{", "[") or value in _CONSTANTS):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value  # a plain text that begins with a bracket
    return value
