"""What the benchmarks share: one model object, one pair, one record of the machine."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import patchsweep as ps
import pytest
import torch
from patchsweep.data.pairs import PromptPairs
from patchsweep.tasks import DEMO_PAIR
from transformer_lens.model_bridge import TransformerBridge

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@dataclass(frozen=True)
class Subject:
    """What is swept: the same objects for every contender."""

    model: TransformerBridge
    pairs: PromptPairs
    clean: torch.Tensor  # [1, pos]
    corrupted: torch.Tensor  # [1, pos]
    answer: int
    wrong: int

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """Logit of the answer minus logit of the wrong answer, at the last position."""
        return (logits[:, -1, self.answer] - logits[:, -1, self.wrong]).mean()


@cache
def _subject() -> Subject:
    model = ps.load_model("smollm2-135m")
    pairs = PromptPairs.from_records(model, [DEMO_PAIR])
    pair = pairs[0]
    return Subject(
        model=model,
        pairs=pairs,
        clean=torch.tensor([pair.clean]),
        corrupted=torch.tensor([pair.corrupted]),
        answer=pair.answer[0],
        wrong=pair.wrong_answer[0],
    )


@pytest.fixture(scope="session")
def subject() -> Subject:
    return _subject()


@pytest.fixture(scope="session")
def cells() -> dict[str, np.ndarray]:
    """Results by site, from whichever contender ran first: the others must equal them."""
    return {}


def matmul_peak(dtype: torch.dtype = torch.float32) -> float:
    """Best FLOP/s over products at the shapes of the model (1024 tokens)."""
    best = 0.0
    for d_in, d_out in ((576, 1536), (1536, 576), (576, 576)):
        a = torch.randn(1024, d_in, dtype=dtype)
        w = torch.randn(d_out, d_in, dtype=dtype)
        for _ in range(30):
            start = time.perf_counter()
            torch.nn.functional.linear(a, w)
            best = max(best, 2 * 1024 * d_in * d_out / (time.perf_counter() - start))
    return best


def machine() -> dict[str, object]:
    """Where and on what a figure was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
