"""The families table as a Markdown page."""

from __future__ import annotations

from collections.abc import Sequence

from tools.architectures.table import SITES, Row

_HEAD = """# Architectures

Written by `python -m tools.architectures`: every causal architecture that TransformerBridge
supports, tiny (three layers), with random weights (drawn large enough that patches matter), in
fp32 on the CPU. The runner is the one that the probe chooses, site by site. A number is the
largest difference in `logit_diff` from a loop of hooked forward passes through the bridge, one
patch each, over six live patches. A dash: see the notes. Numbers of order 1e-6 are rounding, and
differ from machine to machine.

- **packed batch**: packed batches.
- **packed and hooked**: packed batches, but for the sites that the notes name. A sweep that
  includes one of
  those runs hooked as a whole.
- **hooked**: batched forward passes through the bridge's hooks: slower, and right.
- **refused**: cannot be swept, and the sweep says so.
"""


def page(rows: Sequence[Row], compatible: Sequence[Row], left_out: Sequence[str]) -> str:
    """The page: all `rows`, those in compatibility mode, and the architectures `left_out`."""
    counts = [f"{n} {runner}" for runner, n in _counts(rows).items()]
    parts = [
        _HEAD,
        f"{len(rows)} architectures: {', '.join(counts)}.\n",
        _table(rows),
        "## Compatibility mode\n",
        "After `enable_compatibility_mode()` (folded norms, centred weights). Where the bridge "
        "keeps queries, keys and values as one joint matrix, the processed weights live in the "
        "bridge alone; the hooked runner takes over then.\n",
        _table(compatible),
        "## Not in the table\n",
        "TransformerBridge also knows these names. `transformers` has no causal model class of "
        "that name: they are encoders, sequence-to-sequence models, models of images or sound, "
        "second names, or come with code of their own.\n",
        ", ".join(left_out) + "\n",
    ]
    return "\n".join(parts)


def _counts(rows: Sequence[Row]) -> dict[str, int]:
    order = ("packed", "packed and hooked", "hooked", "refused")
    counts = {runner: sum(row.runner == runner for row in rows) for runner in order}
    return {runner: n for runner, n in counts.items() if n}


def _table(rows: Sequence[Row]) -> str:
    columns = ["architecture", "model type", "runner", *SITES, "notes"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    lines += [
        _line(
            [
                row.architecture,
                f"`{row.model_type}`",
                row.runner,
                *(_number(row, site) for site in SITES),
                row.reason,
            ]
        )
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _number(row: Row, site: str) -> str:
    cell = row.cells.get(site)
    if cell is None or cell.difference is None:
        return "-"
    return f"{cell.difference:.0e}" if cell.difference else "0"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
