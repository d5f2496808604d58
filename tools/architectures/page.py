"""The families table as a Markdown page."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from tools.architectures.plain import INTERVENTIONS, LENGTHS, Comparison
from tools.architectures.plain import SITES as PLAIN_SITES
from tools.architectures.table import SITES, Row

_HEAD = """# Architectures

Written by `python -m tools.architectures`: every causal architecture that TransformerBridge
supports, tiny (three layers), with random weights (drawn large enough that patches matter), in
fp32 on the CPU. The runner is the one that the probe chooses, site by site. The number at a site is
the largest difference in `logit_diff` from a loop of hooked forward passes through the bridge, one
patch each, over six live patches. A dash: see the notes.

{plain}

- **packed**: packed batches.
- **packed and hooked**: packed batches, but for the sites that the notes name. A sweep that
  includes one of those runs hooked as a whole.
- **hooked**: batched forward passes through the bridge's hooks: slower, and right.
- **refused**: cannot be swept, and the sweep says so.
"""


_PLAIN = """**plain** is the largest difference in `logit_diff` from hooks on the model as
transformers builds it, without the bridge (`tools/architectures/plain.py`): {n_cells:,} random
patches in {n_compared} architectures, {smallest} to {largest} each, of {sites}, with
{interventions}, in prompts of {fewest} to {most} words. Each architecture has patches that move the
metric by {effects} logits or more, so numbers of order 1e-5 are rounding, and differ from machine
to machine. Of latent attention q lies after rotary, where a constant has nothing to be compared
with."""


def page(
    rows: Sequence[Row],
    plain: Sequence[Comparison],
    compatible: Sequence[Row],
    left_out: Sequence[str],
) -> str:
    """The page: all `rows`, what plain hooks said of them, those in compatibility mode, and the
    architectures `left_out`."""
    compared = {one.architecture: one for one in plain if one.n_cells}
    counts = [f"{n} {runner}" for runner, n in _counts(rows).items()]
    parts = [
        _head(list(compared.values())),
        f"{len(rows)} architectures: {', '.join(counts)}.\n",
        _table(rows, {name: _number(one.difference) for name, one in compared.items()}),
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


def _head(compared: Sequence[Comparison]) -> str:
    cells = [one.n_cells for one in compared] or [0]
    effects = [one.effect for one in compared] or [0.0]
    plain = _PLAIN.format(
        n_cells=sum(cells),
        n_compared=len(compared),
        smallest=min(cells),
        largest=max(cells),
        sites=_and(PLAIN_SITES),
        interventions=_and([*INTERVENTIONS[:-1], f"a {INTERVENTIONS[-1]}"]),
        fewest=min(fewest for fewest, _ in LENGTHS),
        most=max(most for _, most in LENGTHS),
        effects=f"{min(effects):.1f}",
    )
    return _HEAD.format(plain=textwrap.fill(plain, 100, break_on_hyphens=False))


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _table(rows: Sequence[Row], plain: Mapping[str, str] | None = None) -> str:
    """A row for each of `rows`; `plain`: architecture -> what stands in its column of that name."""
    more = [] if plain is None else ["plain"]
    columns = ["architecture", "model type", "runner", *SITES, *more, "notes"]
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        cells = [row.cells.get(site) for site in SITES]
        numbers = [_number(None if cell is None else cell.difference) for cell in cells]
        if plain is not None:
            numbers.append(plain.get(row.architecture, "-"))
        first = [row.architecture, f"`{row.model_type}`", row.runner]
        lines.append(_line([*first, *numbers, row.reason]))
    return "\n".join(lines) + "\n"


def _number(difference: float | None) -> str:
    if difference is None:
        return "-"
    return f"{difference:.0e}" if difference else "0"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
