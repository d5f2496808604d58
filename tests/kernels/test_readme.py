"""The examples in the package's README run."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_readme_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 5
    names: dict[str, object] = {}
    exec("\n".join(examples), names)
    shapes = {name: tuple(names[name].shape) for name in ("z", "kl", "log_prob", "scores")}  # type: ignore[attr-defined]
    assert shapes == {"z": (8, 9, 64), "kl": (8,), "log_prob": (8, 2), "scores": (17, 9)}
