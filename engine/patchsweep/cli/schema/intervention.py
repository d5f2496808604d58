"""The key `intervention`: a name, a number, `scale(0.5)`, or a mapping of names to such."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from patchsweep.errors import ConfigError
from patchsweep.spec.directions import Scale

_SCALE = re.compile(r"scale\((.*)\)")


def read_intervention(given: Any) -> Any:
    """Return what `sweep` takes as its intervention, or interventions, for a value of the key.

    Raises:
        ConfigError: the factor of a scale is no number.
    """
    if isinstance(given, Mapping):
        return {str(name): _one(value) for name, value in given.items()}
    return _one(given)


def _one(given: Any) -> Any:
    scale = _SCALE.fullmatch(given) if isinstance(given, str) else None
    if scale is None:
        return given
    try:
        return Scale(float(scale[1]))
    except ValueError:
        raise ConfigError(
            f"intervention={given} has the factor {scale[1]!r}; give a number, as in scale(0.5)"
        ) from None
