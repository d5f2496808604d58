"""A graph of components as SVG, drawn here: the stream runs upwards, a row for each layer's parts.

    svg = draw_graph(["embed", "logits"], [Drawn("embed", "m0", 9.9), Drawn("m0", "logits", -1.2)])

The layout is the layered one (Sugiyama, Tagawa and Toda 1981): long lines are led through the rows
between their ends, rows are ordered so that few lines cross, and then pulled straight.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from patchsweep.report.html import esc, number

BLUE, RED = "#1d5c9e", "#a8152a"  # raises the metric, lowers it; as in style.css

_ROW = 54  # pixels from row to row
_BOX = (54, 24)  # width and height of a box
_LANE = 20  # width kept for a line that passes a row
_GAP = 16  # between neighbours of a row, beyond their widths
_MARGIN = 92  # to the left, for the names of the layers
_SWEEPS = 12
_PORTS = {"q": -16, "k": 0, "v": 16}  # where lines end below a head's box
_NAME = re.compile(r"a(\d+)\.h(\d+)(?:\.([qkv]))?|m(\d+)|embed|logits")


@dataclass(frozen=True)
class Drawn:
    """A line: what `sender` writes, as far as `reader` sees it."""

    sender: str  # embed, a3.h2 or m5
    reader: str  # a7.h1.q, a7.h1.k, a7.h1.v, m5 or logits; a7.h1 for the head as a whole
    value: float  # signed effect; its size is the line's width, its sign the colour
    title: str = ""  # shown when pointed at; empty: the ends and the value


@dataclass
class _Vertex:
    """A box, or a lane through which a long line passes a row."""

    row: int
    label: str = ""  # empty: a lane
    title: str = ""
    x: float = 0.0
    below: list[_Vertex] = field(default_factory=list)
    above: list[_Vertex] = field(default_factory=list)

    @property
    def half(self) -> float:
        return (_BOX[0] if self.label else _LANE) / 2


@dataclass(frozen=True)
class _Place:
    """The box of a name."""

    key: str
    label: str
    title: str
    row: tuple[float, int]  # layer, then the place within it: keys and values, heads, MLP
    port: int = 0  # pixels from the box's middle to where a line into it ends


def draw_graph(
    nodes: Iterable[str],
    edges: Sequence[Drawn],
    *,
    group: int = 1,
    unit: str = "",
    label: str = "The foremost edges",
) -> str:
    """An `<svg>` element of `edges` and of the boxes at their ends; the same input, the same text.

    `nodes` are boxes to draw even where no edge ends, under the same names (`embed`, `a3.h2`, `m5`,
    `logits`; `a7.h1.k` for a key-value head). Rows stand for layers, the first at the bottom;
    layers with no box are left out. A line is as wide as its |value| relative to the largest, blue
    where the value is positive, red where it is negative, and tells its numbers when pointed at.

    Args:
        group: query heads that share a key-value head. Above 1, `a7.h1.k` and `a7.h1.v` end at a
            box of the key-value head, which grey lines join to those of its heads that are drawn.
        unit: of the values, for the titles.
        label: what the drawing shows, for screen readers.

    Raises:
        ValueError: a name is none of a component, or an edge does not lead upwards.
    """
    places: dict[str, _Place] = {}
    lines: list[tuple[_Place, _Place, Drawn | None]] = []
    for name in nodes:
        place = _place(name, group)
        places.setdefault(place.key, place)
    for edge in edges:
        sender, reader = _place(edge.sender, 1), _place(edge.reader, group)
        if not sender.row < reader.row:
            raise ValueError(f"{edge.reader} reads the stream before {edge.sender} writes into it")
        lines.append((sender, reader, edge))
        for place in (sender, reader):
            places.setdefault(place.key, place)
    lines += [(a, b, None) for a, b in _shared(places, group)]

    rows = sorted({place.row for place in places.values()})
    at = {row: i for i, row in enumerate(rows)}
    boxes = {key: _Vertex(at[place.row], place.label, place.title) for key, place in places.items()}
    ranks: list[list[_Vertex]] = [[] for _ in rows]
    for box in boxes.values():
        ranks[box.row].append(box)
    paths = [_lead(boxes[a.key], boxes[b.key], ranks) for a, b, _ in lines]
    ranks = _order(ranks)
    _straighten(ranks)
    return _svg(rows, ranks, list(boxes.values()), lines, paths, unit, label)


def _place(name: str, group: int) -> _Place:
    """Where a component stands."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r} names no component; write embed, a3.h2, a7.h1.q, m5 or logits")
    if name == "embed":
        return _Place(name, name, "what enters the first block", (-1.0, 0))
    if name == "logits":
        return _Place(name, name, "the final norm and the unembedding", (float("inf"), 0))
    if found[4] is not None:
        return _Place(name, name, f"the MLP of layer {found[4]}", (float(found[4]), 2))
    layer, head, kind = int(found[1]), int(found[2]), found[3]
    port = _PORTS.get(kind or "", 0)
    if kind in ("k", "v") and group > 1:
        heads = f"{head * group} to {(head + 1) * group - 1}"
        return _Place(
            f"a{layer}.kv{head}",
            f"a{layer}.kv{head}",
            f"key-value head {head} of layer {layer}, which heads {heads} share",
            (float(layer), 0),
            port,
        )
    key = f"a{layer}.h{head}"
    return _Place(key, key, f"head {head} of layer {layer}", (float(layer), 1), port)


