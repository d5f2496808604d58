"""The noise floor: how far rounding alone moves a metric, measured in the run itself.

Null patches put a run's own values back with the last bit of each number turned. In exact
arithmetic that moves a metric by a few per cent of what it does in 16 bits, so what is measured is
rounding: that of the patched run from the patch on, and that of the base run. (Values put back
unchanged often meet the very same roundings, and then move nothing.) `<site>_noise` holds, per
metric and pair, `FACTOR` times the root mean square of what `N_NULL` null patches did. Rounding is
larger the earlier it begins, so its tails are heavy over all layers: of patches without any effect
about one in three thousand passes the floor, and lists of the largest of a few hundred cells seldom
hold one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from patchsweep.results.rounding import NOISE
from patchsweep.spec.plan import Ints, PatchSet, SitePlan
from patchsweep.spec.spec import Request, blocks_of
from patchsweep.store.layout import Variable

N_NULL = 32  # null patches of each site and pair
FACTOR = 5.0  # of their root mean square

Values = NDArray[np.float32]


def noise_variables(request: Request) -> tuple[Variable, ...]:
    """The noise floor of each site `[metric, pair]`, for stores."""
    blocks = blocks_of(request.plans)
    return tuple(
        Variable(
            name=plan.site.name + NOISE,
            dims=("metric", "pair"),
            shape=(len(request.metrics), len(request.pairs)),
            unit=(blocks[plan.site.name][0], 1),
            attrs={
                "long_name": f"effects at {plan.site.name} below this are rounding",
                "role": "noise",
                "site": plan.site.name,
            },
        )
        for plan in request.plans
    )


def null_cost(request: Request) -> int:
    """Token-layers of the null patches of a run, roughly."""
    return round(
        sum(
            min(plan.n_live, plan.shape[0] * N_NULL) * plan.token_layers / max(1, plan.n_live)
            for plan in request.plans
        )
    )


def site_of(variable: str) -> str:
    """The site whose noise the variable holds; a site's own name stays."""
    return variable.removesuffix(NOISE)


def identity_patches(plan: SitePlan, pairs: Sequence[int]) -> PatchSet:
    """The live patches of `pairs` by which the noise is measured, the same in every run."""
    found = [np.empty(0, np.int64)]
    for pair in pairs:
        live = plan.live_patches([pair])
        rng = np.random.default_rng([zlib.crc32(plan.site.name.encode()), pair])
        found.append(np.sort(rng.choice(live, min(N_NULL, len(live)), replace=False)))
    return PatchSet(plan, np.concatenate(found))


class Floor:
    """The noise floor of one unit's pairs, filled batch by batch."""

    def __init__(self, plan: SitePlan, pairs: range, n_metrics: int) -> None:
        self.plan, self.pairs = plan, pairs
        self.values: Values = np.zeros((n_metrics, len(pairs)), np.float32)

    def put(self, null: Ints, change: Values) -> None:
        """Keep what the patches `null` changed, `[metric, patch]`."""
        pair = self.plan.pair[null]
        for one in np.unique(pair).tolist():
            mean_square = np.square(change[:, pair == one], dtype=np.float64).mean(axis=1)
            self.values[:, one - self.pairs.start] = FACTOR * np.sqrt(mean_square)
