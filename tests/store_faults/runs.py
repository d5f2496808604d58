"""A small layout with known values, and runs that write it: whole, contested, or killed halfway."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
import zlib
from collections.abc import Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from patchsweep.store.journal import Journal
from patchsweep.store.layout import FIXED, Layout, Unit, Variable
from patchsweep.store.store import Store

N_PAIRS, N_LAYERS = 5, 3


def small_layout(**attrs: Any) -> Layout:
    """Two variables: nine units with uneven edges, and three without a layer axis."""
    tokens = [[f"token {pair} {pos} \N{SNOWMAN}" for pos in range(4)] for pair in range(N_PAIRS)]
    return Layout(
        variables=(
            Variable(
                name="z",
                dims=("metric", "pair", "layer", "pos", "head"),
                shape=(2, N_PAIRS, N_LAYERS, 4, 2),
                unit=(2, 1),
                attrs={"long_name": "patched metric at z"},
            ),
            Variable("embed", ("metric", "pair", "pos"), (2, N_PAIRS, 4), (2, 1), {}),
        ),
        coords={
            "metric": (("metric",), np.array(["logit_diff", "prob"], dtype=object)),
            "pair": (("pair",), np.arange(N_PAIRS)),
            "layer": (("layer",), np.arange(N_LAYERS)),
            "pos": (("pos",), np.arange(4)),
            "head": (("head",), np.arange(2)),
            "base_token": (("pair", "pos"), np.array(tokens, dtype=object)),
            "answer": (("pair",), np.array([" Mary"] * N_PAIRS, dtype=object)),
        },
        attrs={"provenance": {"model": "none", "config": {"sites": ["z"], "seed": 1}}, **attrs},
    )


def values_of(variable: Variable, unit: Unit) -> np.ndarray:
    """The unit's values, the same in every process; a few are NaN."""
    rng = np.random.default_rng(zlib.crc32(unit.name.encode()))
    values = rng.normal(size=variable.block_shape(unit)).astype(np.float32)
    values[..., -1] = np.nan
    return values


def run(
    url: str | Path,
    *,
    only: slice | None = None,
    pause_s: float = 0.0,
    kill_after: int | None = None,
    journal: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> None:
    """Write what the store misses, as a sweep does: claim, compute, write, until all is done.

    `only`: the units of this process, else all of them. `pause_s`: what computing one takes.
    `kill_after`: SIGKILL before that many steps on files of the store and its neighbours.
    """
    if kill_after is not None:
        _die_at_step(str(url), kill_after)
    options = {"storage_options": storage_options}
    with Store.create_or_resume(url, small_layout(**(attrs or {})), **options) as store:
        mine = set(store.units()[only] if only else store.units())
        log = Journal(url, **options) if journal else None
        if log:
            log.started(["run"], n_units=len(mine))
        while pending := [unit for unit in store.pending() if unit in mine]:
            claimed = False
            for unit in pending:
                if not store.claim([unit]):
                    continue
                claimed = True
                time.sleep(pause_s)
                store.write_references(
                    unit.first_pair, *(np.full((2, len(unit.pairs)), len(name)) for name in FIXED)
                )
                store.write(unit, values_of(store.variables[unit.variable], unit))
                if log:
                    log.unit_done(unit, seconds=pause_s, token_layers=10, n_live=3)
            if not claimed:
                time.sleep(0.01)  # another process is at work on them
        if log:
            log.finished()


def start(url: str | Path, **options: Any) -> BaseProcess:
    """`run` in a process of its own."""
    context = multiprocessing.get_context("forkserver")  # a fork that carries no threads along
    context.set_forkserver_preload(["store_faults.bare", "store_faults.runs", "numpy.random"])
    process = context.Process(target=_quiet_run, args=(url,), kwargs=options)
    with pytest.MonkeyPatch.context() as patch:  # Python 3.11's fork server has no sys.path of ours
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        process.start()
    return process


def kill_at_random(
    url: Path, *, kills: int, seed: int, n_writers: int, longest_s: float
) -> tuple[list[int | None], int]:
    """`n_writers` runs at once, `kills` times one of them killed and started again; then they end.

    Gives the exit codes of the last `n_writers`, and how many were killed in the middle of work.
    """
    rng, hits = random.Random(seed), 0
    writers = [start(url, pause_s=0.01) for _ in range(n_writers)]
    for _ in range(kills):
        time.sleep(rng.uniform(0, longest_s))
        i = rng.randrange(n_writers)
        writers[i].kill()
        writers[i].join()
        hits += writers[i].exitcode == -signal.SIGKILL
        writers[i] = start(url, pause_s=0.01)
    for writer in writers:
        writer.join(60)
    return [writer.exitcode for writer in writers], hits


def _quiet_run(url: str | Path, **options: Any) -> None:
    import warnings

    warnings.simplefilter("error")
    run(url, **options)


def _die_at_step(url: str, n: int) -> None:
    steps = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal steps
        if event not in ("open", "os.rename", "os.link", "os.remove", "os.mkdir"):
            return
        steps += any(isinstance(arg, str | os.PathLike) and url in os.fspath(arg) for arg in args)
        if steps >= n:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
