"""Shards: how many pairs and layers one has, and which sites share packed batches.

Both follow from the plans alone, so that every machine divides a run in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from patchsweep.spec.plan import SitePlan

# Tokens of live patches in one shard: enough to fill one packed batch on a GPU (GPU_TOKENS in
# runners.packed.budget) or four on a CPU; no more, so that a killed run loses little.
UNIT_TOKENS = 16_384


def blocks_of(plans: Sequence[SitePlan]) -> dict[str, tuple[int, int]]:
    """Return, per site, how many pairs and how many layer sets one shard has.

    The sizes follow from the plans alone, so that every machine divides a run in the same way. All
    sites divide the pairs in the same way: then a pair's unpatched runs share a batch with the same
    other pairs in every shard, and have the same bits whichever shard comes first.
    """
    blocks = {plan.site.name: _blocks_of(plan) for plan in plans}
    n_pairs = min(pairs for pairs, _ in blocks.values())
    return {name: (n_pairs, layers) for name, (_, layers) in blocks.items()}


def site_groups_of(plans: Sequence[SitePlan]) -> dict[str, int]:
    """Return, per site, the number of its site group; the sites of a group share packed batches.

    Sites with small shards are grouped. Alone, their first and last blocks would hold a few hundred
    tokens, too few for the full speed of a matrix product. Like the shards, site groups follow
    from the plans alone.
    """
    blocks = blocks_of(plans)
    group_of: dict[str, int] = {}
    sizes: list[float] = []  # tokens of each site group
    for plan in sorted(plans, key=lambda plan: plan.site.name):  # independent of the user's order
        n_pairs, n_layers = blocks[plan.site.name]
        all_layers = n_layers == plan.shape[1]
        tokens = _tokens_per_pair(plan) * n_pairs if all_layers else np.inf
        room = (i for i, size in enumerate(sizes) if size + tokens <= UNIT_TOKENS)
        number = next(room, len(sizes))
        if number == len(sizes):
            sizes.append(0.0)
        sizes[number] += tokens
        group_of[plan.site.name] = number
    return group_of


def _tokens_per_pair(plan: SitePlan) -> float:
    return max(1, int(plan.live_by_layer()[1].sum())) / plan.shape[0]


def _blocks_of(plan: SitePlan) -> tuple[int, int]:
    n_pairs, n_layers = plan.shape[:2]
    per_pair = _tokens_per_pair(plan)
    if per_pair <= UNIT_TOKENS:
        return min(n_pairs, max(1, int(UNIT_TOKENS // per_pair))), n_layers
    n_blocks = min(n_layers, -(-int(per_pair) // UNIT_TOKENS))
    return 1, -(-n_layers // n_blocks)
