"""Plotly figures from Python data: scatter plots, curves and heat maps, drawn by one script."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from patchsweep.data.show import esc
from patchsweep.report.html import embed_json
from patchsweep.report.shell import get_plotlyjs, resource

# ColorBrewer scales, as in the maps of sweeps: blue positive, red negative; BLUES if all positive
RED_BLUE = [
    [i / 10, colour]
    for i, colour in enumerate(
        "#67001f #b2182b #d6604d #f4a582 #fddbc7 #f7f7f7 #d1e5f0 #92c5de #4393c3 #2166ac "
        "#053061".split()
    )
]
BLUES = [
    [i / 8, colour]
    for i, colour in enumerate(
        "#ffffff #deebf7 #c6dbef #9ecae1 #6baed6 #4292c6 #2171b5 #08519c #08306b".split()
    )
]
# colours of lines and points that stand beside each other, apart for the colour-blind too
SERIES = ("#2166ac", "#b35c00", "#1f7a4d", "#7b3294", "#a8152a", "#545d66")

_INK, _SOFT, _GRID = "#1c2126", "#545d66", "#e6eaee"
_AXIS = {
    "gridcolor": _GRID,
    "zeroline": False,
    "fixedrange": True,
    "ticks": "",
    "linecolor": "#d9dee3",
    "automargin": True,
    "exponentformat": "e",  # as in tables; not 40µ
}
_LAYOUT: dict[str, Any] = {
    "height": 340,
    "margin": {"l": 56, "r": 12, "t": 14, "b": 46},
    "paper_bgcolor": "#fff",
    "plot_bgcolor": "#fff",
    "font": {"size": 12, "color": _INK},
    "colorway": list(SERIES),
    "hoverlabel": {
        "bgcolor": "#fff",
        "bordercolor": _SOFT,
        "align": "left",
        "font": {"size": 13, "color": _INK},
    },
    "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
    "xaxis": {},
    "yaxis": {},
}


def level_lines(*values: float) -> list[dict[str, Any]]:
    """Return shapes of a layout: a dashed line across the plot at each value of y."""
    dashed = {"color": "#7c8894", "width": 1, "dash": "dash"}
    across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "below", "line": dashed}
    return [{**across, "y0": y, "y1": y} for y in values]


def figure(
    name: str,
    traces: Sequence[Mapping[str, Any]],
    layout: Mapping[str, Any] | None = None,
    *,
    title: str = "",
    caption: str = "",
    wide: bool = True,
) -> str:
    """Return a plotly figure as HTML; `figure_scripts` draws it when the page opens.

    Arrays of numpy and xarray become lists, numbers that are not finite become gaps. `layout`
    overrides the defaults of every page, key by key; axes have a grid and no zoom. Plotly parses
    labels as a subset of HTML: put `plain` around text that comes from a store.

    Args:
        name: id in the page, and file name of a saved picture.
        title: plain text, for the heading and for screen readers; escaped here.
        caption: HTML under the figure.
        wide: whether the figure takes the page's full width inside a `<div class="grid">`.
    """
    merged = _over(_LAYOUT, layout or {})
    for key in [key for key in merged if key.startswith(("xaxis", "yaxis"))]:
        merged[key] = _over(_AXIS, merged[key])
    heading = f"<h3>{esc(title)}</h3>" if title else ""
    caption_html = f"<figcaption>{caption}</figcaption>" if caption else ""
    spec = {"data": [_json(trace) for trace in traces], "layout": _json(merged)}
    return (
        f'<figure class="{"wide" if wide else "half"}">{heading}'
        f'<div class="plot" id="{esc(name)}" data-figure role="img" '
        f'aria-label="{esc(title or name)}"></div>'
        f'<script type="application/json" id="{esc(name)}-figure">{embed_json(spec)}</script>'
        f"{caption_html}</figure>"
    )


def figure_scripts() -> list[str]:
    """Return the scripts of a page with figures, for `shell.page`: plotly and figures.js."""
    return [get_plotlyjs(), resource("figures.js")]


def plain(text: object) -> str:
    """Return `text` escaped for plotly's labels."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `under` updated with `over`; nested mappings are merged key by key."""
    merged = dict(under)
    for key, value in over.items():
        deep = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _over(merged[key], value) if deep else value
    return merged


def _json(value: Any) -> Any:
    """Return `value` as plain JSON data with six digits, which is more than a picture shows."""
    if isinstance(value, Mapping):
        return {str(key): _json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | xr.DataArray):
        return _json(np.asarray(value).tolist())
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, np.generic):
        return _json(value.item())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def colour_of(value: float, limit: float) -> str:
    """Return the colour of `value` on the scale from -limit to limit; grey for NaN."""
    if not math.isfinite(value):
        return "#e3e6e9"
    # the square root keeps small effects visible beside a few large ones
    scaled = math.copysign(math.sqrt(min(1.0, abs(value) / limit)), value)
    at = (scaled + 1) / 2 * (len(RED_BLUE) - 1)
    low = min(int(at), len(RED_BLUE) - 2)
    ends = [_rgb(str(RED_BLUE[k][1])) for k in (low, low + 1)]
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _rgb(colour: str) -> list[int]:
    return [int(colour[k : k + 2], 16) for k in (1, 3, 5)]
