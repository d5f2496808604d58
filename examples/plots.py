"""Pictures for the examples: heat maps, bars, lines and scatters as small SVGs.

They need numpy alone. A notebook shows the `Picture` that ends a cell; `make_pages.py` writes it
beside the page. A script that runs by itself writes its pictures into runs/examples.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

COLOURS = ("#1d5c9e", "#a8152a", "#3a7d34", "#8a5a00", "#6b3fa0", "#4d5761")
INK, SOFT, LINE = "#1c2126", "#545d66", "#d9dee3"
FOLDER = Path(__file__).resolve().parent
_kept: list[Path] = []  # pictures written so far
FONT = "system-ui, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Picture:
    """A drawing, and what it shows in words."""

    svg: str
    alt: str  # for those who cannot see it

    def _repr_svg_(self) -> str:
        return self.svg


@dataclass(frozen=True)
class Panel:
    """One part of a picture, its upper left corner at the origin."""

    width: float
    height: float
    body: str  # SVG elements


def heat_map(
    values: ArrayLike,
    columns: Sequence[object],
    title: str,
    *,
    limit: float | None = None,
    rows: Sequence[object] | None = None,
    row_name: str = "layer",
    cell: tuple[int, int] = (17, 11),
    unit: str = "",
) -> Panel:
    """`values` [row, column]: red above zero, blue below, white at zero and for NaN.

    Colours end at `limit`, by default the largest size.
    """
    array = np.nan_to_num(np.asarray(values, dtype=float))
    top = limit or float(np.abs(array).max()) or 1.0
    names = [str(row) for row in (rows if rows is not None else range(len(array)))]
    every = max(1, round(14 / cell[1]))  # so that row labels do not overlap
    left, head = 12 + 6.4 * max(map(len, names)), 22
    width, height = cell[0] * array.shape[1], cell[1] * len(array)
    labels = [str(column).replace("\n", "↵") for column in columns]
    foot = 8 + 6.2 * max(len(label) for label in labels)
    body = [_text(left, 13, title, weight=600, size=12.5)]
    body.append(f'<rect x="{left:g}" y="{head}" width="{width}" height="{height}" fill="#fff"/>')
    for (row, column), value in np.ndenumerate(array):
        colour = _colour(value / top)
        if colour != "#ffffff":
            x, y = left + column * cell[0], head + row * cell[1]
            body.append(
                f'<rect x="{x:g}" y="{y:g}" width="{cell[0]}" height="{cell[1]}" fill="{colour}"/>'
            )
    body.append(
        f'<rect x="{left:g}" y="{head}" width="{width}" height="{height}" fill="none" '
        f'stroke="{LINE}"/>'
    )
    for row, name in enumerate(names):
        if row % every == 0:
            y = head + (row + 0.5) * cell[1] + 3.5
            body.append(_text(left - 4, y, name, anchor="end", size=10, fill=SOFT))
    for column, label in enumerate(labels):
        x, y = left + (column + 0.5) * cell[0] + 3.5, head + height + 6
        body.append(_text(x, y, label, anchor="end", size=10.5, turn=-90))
    scale = f"{row_name} down; colours end at ±{top:.3g} {unit}".rstrip()
    y = head + height + foot + 12
    body.append(_text(left, y, scale, size=10.5, fill=SOFT))
    return Panel(max(left + width, left + 5.6 * len(scale)), y + 6, "".join(body))


def bars(
    values: Mapping[str, float],
    title: str,
    *,
    unit: str = "",
    width: int = 330,
    span: tuple[float, float] | None = None,
) -> Panel:
    """One bar a name, red above zero and blue below.

    `span` holds the ends of the scale, for panels that share one; by default those of the values.
    """
    low, high = span or (min(0.0, *values.values()), max(0.0, *values.values()))
    room = 40 if low < 0 else 6  # for the numbers beside bars that go to the left
    left = 4 + 6.4 * max(len(name) for name in values) + room
    space = width - left - 46
    body = [_text(0, 13, title, weight=600, size=12.5)]
    zero = left + space * -low / ((high - low) or 1)
    for row, (name, value) in enumerate(values.items()):
        y = 24 + row * 17
        size = abs(value) * space / ((high - low) or 1)
        start = zero if value >= 0 else zero - size
        colour = COLOURS[1] if value >= 0 else COLOURS[0]
        body.append(_text(left - room, y + 10, name, anchor="end", size=11))
        body.append(
            f'<rect x="{start:.1f}" y="{y}" width="{size:.1f}" height="12" fill="{colour}"/>'
        )
        x, anchor = (start + size + 4, "start") if value >= 0 else (start - 4, "end")
        body.append(_text(x, y + 10, f"{value:.2f}", anchor=anchor, size=10.5, fill=SOFT))
    end = 24 + len(values) * 17
    body.append(f'<path d="M{zero:.1f} 20V{end}" stroke="{SOFT}"/>')
    if unit:
        body.append(_text(0, end + 13, unit, size=10.5, fill=SOFT))
    return Panel(width, end + 18, "".join(body))


def lines(
    series: Mapping[str, ArrayLike],
    title: str,
    *,
    x_name: str = "layer",
    y_name: str = "",
    log: bool = False,
    size: tuple[int, int] = (470, 230),
) -> Panel:
    """Each series over 0, 1, 2, ...; `log` draws the y axis in decades."""
    arrays = {name: np.asarray(values, dtype=float) for name, values in series.items()}
    points = {
        name: np.stack([np.arange(len(values)), values], axis=1) for name, values in arrays.items()
    }
    return _plot(points, title, x_name, y_name, log, size, joined=True)


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
    *,
    x_name: str = "",
    y_name: str = "",
    log: bool = False,
    size: tuple[int, int] = (270, 240),
) -> Panel:
    """The points (x, y) of each series, joined in order; `log` draws the y axis in decades."""
    points = {
        name: np.stack([np.asarray(axis, dtype=float) for axis in both], axis=1)
        for name, both in series.items()
    }
    return _plot(points, title, x_name, y_name, log, size, joined=True)


def scatter(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    title: str,
    *,
    x_name: str = "",
    y_name: str = "",
    size: tuple[int, int] = (330, 290),
) -> Panel:
    """Points (x, y), a colour a series, on two axes alike; dashed where both are equal."""
    points = {
        name: np.stack([np.ravel(np.asarray(axis, dtype=float)) for axis in both], axis=1)
        for name, both in series.items()
    }
    return _plot(points, title, x_name, y_name, False, size, joined=False)


def picture(*panels: Panel, alt: str, columns: int | None = None) -> Picture:
    """The panels side by side, `columns` in a row (default: all)."""
    gap, per_row = 26, columns or len(panels)
    body, y, width = [], 8.0, 0.0
    for first in range(0, len(panels), per_row):
        row, x = panels[first : first + per_row], 8.0
        for panel in row:
            body.append(f'<g transform="translate({x:g} {y:g})">{panel.body}</g>')
            x += panel.width + gap
        width = max(width, x - gap + 8)
        y += max(panel.height for panel in row) + gap
    height = y - gap + 8
    made = Picture(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" height="{height:.0f}" font-family="{FONT}" role="img">'
        f"<title>{escape(alt)}</title>"
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n',
        alt,
    )
    _keep(made)
    return made


def _keep(made: Picture) -> None:
    """Write a picture of a script that runs by itself into runs/examples, and say where."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    of_examples = script is not None and Path(script).resolve().parent == FOLDER
    if not of_examples or Path(script).stem.startswith("make_"):
        return  # a notebook shows its pictures, and make_pages.py keeps those of the pages
    drawn = FOLDER.parent / "runs" / "examples"
    drawn.mkdir(parents=True, exist_ok=True)
    _kept.append(drawn / f"{Path(script).stem}-{len(_kept) + 1}.svg")
    _kept[-1].write_text(made.svg)
    print(f"picture: {_kept[-1].relative_to(FOLDER.parent)}")


