"""Timing on a GPU, and the ceilings that a kernel's rate is held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

# calls between two events on a GPU
QUEUED = 10


@dataclass(frozen=True)
class Seconds:
    """Quantiles of the time of one call."""

    p10: float
    median: float
    p90: float


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured in the same run."""

    copy_bytes_per_s: float  # bytes read plus bytes written by one large copy
    matmul_flop_per_s: dict[str, float]  # dtype -> a large square product


def time_calls(call: Callable[[], object], device: torch.device, budget_s: float = 0.5) -> Seconds:
    """Time of `call`, after warming up, over as many calls as fit `budget_s` (5 to 200)."""
    for _ in range(3):
        call()
    once = _timed(call, device)
    n_calls = int(min(200, max(5, budget_s / max(once, 1e-7))))
    times = torch.tensor([_timed(call, device) for _ in range(n_calls)], dtype=torch.float64)
    p10, median, p90 = torch.quantile(times, torch.tensor([0.1, 0.5, 0.9]).double()).tolist()
    return Seconds(p10, median, p90)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # several in a row: the device works while the host launches the next, as in a sweep
    begin.record()
    for _ in range(QUEUED):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / QUEUED


def measure_ceilings(device: torch.device, *, copy_bytes: int, side: int) -> Ceilings:
    """Rates of a copy of `copy_bytes` and of products of `side` by `side` matrices."""
    source = torch.zeros(copy_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda: target.copy_(source), device)
    rates = {}
    for name in ("float32", "bfloat16"):
        a = torch.randn(side, side, device=device).to(getattr(torch, name))
        product = torch.empty_like(a)
        seconds = time_calls(partial(torch.mm, a, a, out=product), device)
        rates[name] = 2 * side**3 / seconds.median
    return Ceilings(2 * source.numel() * 4 / copy.median, rates)
