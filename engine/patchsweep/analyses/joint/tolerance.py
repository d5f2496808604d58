"""Stages of analyses with a tolerance: the thresholds first, then all values by them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from patchsweep.analyses.stages import Stages
from patchsweep.results.tolerance import LINEAR, TOKEN_LAYERS
from patchsweep.spec.finite import names_of
from patchsweep.sweeps.calibration import LEVELS
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.joint_adaptive import AdaptivePatches
from patchsweep.sweeps.thresholds import EXACTLY, SampleSummary

EXACT_COST = "_exact_token_layers"
# variables of a stage with a tolerance, beside "patched": what `AdaptivePatches.columns` holds
BESIDE = tuple("patched" + ending for ending in (LINEAR, TOKEN_LAYERS, EXACT_COST))
_HEAD = 3  # numbers of a site before its errors: level, share, patches of the sample


def choose_thresholds(
    patches: AdaptivePatches,
    stages: Stages,
    attrs: Mapping[str, Any],
    calibrate: Callable[[], Mapping[str, SampleSummary]],
) -> None:
    """Choose the thresholds of `patches` in a stage, so that all processes of a run use the same.

    Slices divide no stage that follows.
    """
    levels = [*LEVELS, EXACTLY]
    n_metrics = len(patches.request.metrics)
    dims = {"pair": 1, "site": len(patches.sites), "number": _HEAD + 6 * n_metrics}

    def block(_: range) -> tuple[dict[str, Values], None]:
        rows = [
            [levels.index(one.level), one.share, one.n, *one.errors.ravel()]
            for one in (found[name] for found in [calibrate()] for name in patches.sites)
        ]
        return {"thresholds": np.array([rows], np.float32)}, None

    ds = stages.run("thresholds", {"thresholds": dims}, 1, block, attrs=attrs)
    stages.wait()
    table = ds["thresholds"].values[0]
    patches.summaries = {
        name: SampleSummary(
            levels[int(row[0])],
            float(row[1]),
            int(row[2]),
            row[_HEAD:].reshape(n_metrics, -1),
        )
        for name, row in zip(patches.sites, table, strict=True)
    }


def tolerance_words(tolerance: float | str | None) -> dict[str, Any]:
    """Return the setting of an identity; none for exact runs, as in stores of versions before."""
    return {} if tolerance is None else {"tolerance": tolerance}


def adaptive_attributes(
    patches: AdaptivePatches,
    n_live: Mapping[str, int],
    ran: Mapping[str, Values],
    exact: Mapping[str, Values],
) -> dict[str, Any]:
    """Return what results say of their tolerance, as stores of sweeps do.

    `ran`, `exact`: token-layers `[metric, ...]` of each site's patches, and those of exact runs.
    """
    names = names_of(patches.request.metrics)
    return {
        "tolerance": patches.tolerance,
        "sites": {
            name: {
                **patches.summaries[name].attributes(names),
                "n_live": n_live[name],
                "token_layers": float(np.nansum(ran[name][0], dtype=np.float64)),
                "exact_token_layers": float(np.nansum(exact[name][0], dtype=np.float64)),
            }
            for name in patches.sites
        },
    }