def _plot(
    points: Mapping[str, np.ndarray],
    title: str,
    x_name: str,
    y_name: str,
    log: bool,
    size: tuple[int, int],
    *,
    joined: bool,
) -> Panel:
    every = np.concatenate(list(points.values()))
    every = every[np.isfinite(every).all(axis=1)]
    if log:
        every = every[every[:, 1] > 0]
    (x_low, y_low), (x_high, y_high) = every.min(axis=0), every.max(axis=0)
    if log:
        y_low, y_high = np.floor(np.log10(y_low)), np.ceil(np.log10(y_high))
    if not joined:  # both axes alike, with room for the dots at their ends
        low, high = min(x_low, y_low), max(x_high, y_high)
        x_low = y_low = low - 0.04 * (high - low)
        x_high = y_high = high + 0.04 * (high - low)
    left, head, width, height = 52.0, 24.0, float(size[0]), float(size[1])

    def place(x: float, y: float) -> tuple[float, float]:
        up = np.log10(y) if log else y
        return (
            left + width * (x - x_low) / ((x_high - x_low) or 1),
            head + height * (y_high - up) / ((y_high - y_low) or 1),
        )

    body = [_text(0, 13, title, weight=600, size=12.5)]
    for tick in _ticks(x_low, x_high):
        x, _ = place(tick, 10**y_low if log else y_low)
        body.append(f'<path d="M{x:.1f} {head}v{height}" stroke="{LINE}"/>')
        body.append(_text(x, head + height + 14, f"{tick:g}", anchor="middle", size=10, fill=SOFT))
    heights = 10.0 ** np.arange(y_low, y_high + 1) if log else _ticks(y_low, y_high)
    for tick in heights:
        _, y = place(x_low, tick)
        body.append(f'<path d="M{left} {y:.1f}h{width}" stroke="{LINE}"/>')
        body.append(_text(left - 5, y + 3.5, f"{tick:g}", anchor="end", size=10, fill=SOFT))
    if not joined:  # where x and y are equal
        (x1, y1), (x2, y2) = place(x_low, y_low), place(x_high, y_high)
        body.append(
            f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{SOFT}" '
            'stroke-dasharray="4 3"/>'
        )
    for index, found in enumerate(points.values()):
        colour = COLOURS[index % len(COLOURS)]
        shown = [place(x, y) for x, y in found if np.isfinite([x, y]).all() and (y > 0 or not log)]
        if joined:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in shown)
            body.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        else:
            # points of no length with round caps: the shortest way to write many dots
            path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in shown)
            body.append(
                f'<path d="{path}" stroke="{colour}" stroke-width="5" stroke-linecap="round" '
                'stroke-opacity=".6"/>'
            )
    y = head + height + 32
    body.append(_text(left, y, _axes(x_name, y_name), size=10.5))
    x = left
    y += 16
    for index, name in enumerate(points):
        if x > left and x + 20 + 6.2 * len(name) > left + width:
            x, y = left, y + 15
        body.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" '
                    f'fill="{COLOURS[index % len(COLOURS)]}"/>')  # fmt: skip
        body.append(_text(x + 14, y, name, size=11))
        x += 30 + 6.2 * len(name)
    return Panel(left + width + 10, y + 8, "".join(body))


def _axes(x_name: str, y_name: str) -> str:
    return f"across: {x_name}; up: {y_name}" if y_name else f"across: {x_name}"


def _ticks(low: float, high: float) -> np.ndarray:
    """About five round numbers within the range."""
    step = 10.0 ** np.floor(np.log10((high - low) or 1))
    step *= next(f for f in (0.2, 0.5, 1, 2) if (high - low) / (step * f) <= 6)
    return np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step + 0.0  # no -0


def _colour(share: float) -> str:
    """Blue at -1, white at 0, red at 1."""
    end = np.array([168, 21, 42] if share > 0 else [29, 92, 158])
    mixed = np.rint(255 + (end - 255) * min(1.0, abs(share)) ** 0.8).astype(int)
    return "#ffffff" if abs(share) < 0.01 else "#" + "".join(f"{c:02x}" for c in mixed)


def _text(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    size: float = 12,
    weight: int = 400,
    fill: str = INK,
    turn: int = 0,
) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" '
        f'fill="{fill}"{bold}{turned} xml:space="preserve">{escape(text)}</text>'
    )
