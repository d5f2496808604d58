"""The Python of README and docs runs as it stands, always on the bundled SmolLM2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import patchsweep as ps
import pytest
import torch
from patchsweep import models
from transformer_lens.model_bridge import TransformerBridge

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)
PAGES = [
    path
    for path in (ROOT / "README.md", ROOT / "kernels" / "README.md", *(ROOT / "docs").glob("*.md"))
    if BLOCK.search(path.read_text(encoding="utf-8"))
]
QUICK = ("README.md", "gpt2.md")  # seconds; the others take minutes


def what_pages_assume(model: TransformerBridge) -> dict[str, Any]:
    """The names that pages use for what the reader has already."""
    pairs = ps.load_task(model, "ioi", n_pairs=2)
    clean, corrupted = (torch.tensor([ids]) for ids in (pairs[0].clean, pairs[0].corrupted))
    answer, wrong = pairs[0].answer[0], pairs[0].wrong_answer[0]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer] - logits[0, -1, wrong]

    return {
        "ps": ps,
        "model": model,
        "pairs": pairs,
        "other_pairs": ps.load_task(model, "ioi", n_pairs=2, seed=1),
        "clean_tokens": clean,
        "corrupted_tokens": corrupted,
        "metric": metric,
    }


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            page,
            id=str(page.relative_to(ROOT)),
            marks=() if page.name in QUICK else pytest.mark.slow,
        )
        for page in PAGES
    ],
)
def test_code_runs(
    page: Path, smollm2: TransformerBridge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *args, **settings: smollm2)
    names = what_pages_assume(smollm2)
    if page.name == "identity.md":
        names["ds"] = ps.sweep(smollm2, names["pairs"], "z", layers=[29], method=["exact", "ig"])
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        exec(compile(block, str(page), "exec"), names)


def test_most_pages_have_code() -> None:
    assert len(PAGES) >= 10
