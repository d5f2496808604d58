"""What a live patch costs as the pairs and the slices of a run grow: one process, by turns.

    make bench

Slices run one after the other here, so that the figure is work done and not cores shared. What a
process spends on loading the model and on the probe is left out.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import patchsweep as ps
import pytest
from conftest import Subject, machine
from patchsweep.spec.spec import SweepSpec, make_request
from patchsweep.tasks import load_task


@pytest.mark.parametrize("site", ["resid_pre", "z"])
@pytest.mark.parametrize("n_pairs", [1, 4, 16, 64])
def bench_pairs(benchmark, subject: Subject, n_pairs: int, site: str) -> None:
    pairs = load_task(subject.model, "ioi", n_pairs)
    rounds = {1: 8, 4: 4, 16: 2, 64: 1}[n_pairs]
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        ps.sweep(subject.model, pairs, site)
        times.append(time.perf_counter() - start)
    _record(benchmark, subject, pairs, site, statistics.median(times))


@pytest.mark.parametrize("n_slices", [1, 2, 4])
def bench_slices(benchmark, subject: Subject, tmp_path: Path, n_slices: int) -> None:
    pairs = load_task(subject.model, "ioi", 16)
    ps.sweep(subject.model, subject.pairs, "resid_pre")  # the self-test, once in a process
    start = time.perf_counter()
    for i in range(n_slices):
        ps.sweep(
            subject.model,
            pairs,
            "resid_pre",
            store=tmp_path / "run.zarr",
            slice_index=i,
            n_slices=n_slices,
        )
    _record(benchmark, subject, pairs, "resid_pre", time.perf_counter() - start)


def _record(benchmark, subject: Subject, pairs: ps.PromptPairs, site: str, seconds: float) -> None:
    plan = make_request(subject.model, pairs, SweepSpec(site)).plans[0]
    benchmark.extra_info.update(
        machine(),
        seconds=seconds,
        ms_per_live_patch=1e3 * seconds / plan.n_live,
        us_per_token_layer=1e6 * seconds / plan.token_layers,
    )
    benchmark.pedantic(lambda: None, rounds=1)  # the figures are those above
