"""What an analysis of joint patches with a tolerance stores and says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from patchsweep.results.tolerance import LINEAR, TOKEN_LAYERS
from patchsweep.spec.finite import names_of
from patchsweep.sweeps.executor import Values
from patchsweep.sweeps.joint_adaptive import AdaptivePatches

EXACT_COST = "_exact_token_layers"
# variables of a stage with a tolerance, beside "patched": what `AdaptivePatches.columns` holds
BESIDE = tuple("patched" + ending for ending in (LINEAR, TOKEN_LAYERS, EXACT_COST))


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
