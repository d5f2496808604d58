"""The examples in the package's README run."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_readme_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 6
    names: dict[str, object] = {}
    exec("\n".join(examples), names)
    expected = {
        "z": (8, 9, 64),
        "own_z": (3, 9, 64),
        "effect": (1, 2, 8),
        "size": (2, 8),
        "kl": (8,),
        "log_prob": (8, 2),
        "scores": (17, 9),
    }
    assert {name: tuple(names[name].shape) for name in expected} == expected  # type: ignore[attr-defined]
