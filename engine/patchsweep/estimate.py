"""What a sweep will cost, told before anything runs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from patchsweep.planner import SitePlan
from patchsweep.request import Request, blocks_of, bytes_of, device_of


@dataclass(frozen=True)
class SiteCost:
    """The cost of one site's patches."""

    site: str
    n_patches: int
    n_live: int
    n_units: int  # units of work, each of which owns whole shards of a store
    n_waves: int
    token_layers: int
    loop_token_layers: int  # what one full forward pass per patch would need


@dataclass(frozen=True)
class Cost:
    """The cost of a sweep."""

    sites: tuple[SiteCost, ...]
    flops: float  # multiplications and additions of the blocks' weights, for all waves
    seconds: float  # at the matrix-product rate measured just now; attention and norms left out
    result_bytes: int  # values written
    cache_bytes: int  # activations kept of one pair's base and source runs

    @property
    def n_patches(self) -> int:
        return sum(site.n_patches for site in self.sites)

    @property
    def n_live(self) -> int:
        return sum(site.n_live for site in self.sites)

    @property
    def n_waves(self) -> int:
        return sum(site.n_waves for site in self.sites)

    @property
    def token_layers(self) -> int:
        return sum(site.token_layers for site in self.sites)

    @property
    def loop_token_layers(self) -> int:
        return sum(site.loop_token_layers for site in self.sites)


def estimate(request: Request, max_tokens: int) -> Cost:
    """The cost of `request` in waves of `max_tokens` tokens; runs no model."""
    blocks = blocks_of(request.plans)
    sites = tuple(_site_cost(plan, blocks[plan.site.name], max_tokens) for plan in request.plans)
    token_layers = sum(site.token_layers for site in sites)
    flops = 2.0 * token_layers * request.shape.block_parameters
    shape = request.shape
    longest = max(int(plan.full_lengths.max()) for plan in request.plans)
    per_token = shape.d_model * (shape.n_layers + 1) + 2 * shape.n_layers * (
        shape.n_kv_heads * shape.d_head
    )
    per_token += shape.n_layers * shape.d_model * len(sites)
    dtype = next(request.bridge.original_model.parameters()).dtype
    return Cost(
        sites=sites,
        flops=flops,
        seconds=flops / matmul_rate(device_of(request.bridge), dtype),
        result_bytes=bytes_of(request),
        cache_bytes=2 * longest * per_token * dtype.itemsize,
    )


def _site_cost(plan: SitePlan, unit: tuple[int, int], max_tokens: int) -> SiteCost:
    live = np.flatnonzero(plan.live)
    n_waves = sum(1 for _ in plan.waves(live, max_tokens)) if len(live) else 0
    pairs, layers = unit
    return SiteCost(
        site=plan.site.name,
        n_patches=plan.n_patches,
        n_live=plan.n_live,
        n_units=-(-plan.shape[0] // pairs) * -(-plan.shape[1] // layers),
        n_waves=n_waves,
        token_layers=plan.token_layers,
        loop_token_layers=plan.loop_token_layers,
    )


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product at the shape of a wave (1024 x 1024 x 1024), best of a few."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        (a @ a).sum().item()  # item() waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best
