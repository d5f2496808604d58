"""One JSON file per device and commit, to which scripts add entry by entry."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = (
    "bench-gpu measures on a GPU, and torch sees none here: nothing was measured. "
    "Run it on a machine with a GPU and a torch built for it."
)
# what a measurement depends on; pages that it writes are not among them
MEASURED = ("engine", "kernels", "benchmarks/gpu")


class Record:
    """The file of this device and commit. Each entry is on the disk once it was measured."""

    def __init__(self, folder: Path, device_name: str) -> None:
        slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
        commit = _commit()
        self.path = folder / f"gpu-{slug}-{commit}.json"
        self.content: dict[str, Any] = {"device": device_name, "commit": commit}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    def has(self, part: str, **key: str) -> bool:
        """Whether the list `part` has an entry with these values that did not fail."""
        return any(
            "failed" not in entry and all(entry.get(name) == value for name, value in key.items())
            for entry in self.content.get(part, ())
        )

    def add(self, part: str, entry: dict[str, Any], **key: str) -> None:
        """Put an entry into the list `part`, in the place of an earlier one with these values."""
        others = [
            other
            for other in self.content.get(part, ())
            if any(other.get(name) != value for name, value in key.items())
        ]
        self.put(part, [*others, key | entry])

    def put(self, part: str, value: Any) -> None:
        """Write the file with `value` as `part`."""
        self.content |= {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "torch": torch.__version__,
            "triton": _triton_version(),
            part: value,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.content, indent=1) + "\n")
        new.replace(self.path)


def failure(error: BaseException) -> dict[str, str]:
    """Return what an entry says of a measurement that failed."""
    return {"failed": f"{type(error).__name__}: {error}"[:500]}


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "missing"
    return str(triton.__version__)


def _commit() -> str:
    """Return the short commit, with `-dirty` where what is measured differs from it."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=False, cwd=ROOT
        )
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if git("status", "--porcelain", "--", *MEASURED) else commit