def _shared(places: dict[str, _Place], group: int) -> list[tuple[_Place, _Place]]:
    """Key-value heads, and those of their heads that have a box."""
    found = []
    for key, place in places.items():
        layer, kv, head = key.partition(".kv")
        if kv:
            mine = (f"{layer}.h{int(head) * group + i}" for i in range(group))
            found += [(place, places[name]) for name in mine if name in places]
    return found


def _lead(first: _Vertex, last: _Vertex, ranks: list[list[_Vertex]]) -> list[_Vertex]:
    """The vertices of a line, with a lane in every row between its ends."""
    lanes = [_Vertex(row) for row in range(first.row + 1, last.row)]
    path = [first, *lanes, last]
    for lane in lanes:
        ranks[lane.row].append(lane)
    for below, above in itertools.pairwise(path):
        below.above.append(above)
        above.below.append(below)
    return path


def _order(ranks: list[list[_Vertex]]) -> list[list[_Vertex]]:
    """The rows, each ordered so that lines cross little: by the mean place of their neighbours,
    row by row upwards and downwards in turn; the best of all turns is kept."""
    place = {id(v): float(i) for row in ranks for i, v in enumerate(row)}
    best, fewest = [list(row) for row in ranks], _crossings(ranks)
    for sweep in range(_SWEEPS):
        up = sweep % 2 == 0
        for row in ranks if up else reversed(ranks):
            means = {}
            for v in row:
                near = v.below if up else v.above
                means[id(v)] = sum(place[id(n)] for n in near) / len(near) if near else place[id(v)]
            row.sort(key=lambda v, means=means: means[id(v)])  # type: ignore[misc]
            for i, v in enumerate(row):
                # on a scale on which rows of all lengths are centred
                place[id(v)] = i - (len(row) - 1) / 2
        crossings = _crossings(ranks)
        if crossings < fewest:
            best, fewest = [list(row) for row in ranks], crossings
    return best


def _crossings(ranks: Sequence[Sequence[_Vertex]]) -> int:
    """How many pairs of lines cross."""
    total = 0
    for row, above in itertools.pairwise(ranks):
        place = {id(v): i for i, v in enumerate(above)}
        seen: list[int] = []
        for v in row:
            ends = sorted(place[id(n)] for n in v.above)
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _straighten(ranks: Sequence[Sequence[_Vertex]]) -> None:
    """Set every x: near the mean of its neighbours', in the row's order, with room between."""
    for row in ranks:
        _spread(row, [0.0] * len(row))
    for sweep in range(2 * _SWEEPS):
        for row in ranks if sweep % 2 == 0 else reversed(ranks):
            wanted = []
            for v in row:
                # lanes pull each other hard, so that long lines bend at their ends
                near = [(n.x, 1.0 if v.label or n.label else 6.0) for n in (*v.below, *v.above)]
                total = sum(weight for _, weight in near)
                wanted.append(sum(x * w for x, w in near) / total if near else v.x)
            _spread(row, wanted)


def _spread(row: Sequence[_Vertex], wanted: Sequence[float]) -> None:
    """The places nearest to `wanted` (least squares) that keep the row's order and room."""
    offset = [0.0]
    for left, right in itertools.pairwise(row):
        room = _GAP if left.label or right.label else 0
        offset.append(offset[-1] + left.half + right.half + room)
    blocks: list[tuple[float, int]] = []  # mean, size; neighbours too near share one
    for x, off in zip(wanted, offset, strict=False):
        mean, size = x - off, 1
        while blocks and blocks[-1][0] >= mean:
            before, n = blocks.pop()
            mean, size = (before * n + mean * size) / (n + size), n + size
        blocks.append((mean, size))
    means = [mean for mean, size in blocks for _ in range(size)]
    for v, mean, off in zip(row, means, offset, strict=False):
        v.x = mean + off


