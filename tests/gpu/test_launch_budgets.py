"""Launches and waits of packed batches on a virtual GPU, ten families, against their budgets.

A wait in the middle of a packed batch leaves the GPU idle, and forbids capturing its blocks. The
table of docs/design/launches.md is what `table()` gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.analyses.circuits import edge_batch
from patchsweep.errors import ModelError
from patchsweep.forward.unembed import CHUNK_BYTES, Unembed
from patchsweep.forward.unwrapped import UnwrappedModel
from patchsweep.runners.packed import forward, runner
from patchsweep.runners.packed.budget import (
    MOST_GPU_TOKENS,
    WAVE_SHARE,
    default_max_tokens,
    gpu_bytes_per_token,
    gpu_tokens,
)
from patchsweep.spec import shards
from patchsweep.store.layout import Unit
from patchsweep.sweeps.exact import ExactWork
from patchsweep.sweeps.executor import Quiet
from store_checks import checksums

from gpu.test_virtual_gpu import PLAIN, TOLERANCE, check_equal, loaded, pairs
from gpu.virtual_cuda import Event, move, on_cpu, virtual_cuda
from gpu.virtual_device import DeviceMix, Gpu

BLOCKS = ("packed batch: enter a block", "packed batch: the block itself")
PAGE = Path(__file__).parents[2] / "docs" / "design" / "launches.md"


@dataclass(frozen=True)
class Counts:
    """Of the packed batches of one sweep."""

    n_batches: int
    n_visits: int  # of blocks
    launches: float  # per block visit, entering rows included
    waits: float  # per block visit
    batch_waits: float  # per packed batch: in its blocks, around them, and for its results
    wide: tuple[str, ...]  # operations with fp64 results

    @classmethod
    def of(cls, gpu: Gpu) -> Counts:
        n_visits = gpu.visits["packed batch: the block itself"]
        n_batches = gpu.visits["packed batch: around the blocks"]
        launched = sum(n for (phase, _), n in gpu.launches.items() if phase in BLOCKS)
        waits = sum(n for (phase, _, _), n in gpu.syncs.items() if phase in BLOCKS)
        of_batches = sum(
            n
            for (phase, why, _), n in gpu.syncs.items()
            if phase.startswith("packed") or why == "a result is awaited"
        )
        return cls(
            n_batches,
            n_visits,
            launched / n_visits,
            waits / n_visits,
            of_batches / n_batches,
            tuple(f"{op} at {where}" for (phase, op, where) in gpu.wide if phase[:6] == "packed"),
        )


def counted(family: str, sites: Any = PLAIN, **settings: Any) -> tuple[Counts, Gpu]:
    """The counts of a sweep in packed batches of about 64 tokens."""
    dtype = settings.pop("dtype", "float32")
    model = loaded(f"tiny:{family}", dtype=dtype)
    given = pairs(model)
    with virtual_cuda() as gpu:
        move(model)
        model.cfg.device = "cuda:0"
        ps.sweep(model, given, sites, runner="packed", max_tokens=64, **settings)
    return Counts.of(gpu), gpu


# launches a block visit, as in the table of docs/design/launches.md
BUDGETS = {
    "llama": 21.1,
    "gpt2": 15.3,
    "gemma2": 23.1,
    "gemma3": 25.3,
    "mixtral": 38.1,
    "qwen3": 23.1,
    "phi3": 18.1,
    "gpt_neox": 18.1,
    "opt": 17.1,
    "mistral": 21.1,
}
# results come back once for all batches of a unit of work; the first batch of a model tries out
# whether its unembedding can be used directly
BATCH_WAITS = 1


def check_budget(counts: Counts, launches: float) -> None:
    assert counts.n_batches > 3
    assert counts.waits == 0
    assert counts.batch_waits <= BATCH_WAITS
    assert not counts.wide
    assert round(counts.launches, 1) <= launches


@pytest.mark.parametrize("family", BUDGETS)
def test_packed_batches_keep_their_budget(family: str) -> None:
    check_budget(counted(family)[0], BUDGETS[family])


def test_page_says_the_budgets() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if "| `tiny:" in line]
    said = {row[0].strip(" `").removeprefix("tiny:"): float(row[2]) for row in rows}
    assert said == BUDGETS


@contextmanager
def planted(fault: Callable[[forward.PackedBlocks, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside, `fault` sees the output of every block of a packed batch, and replaces it."""
    replay = forward.PackedBlocks.replay

    def faulty(self: forward.PackedBlocks, hidden: torch.Tensor) -> torch.Tensor:
        return fault(self, replay(self, hidden))

    with mock.patch.object(forward.PackedBlocks, "replay", faulty):
        yield


