"""`precision=bf16`, its proof included, beside fp32: the demo pair, one process, by turns.

    make bench

Skipped where the CPU has no bf16 products: torch would emulate them.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import patchsweep as ps
import pytest
import torch
from bench_sweep import SITES
from conftest import Subject, machine
from scipy.stats import spearmanr

EFFECT = 0.05  # cells with smaller effects, in logits, do not count for the rank agreement
ROUNDS = 7


def has_bf16_products() -> bool:
    """Whether a product in bf16 is faster than one in fp32 here."""

    def seconds(dtype: torch.dtype) -> float:
        x, w = torch.randn(1024, 576, dtype=dtype), torch.randn(1536, 576, dtype=dtype)
        best = np.inf
        for _ in range(10):
            start = time.perf_counter()
            torch.nn.functional.linear(x, w)
            best = min(best, time.perf_counter() - start)
        return float(best)

    return seconds(torch.bfloat16) < 0.7 * seconds(torch.float32)


@pytest.mark.parametrize("sites", [("resid_pre",), ("z",), SITES], ids=["resid_pre", "z", "demo"])
def bench_bf16(benchmark, subject: Subject, sites: tuple[str, ...]) -> None:
    if not has_bf16_products():
        pytest.skip("this CPU has no fast bf16 products")
    seconds: dict[str, list[float]] = {"model": [], "bf16": []}
    found = {}
    for _ in range(ROUNDS):
        for precision, times in seconds.items():
            start = time.perf_counter()
            found[precision] = ps.sweep(subject.model, subject.pairs, sites, precision=precision)
            times.append(time.perf_counter() - start)
    fp32, bf16 = found["model"], found["bf16"]
    base = float(fp32["base_metric"].values[0, 0])
    exact = np.concatenate([fp32[site].values.ravel() for site in sites]) - base
    raw = np.concatenate([bf16[site + "_bf16"].values.ravel() for site in sites]) - base
    proven = np.concatenate([bf16[site].values.ravel() for site in sites]) - base
    large = np.abs(exact) > EFFECT
    benchmark.extra_info.update(
        machine(),
        seconds={name: statistics.median(times[1:]) for name, times in seconds.items()},
        worst_error=float(np.abs(raw - exact).max()),
        spearman=float(spearmanr(exact[large], raw[large]).statistic),
        cells=int(large.sum()),
        same_top_20=len(_top(exact) & _top(proven)),
    )
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above


def _top(effects: np.ndarray) -> set[int]:
    return set(np.argsort(-np.abs(effects))[:20].tolist())