def _svg(
    rows: Sequence[tuple[float, int]],
    ranks: Sequence[Sequence[_Vertex]],
    boxes: Sequence[_Vertex],
    lines: Sequence[tuple[_Place, _Place, Drawn | None]],
    paths: Sequence[Sequence[_Vertex]],
    unit: str,
    label: str,
) -> str:
    vertices = [v for row in ranks for v in row]
    if not vertices:
        return '<svg xmlns="http://www.w3.org/2000/svg" width="0" height="0"></svg>'
    left = min(v.x - v.half for v in vertices) - _MARGIN
    right = max(v.x + v.half for v in vertices) + _GAP
    width, height = right - left, _ROW * len(rows) + 2 * _GAP
    largest = max((abs(edge.value) for *_, edge in lines if edge is not None), default=0.0) or 1.0

    def y(v: _Vertex) -> float:
        return height - _GAP - _ROW * (v.row + 0.5)

    drawn = [*_bands(rows, left, width, height)]
    # small effects last, so that a thin line over a wide one can be pointed at
    ordered = sorted(
        zip(lines, paths, strict=True), key=lambda x: -abs(x[0][2].value) if x[0][2] else 0.0
    )
    for (_, reader, edge), path in ordered:
        points = [(v.x, y(v)) for v in path]
        points[0] = (path[0].x, y(path[0]) - _BOX[1] / 2)
        port = reader.port if edge is not None else 0
        points[-1] = (path[-1].x + port, y(path[-1]) + _BOX[1] / 2)
        drawn.append(_line(points, edge, largest, unit))
    ports = {(reader.key, edge.reader[-1]) for _, reader, edge in lines if edge and reader.port}
    ports |= {(r.key, "k") for _, r, edge in lines if edge and edge.reader.endswith(".k")}
    drawn += [_box(v, y(v), sorted(p for key, p in ports if key == v.label)) for v in boxes]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="graph" role="img" '
        f'aria-label="{esc(label)}" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="{left:.1f} 0 {width:.1f} {height:.1f}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="12">'
        f"{''.join(drawn)}</svg>"
    )


def _bands(
    rows: Sequence[tuple[float, int]], left: float, width: float, height: float
) -> Iterable[str]:
    """The layers: every other one shaded, each with its name."""
    by_layer: dict[float, list[int]] = defaultdict(list)
    for i, (layer, _) in enumerate(rows):
        by_layer[layer].append(i)
    for n, (layer, members) in enumerate(by_layer.items()):
        top = height - _GAP - _ROW * (members[-1] + 1)
        tall = _ROW * len(members)
        if n % 2:
            yield (
                f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall}" '
                'fill="#f5f7f9"/>'
            )
        if 0 <= layer < float("inf"):
            yield (
                f'<text x="{left + 8:.1f}" y="{top + tall / 2 + 4:.1f}" fill="#545d66">'
                f"layer {layer:.0f}</text>"
            )


def _line(
    points: Sequence[tuple[float, float]], edge: Drawn | None, largest: float, unit: str
) -> str:
    path = _curve(points)
    if edge is None:
        return f'<path d="{path}" fill="none" stroke="#b9c1c9" stroke-dasharray="3 3"/>'
    size = 1.2 + 6.0 * abs(edge.value) / largest
    value = f"{number(edge.value, sign=True)} {unit}".rstrip()
    title = edge.title or f"{edge.sender} → {edge.reader}: {value}"
    colour = BLUE if edge.value >= 0 else RED
    return (
        f'<path d="{path}" fill="none" stroke="{colour}" stroke-opacity=".72" '
        f'stroke-width="{size:.1f}"><title>{esc(title)}</title></path>'
    )


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A smooth path upwards through all points, upright at its ends, without overshooting."""
    steps = list(itertools.pairwise(points))
    slopes = [(b[0] - a[0]) / (b[1] - a[1]) for a, b in steps]
    # the harmonic mean of both slopes, 0 at turning points (Fritsch and Butland 1984)
    inner = [2 * s * t / (s + t) if s * t > 0 else 0.0 for s, t in itertools.pairwise(slopes)]
    tangents = [0.0, *inner, 0.0]
    parts = [f"M{points[0][0]:.1f} {points[0][1]:.1f}"]
    for ((x0, y0), (x1, y1)), (t0, t1) in zip(steps, itertools.pairwise(tangents), strict=True):
        third = (y1 - y0) / 3
        parts.append(
            f"C{x0 + t0 * third:.1f} {y0 + third:.1f} {x1 - t1 * third:.1f} {y1 - third:.1f} "
            f"{x1:.1f} {y1:.1f}"
        )
    return "".join(parts)


def _box(v: _Vertex, y: float, ports: Sequence[str]) -> str:
    """A box with its name, and the letters of the readers at which lines end."""
    wide, tall = _BOX
    fill = "#e8f1fa" if ".h" in v.label else "#fdf1dc" if v.label.startswith("m") else "#fff"
    letters = "".join(
        f'<text x="{v.x + _PORTS[p]:.1f}" y="{y + tall / 2 + 10:.1f}" text-anchor="middle" '
        f'font-size="10" fill="#1c2126" stroke="#fff" stroke-width="3" '
        f'paint-order="stroke">{p}</text>'
        for p in ports
    )
    return (
        f"<g><title>{esc(v.title)}</title>"
        f'<rect x="{v.x - wide / 2:.1f}" y="{y - tall / 2:.1f}" width="{wide}" height="{tall}" '
        f'rx="4" fill="{fill}" stroke="#7c8894"/>'
        f'<text x="{v.x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{esc(v.label)}</text>'
        f"{letters}</g>"
    )
