"""Attributes of results: flat where they are kept, nested where they are read.

netCDF takes numbers and texts alone, so whatever else an attribute is (a mapping, a list, true,
false, None) stands in `Dataset.attrs` and in a store's `zarr.json` as JSON text. Attributes are
written through `flat_attributes`, and those that may be nested are read through `attributes`, which
takes nested ones as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray as xr

_CONSTANTS = ("null", "true", "false")


def flat_attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """`attrs` as netCDF takes them: numbers and texts as they are, all else as JSON text.

    Flat attributes stay what they are.

    Raises:
        TypeError: a value is nothing that JSON knows.
        ValueError: a nested number is NaN or infinite.
    """
    return {key: _flat(value) for key, value in attrs.items()}


def attributes(of: xr.Dataset | Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a Dataset (or these attributes), JSON text read back into what it was.

    For example `attributes(ds)["provenance"]["weights_hash"]`. What was a tuple is a list.
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
            return value  # a text that begins with a bracket
    return value
