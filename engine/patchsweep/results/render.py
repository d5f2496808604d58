"""A comparison as JSON data and as text for a terminal."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from patchsweep.data.show import number
from patchsweep.errors import printable
from patchsweep.results.compare import Comparison, Measure, thresholds


def as_dict(comparison: Comparison) -> dict[str, Any]:
    """Return all fields as plain JSON data; NaN becomes null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    fields: dict[str, Any] = plain(asdict(comparison))
    return {**fields, "thresholds": thresholds()}


def render(comparison: Comparison) -> Any:
    """Return a rich renderable: a table, the largest misses and the meaning of the verdicts."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Estimates against exact effects", title_justify="left")
    several = len({a.metric for a in comparison.sites}) > 1
    names = ["metric"] * several + [
        "site",
        "method",
        "cells",
        "Pearson",
        "Spearman",
        "slope",
        "sign",
        "top-k",
        "cost",
        "verdict",
    ]
    for name in names:
        table.add_column(name, justify="left" if name in ("metric", "site", "method") else "right")
    colours = {"good": "green", "screen": "yellow", "poor": "red", "unknown": "dim"}
    for a in (*comparison.sites, *comparison.overall):
        cost = f"1/{number(a.cost_ratio)}" if math.isfinite(a.cost_ratio) else "?"
        table.add_row(
            *([printable(a.metric)] if several else []),
            a.site,
            a.method,
            str(a.n_cells),
            _shown(a.pearson),
            _shown(a.spearman),
            _shown(a.slope),
            number(a.sign_agreement.value),
            number(a.recall.value),
            cost,
            Text(a.verdict, style=colours[a.verdict]),
        )
    lines = []
    for a in comparison.sites:
        worst = "; ".join(
            f"{m.place}: {number(m.exact)} is called {number(m.estimate)}" for m in a.misses[:3]
        )
        lines.append(f"{a.method} on {a.site}: {a.words} Largest misses: {worst}.")
    note = (
        f"top-k: share of the largest exact effects among twice as many estimates. cost: of all "
        f"the method's sites, against the exact sweep of this one. {thresholds()}"
    )
    return Group(table, *lines, Text(note, style="dim"))


def _shown(measure: Measure) -> str:
    if not math.isfinite(measure.low):
        return number(measure.value)
    return f"{number(measure.value)} [{number(measure.low)}, {number(measure.high)}]"
