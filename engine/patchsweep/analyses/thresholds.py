"""The stage of an analysis with a tolerance that chooses thresholds, before any value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from patchsweep.analyses.stages import Stages
from patchsweep.sweeps.calibration import EXACTLY, LEVELS, SampleSummary
from patchsweep.sweeps.executor import Values

_HEAD = 3  # numbers of a site before its errors: level, share, patches of the sample


def choose_thresholds(
    sites: Sequence[str],
    n_metrics: int,
    stages: Stages,
    calibrate: Callable[[], Mapping[str, SampleSummary]],
) -> dict[str, SampleSummary]:
    """Return what `calibrate` says of each site, from a stage: processes of a run use the same."""
    levels = [*LEVELS, EXACTLY]
    dims = {"pair": 1, "site": len(sites), "number": _HEAD + 6 * n_metrics}

    def block(_: range) -> tuple[dict[str, Values], None]:
        rows = [
            [levels.index(one.level), one.share, one.n, *one.errors.ravel()]
            for one in (found[name] for found in [calibrate()] for name in sites)
        ]
        return {"thresholds": np.array([rows], np.float32)}, None

    with stages.whole():
        ds = stages.run("thresholds", {"thresholds": dims}, 1, block)
        stages.wait()
    return {
        name: SampleSummary(
            levels[int(row[0])],
            float(row[1]),
            int(row[2]),
            row[_HEAD:].reshape(n_metrics, -1),
        )
        for name, row in zip(sites, ds["thresholds"].values[0], strict=True)
    }


def tolerance_words(tolerance: float | str | None) -> dict[str, Any]:
    """Return the setting of an identity; none for exact runs, as in stores of versions before."""
    return {} if tolerance is None else {"tolerance": tolerance}
