"""Activations beyond a budget lie in mapped files: the same values, and nothing left behind."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ModelError
from patchsweep.forward.activation_store import ActivationStore, Budget
from patchsweep.runners.packed.runner import PackedRunner
from patchsweep.spec.spec import SweepSpec, make_request
from subjects import demo_pairs, model

NAME = "tiny:llama"
SITES = ["embed", "resid_pre", "resid_post", "k", "z", "pattern", "pattern_cell", "mlp_out"]


@pytest.mark.parametrize("intervention", ["resample", "zero", "mean_all"])
@pytest.mark.parametrize("budget", [0, 100_000])  # nothing fits; about a half fits
def test_spilled_sweep_equals_the_one_in_memory_bit_for_bit(
    intervention: str, budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    arguments = {"intervention": intervention, "heads": [0, 1], "runner": "packed"}
    sites = SITES if intervention == "resample" else ["resid_pre", "z"]
    found = [
        ps.sweep(model(NAME), demo_pairs(NAME), sites, cache_budget=n, **arguments)
        for n in (None, budget)
    ]
    for name in sites:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
    assert list(tmp_path.iterdir()) == []


def test_only_what_exceeds_the_budget_is_spilled_and_the_budget_comes_back() -> None:
    request = make_request(model(NAME), demo_pairs(NAME), SweepSpec(["z"], ["logit_diff"]))
    batch = request.batches([0])[0]
    whole = PackedRunner(model(NAME), request.sites, cache_budget=10**9)
    loaded = whole.load(batch, request.intervention)
    n_bytes = whole.budget.n_used
    # 2 prompts x 17 tokens: 4 residuals of 32, k and v of 16 and z of 32 in three blocks, in fp32
    assert n_bytes == 2 * batch.length * 4 * (4 * 32 + 3 * (16 + 16 + 32))
    assert whole.budget.n_spilled == 0
    del loaded
    gc.collect()
    assert whole.budget.n_used == 0
    half = PackedRunner(model(NAME), request.sites, cache_budget=n_bytes // 2)
    loaded = half.load(batch, request.intervention)
    assert loaded.base.storage is loaded.base.half(slice(0, 1)).storage
    assert half.budget.n_used <= n_bytes // 2
    assert half.budget.n_used + half.budget.n_spilled == n_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mapped_tensor_is_the_same_tensor(dtype: torch.dtype) -> None:
    x = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype).transpose(0, 1)
    kept = ActivationStore(Budget(0)).copy(x)
    assert torch.equal(kept, x)
    assert kept.is_contiguous()
    kept[0] = 1  # and belongs to us alone
    assert not torch.equal(kept, x)


def test_a_full_disk_is_told_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match=r"No space left on device.*TMPDIR"):
        ActivationStore(Budget(0)).copy(torch.zeros(1000))
