"""Which device a model gets, and what is said where there is none."""

from __future__ import annotations

import logging
from pathlib import Path

import patchsweep as ps
import pytest
import torch
from patchsweep.errors import ModelError
from patchsweep.models import device_map as devices
from patchsweep.models.device_map import choose_device
from patchsweep.models.memory import free_memory


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_gpu_that_torch_cannot_use_is_told(
    no_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(devices, "_DRIVER", driver)
    assert choose_device(None, None) == "cpu"
    assert caplog.records == []  # a machine without a GPU
    driver.write_text("NVRM version")
    monkeypatch.setattr(torch.version, "cuda", None)
    with caplog.at_level(logging.WARNING, logger="patchsweep"):
        assert choose_device(None, None) == "cpu"
    (record,) = caplog.records
    assert "runs on the CPU although this machine has a GPU: torch" in record.getMessage()
    assert "is a build for the CPU; install a CUDA build" in record.getMessage()


def test_driver_that_is_too_old_is_told(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nM")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ModelError, match=r"cannot be used: torch .* driver on your system is too"):
        ps.load_model("tiny:llama", device="cuda:0")


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda:3", "this process sees cuda:0..cuda:1"),
        ("graphics", "'graphics' is no device of torch"),
    ],
)
def test_device_that_does_not_exist_is_refused(
    device: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda:1", None) == "cuda:1"
    with pytest.raises(ModelError, match=words):
        ps.load_model("tiny:llama", device=device)


def test_memory_that_torch_caches_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or each further sweep of a process would find less, and cut smaller packed batches."""
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20_000)
    assert free_memory(gpu) == 33_000
