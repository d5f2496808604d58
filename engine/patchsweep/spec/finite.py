"""Checks for NaN and infinity: they end a run, with an error that names the patch.

In a store NaN means that a cell has not run, so no computed value may be NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from patchsweep.errors import ModelError
from patchsweep.spec.metrics import Metric
from patchsweep.spec.plan import Ints, SitePlan

Values = NDArray[np.float32]


def check_finite(values: Values, names: Sequence[str], where: Callable[..., str]) -> Values:
    """Return `values` `[name, ...]` unchanged.

    `where(*indices)` describes the place at the indices after the first axis, for the message.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        name, *rest = bad[0].tolist()
        raise ModelError(
            f"{where(*rest)} gave {values[tuple(bad[0])]} for {names[name]} ({len(bad)} "
            f"of {values.size} numbers of this batch are not finite); check the metric and the "
            "values patched in; where float16 overflows (past 65504), use bfloat16 or float32"
        )
    return values


def check_cells(
    values: Values,
    plan: SitePlan,
    patches: Ints,
    metrics: Sequence[Metric],
    what: str = "the patch",
) -> Values:
    """Return `values` `[metric, patch]` unchanged; `what` begins the error message.

    Raises:
        ModelError: a value is NaN or infinite.
    """

    def where(column: int) -> str:
        return f"{what} of {plan.site.name} at {plan.place_of(int(patches[column]))}"

    return check_finite(values, names_of(metrics), where)


def check_references(
    base: Values, source: Values, pairs: Sequence[int], metrics: Sequence[Metric]
) -> tuple[Values, Values]:
    """Return the metrics `[metric, pair]` of the unpatched runs unchanged.

    Raises:
        ModelError: a value is NaN or infinite.
    """
    names = names_of(metrics)
    check_finite(base, names, lambda pair: f"the base run of pair {pairs[pair]}")
    check_finite(source, names, lambda pair: f"the source run of pair {pairs[pair]}")
    return base, source


def names_of(metrics: Sequence[Metric]) -> list[str]:
    """Return the names of `metrics`, as `check_finite` takes them."""
    return [metric.name for metric in metrics]