def stray_item(blocks: forward.PackedBlocks, x: torch.Tensor) -> torch.Tensor:
    return x * x.abs().sum().ne(0).item()


def table_of_the_cpu(blocks: forward.PackedBlocks, x: torch.Tensor) -> torch.Tensor:
    return x[torch.arange(len(x), device="cpu")]


def mixed_where(blocks: forward.PackedBlocks, x: torch.Tensor) -> torch.Tensor:
    return torch.where(x == x, x, torch.zeros(x.shape, device="cpu"))


def fp64_temporary(blocks: forward.PackedBlocks, x: torch.Tensor) -> torch.Tensor:
    return x.double().to(x.dtype)


def more_launches(blocks: forward.PackedBlocks, x: torch.Tensor) -> torch.Tensor:
    return x.clone().add_(0).mul_(1).clone()


@pytest.mark.parametrize(
    ("fault", "sign"),
    [
        (stray_item, "waits: aten::_local_scalar_dense"),
        (table_of_the_cpu, "waits: a CPU index of CUDA data is copied"),
        (mixed_where, "mix: aten::where"),
        (fp64_temporary, "wide: aten::_to_copy"),
        (more_launches, "launches"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_planted_fault_breaks_the_budget_for_its_own_reason(fault: Any, sign: str) -> None:
    with planted(fault):
        try:
            counts, gpu = counted("llama", "z")
        except DeviceMix as error:
            signs = [f"mix: {error}"]
        else:
            signs = [f"waits: {why}" for phase, why, _ in gpu.syncs if phase in BLOCKS]
            signs += [f"wide: {operation}" for operation in counts.wide]
            signs = signs or ["launches"]
            with pytest.raises(AssertionError):
                check_budget(counts, BUDGETS["llama"])
    assert len(signs) == 1
    assert signs[0].startswith(sign)


def test_a_result_that_is_copied_at_once_breaks_the_budget() -> None:
    run = runner.PackedRunner._run_packed_batch

    def copied(*arguments: Any) -> torch.Tensor:
        result = run(*arguments)
        return result.cpu().to(result.device)

    with mock.patch.object(runner.PackedRunner, "_run_packed_batch", copied):
        counts, _ = counted("llama", "z")
    assert counts.waits == 0
    assert counts.batch_waits > BATCH_WAITS


def test_results_of_all_batches_come_back_at_once() -> None:
    _, gpu = counted("llama")
    home = [kind for (phase, kind, _) in gpu.copies if kind[:3] == "D2H" and phase[:6] == "packed"]
    assert home == ["D2H async (pinned)"]


def test_results_are_read_while_the_next_work_item_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "UNIT_TOKENS", 60)
    model = loaded("tiny:llama")
    given = pairs(model, 2)
    with on_cpu():
        expected = ps.sweep(model, given, ["z", "resid_pre"], runner="packed")
    model = loaded("tiny:llama")
    with virtual_cuda() as gpu:
        move(model)
        model.cfg.device = "cuda:0"
        start, before = ExactWork.start, Counter[Any]()

        def started(work: ExactWork, units: Any) -> Any:
            before.update({} if before else gpu.syncs)  # checks of the whole run
            return start(work, units)

        monkeypatch.setattr(ExactWork, "start", started)
        found = ps.sweep(model, given, ["z", "resid_pre"], runner="packed")
        waits = gpu.syncs - before
        n_waits = sum(n for (phase, _, _), n in waits.items() if phase != "load (capture)")
    check_equal(expected, found)
    *all_but_last, last = gpu.waited
    assert len(all_but_last) >= 7
    # between a result's copy and the wait for it, the next work item's blocks were launched
    assert min(wait - copy for copy, wait in all_but_last) >= BUDGETS["llama"]
    assert last[0] == last[1]
    assert n_waits <= 2 * len(gpu.waited)


def test_results_read_too_early_are_noticed() -> None:
    model = loaded("tiny:llama")
    given = pairs(model)
    with virtual_cuda(), mock.patch.object(Event, "synchronize"):
        move(model)
        model.cfg.device = "cuda:0"
        with pytest.raises(ModelError, match="not finite"):
            ps.sweep(model, given, "z", runner="packed")


class Stops(Quiet):
    """Notes the shards in their order, and ends the run after some of them."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.shards: list[str] = []

    def advance(self, unit: Unit, *_: Any) -> None:
        self.shards.append(unit.name)

    def item_done(self) -> None:
        self.after -= 1
        if not self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", ["interrupt", "no memory"])
def test_what_ends_a_run_loses_no_result_and_writes_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    monkeypatch.setattr(shards, "UNIT_TOKENS", 60)
    model = loaded("tiny:llama")
    given = pairs(model)
    run = runner.PackedRunner._run_packed_batch
    n_runs = 0

    def without_memory(*args: Any) -> Any:
        nonlocal n_runs
        n_runs += 1
        if stop == "no memory" and n_runs > 2:
            raise torch.OutOfMemoryError
        return run(*args)

    def sweep(progress: Stops, name: str) -> Any:
        path = tmp_path / name
        return ps.sweep(model, given, "z", runner="packed", store=path, progress=progress)

    with virtual_cuda():
        move(model)
        model.cfg.device = "cuda:0"
        whole = Stops(-1)
        sweep(whole, "whole.zarr")
        begun, rest = Stops(1 if stop == "interrupt" else -1), Stops(-1)
        with monkeypatch.context() as patched:
            patched.setattr(runner.PackedRunner, "_run_packed_batch", without_memory)
            with pytest.raises((KeyboardInterrupt, torch.OutOfMemoryError)):
                sweep(begun, "part.zarr")
        assert len(begun.shards) == 2  # the second one ran when the first was reported, or failed
        sweep(rest, "part.zarr")
    assert begun.shards + rest.shards == whole.shards
    assert checksums(tmp_path / "part.zarr") == checksums(tmp_path / "whole.zarr")


def test_joint_batches_wait_for_their_results_alone() -> None:
    patches = [
        [ps.Patch("z", 0, [4, 12], head), ps.Patch(site, 1, "all", None, values)]
        for head in range(4)
        for site, values in (("mlp_out", "zero"), ("resid_pre", "resample"), ("v", "base"))
    ]
    settings: dict[str, Any] = {"runner": "packed", "max_tokens": 40, "direction": "denoising"}
    model = loaded("tiny:llama")
    given = pairs(model)
    with on_cpu():
        expected = ps.run_patches(model, given, patches, **settings)
    model = loaded("tiny:llama")
    with virtual_cuda() as gpu:
        move(model)
        model.cfg.device = "cuda:0"
        found = ps.run_patches(model, given, patches, **settings)
    np.testing.assert_allclose(found.patched, expected.patched, atol=TOLERANCE, rtol=0)
    n_batches = gpu.visits["joint batch: rows"]
    assert n_batches >= 3
    waits = Counter[str]()
    for (phase, why, where), n in gpu.syncs.items():
        if phase.startswith(("joint", "packed batch")):
            waits[f"{why} at {where}"] += n
    assert waits.total() <= 2 * n_batches, waits
    assert not any("packed batch: the block" in phase for phase, _, _ in gpu.syncs)


def test_attention_of_edges_is_checked_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded("tiny:llama")
    given = pairs(model)
    check = edge_batch._check_attention
    with virtual_cuda(gradients=True) as gpu:

        def checked(*arguments: Any) -> None:
            with gpu.during("edges: check"):
                check(*arguments)

        monkeypatch.setattr(edge_batch, "_check_attention", checked)
        move(model)
        model.cfg.device = "cuda:0"
        ps.screen_edges(model, given, top=2)
    waits = sum(n for (phase, _, _), n in gpu.syncs.items() if phase == "edges: check")
    assert waits == gpu.visits["edges: check"] == 1


def test_adaptive_batches_wait_where_tokens_are_chosen_alone() -> None:
    model = loaded("tiny:llama")
    given = pairs(model)
    with virtual_cuda(gradients=True) as gpu:
        move(model)
        model.cfg.device = "cuda:0"
        ps.sweep(model, given, ["z", "resid_pre", "k"], tolerance=0.02)
    waits = Counter[str]()
    for (phase, _, _), n in gpu.syncs.items():
        waits[phase] += n
    block, batch = "adaptive batch: around a block", "adaptive batch: around the blocks"
    assert gpu.visits[block] > 4
    assert waits["packed batch: the block itself"] == 0
    assert waits[block] <= 6 * gpu.visits[block]
    assert waits[batch] <= 4 * gpu.visits[batch]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_estimated_memory_of_a_batch_is_what_it_takes(family: str) -> None:
    """The widest sites aside, which keep their patch values."""
    peaks = []
    run = runner.run_packed_batch

    def measured(unwrapped: Any, packed: Any, *rest: Any) -> torch.Tensor:
        gpu = Gpu.current
        assert gpu is not None
        gpu.peak = before = gpu.in_use
        hidden = run(unwrapped, packed, *rest)
        peaks.append((gpu.peak - before) / packed.n_tokens)
        return hidden

    model = loaded(f"tiny:{family}")
    given = pairs(model, 4)
    with virtual_cuda(), mock.patch.object(runner, "run_packed_batch", measured):
        move(model)
        model.cfg.device = "cuda:0"
        ps.sweep(model, given, "resid_pre", runner="packed")
        estimate = gpu_bytes_per_token(model, torch.float32)
    assert max(peaks) < 1.15 * estimate
    assert max(peaks) > 0.4 * estimate


def test_batches_of_a_gpu_hide_the_hosts_work_and_fit() -> None:
    model = loaded("tiny:llama")
    assert gpu_tokens(model, torch.float32) == MOST_GPU_TOKENS  # a tiny block is done at once
    with virtual_cuda(total_bytes=2**30):
        move(model)
        model.cfg.device = "cuda:0"
        fits = default_max_tokens(model, torch.float32)
    assert fits * gpu_bytes_per_token(model, torch.float32) <= WAVE_SHARE * 2**30
    assert fits == MOST_GPU_TOKENS or 2 * fits * gpu_bytes_per_token(model, torch.float32) > 2e8


def test_chunks_of_logits_are_larger_on_a_gpu_and_fit() -> None:
    model = loaded("tiny:llama")
    unembed = Unembed(UnwrappedModel(model))
    on_cpu, row = unembed.chunk_rows(), 4 * unembed.d_vocab
    assert (on_cpu + 1) * row > CHUNK_BYTES >= on_cpu * row
    for total in (2**30, 80 * 2**30):
        with virtual_cuda(total_bytes=total):
            move(model)
            n_rows = unembed.chunk_rows()
        assert on_cpu < n_rows <= min(0.1 * total, 2**30) / row
