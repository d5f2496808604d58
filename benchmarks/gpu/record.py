"""One JSON file per device and commit, which several scripts add to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parents[1] / "results"
NO_GPU = (
    "bench-gpu measures on a GPU, and torch sees none here: nothing was measured. "
    "Run it on a machine with a GPU and a torch built for it."
)


def add(folder: Path, device_name: str, part: dict[str, Any]) -> Path:
    """The path of this device's and commit's file, after `part` was put into it."""
    commit = _commit()
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    path = folder / f"gpu-{slug}-{commit}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {
        "device": device_name,
        "commit": commit,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "torch": torch.__version__,
        "triton": _triton_version(),
        **part,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return path


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "missing"
    return str(triton.__version__)


def _commit() -> str:
    """The short commit, with `-dirty` where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=here)
    return done.stdout.strip() or "unknown"
