"""The noise floor: the change of a metric by rounding alone, measured in the run itself.

Identity patches write back the base run's own values, with the last bit of each number flipped. In
exact arithmetic a flip changes a metric by a few per cent of its change in 16 bits, so they measure
rounding: of the patched run after the patch, and of the base run. (Unchanged values often meet the
same roundings and then change nothing.) `<site>_noise` holds, per metric and pair, `FACTOR` times
the root mean square of the changes by `N_NULL` identity patches. Rounding errors that begin at
early layers are larger, so over all layers their distribution has heavy tails. About one in three
thousand patches without effect exceeds the floor, and lists of the largest of a few hundred cells
seldom hold one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from patchsweep.results.rounding import NOISE
from patchsweep.spec.finite import Values
from patchsweep.spec.plan import Ints, PatchSet, SitePlan
from patchsweep.spec.spec import Request

N_NULL = 32  # identity patches of each site and pair
FACTOR = 5.0  # times their root mean square


def null_cost(request: Request) -> int:
    """Return the approximate token-layers of a run's identity patches."""
    return round(
        sum(
            min(plan.n_live, plan.shape[0] * N_NULL) * plan.token_layers / max(1, plan.n_live)
            for plan in request.plans
        )
    )


def site_of(variable: str) -> str:
    """Return the site of a noise variable; a site's own name is unchanged."""
    return variable.removesuffix(NOISE)


def identity_patches(plan: SitePlan, pairs: Sequence[int]) -> PatchSet:
    """Draw the live patches of `pairs` that measure the noise, the same in every run."""
    patches = [np.empty(0, np.int64)]
    for pair in pairs:
        live = plan.live_patches([pair])
        rng = np.random.default_rng([zlib.crc32(plan.site.name.encode()), pair])
        patches.append(np.sort(rng.choice(live, min(N_NULL, len(live)), replace=False)))
    return PatchSet(plan, np.concatenate(patches))


class Floor:
    """The noise floor of one shard's pairs, filled batch by batch."""

    def __init__(self, plan: SitePlan, pairs: range, n_metrics: int) -> None:
        self.plan, self.pairs = plan, pairs
        self.values: Values = np.zeros((n_metrics, len(pairs)), np.float32)

    def put(self, null: Ints, change: Values) -> None:
        """Set the floors of the pairs of the patches `null` from `change` `[metric, patch]`."""
        pairs = self.plan.pair[null]
        for pair in np.unique(pairs).tolist():
            mean_square = np.square(change[:, pairs == pair], dtype=np.float64).mean(axis=1)
            self.values[:, pair - self.pairs.start] = FACTOR * np.sqrt(mean_square)
