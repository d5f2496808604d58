"""Drawings of edges as SVG, for a notebook and for a file."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import xarray as xr

from patchsweep.arguments import user_path, whole_number
from patchsweep.errors import StoreError
from patchsweep.report.edges import rows_of
from patchsweep.report.graph import Drawn, graph_of_edges
from patchsweep.results import accessor as summary


@dataclass(frozen=True)
class Drawing:
    """An SVG picture, which a notebook shows."""

    svg: str

    def _repr_html_(self) -> str:
        return f'<div style="overflow-x:auto;background:#fff;color:#1c2126">{self.svg}</div>'

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the picture to an SVG file and return its path."""
        out = user_path(Path(path))
        out.write_text(self.svg, encoding="utf-8")
        return out


def plot_edges(ds: xr.Dataset, n: int = 40, *, metric: str | None = None) -> Drawing:
    """Return a drawing of the `n` largest edges of `ps.edges`, `exact_edges` or `screen_edges`.

    Exact effects if they were run, else estimates; means over pairs. Blue raises the metric (the
    first, by default), red lowers it; layers run upwards.

    Raises:
        StoreError: `ds` holds no edges.
        MetricError, PlanError: it has no such metric; `n` is below 1.
    """
    if not any(name in ds for name in ("edge", "edge_eap", "edge_eap_ig")):
        raise StoreError("the Dataset holds no edges; give what edges or exact_edges returns")
    whole_number("n", n, least=1)
    name = summary.metric_name(ds, metric)
    rows = rows_of(ds, name)[:n]
    drawn = [Drawn(row.sender, row.reader, row.value) for row in rows]
    return Drawing(graph_of_edges(ds, drawn, f"The {len(drawn)} largest edges", name))
