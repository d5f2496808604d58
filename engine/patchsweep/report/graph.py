"""Draws a graph of components as SVG: layers are rows, and the residual stream runs upwards.

    svg = draw_graph(["embed", "logits"], [Drawn("embed", "m0", 9.9), Drawn("m0", "logits", -1.2)])

The layout is layered (Sugiyama, Tagawa and Toda 1981): a long line gets a lane in each row between
its ends, rows are ordered for few crossings, and x coordinates are chosen for straight lines.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_right, insort
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import xarray as xr

from patchsweep.data.show import esc, number

BLUE, RED = "#1d5c9e", "#a8152a"  # raises the metric, lowers it; the colours of style.css

# of pages with a graph
STYLE = """
.graph { display: block; }
.scroll.figure { border: 1px solid var(--line); border-radius: 4px; padding: .5rem; }
"""
HOW_TO_READ = (
    "Read it upwards: tokens enter at the bottom, each row is a layer (rows without a box are left "
    "out), the logits are on top."
)
_ROW = 54  # pixels from row to row
_BOX = (54, 24)  # width and height of a box
_LANE = 20  # width of a line that passes a row
_GAP = 16  # space between neighbours in a row
_MARGIN = 92  # left margin, for the names of the layers
_SWEEPS = 12
_PORTS = {"q": -16, "k": 0, "v": 16}  # x offset at which lines end below a head's box
_NAME = re.compile(r"a(\d+)\.h(\d+)(?:\.([qkv]))?|m(\d+)|embed|logits")


@dataclass(frozen=True)
class Drawn:
    """A line of the graph: the edge from `sender` to `reader`."""

    sender: str  # embed, a3.h2 or m5
    reader: str  # a7.h1.q, a7.h1.k, a7.h1.v, m5 or logits; a7.h1 for the head as a whole
    value: float  # signed effect; its size sets the line's width, its sign the colour
    title: str = ""  # tooltip; empty: the ends and the value


@dataclass(eq=False)
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
    """The box of a component."""

    name: str
    title: str
    row: tuple[float, int]  # layer, then 0 for keys and values, 1 for heads, 2 for the MLP
    port: int = 0  # pixels from the box's middle to the end of a line into it


def draw_graph(
    nodes: Iterable[str],
    edges: Sequence[Drawn],
    *,
    group: int = 1,
    unit: str = "",
    label: str = "The foremost edges",
) -> str:
    """Return an `<svg>` element of `edges` and the boxes at their ends; deterministic.

    `nodes` are boxes to draw even without an edge, under the same names (`embed`, `a3.h2`, `m5`,
    `logits`; `a7.h1.k` for a key-value head). Rows are layers, the first at the bottom; layers
    without a box are left out. A line's width is its |value| relative to the largest. Lines are
    blue for positive and red for negative values, and have their numbers as a tooltip.

    Args:
        group: query heads per key-value head. Above 1, `a7.h1.k` and `a7.h1.v` end at a box of
            the key-value head; grey lines join it to those of its query heads that have a box.
        unit: unit of the values, for the titles.
        label: description of the drawing, for screen readers.

    Raises:
        ValueError: a name is not a component's, or an edge does not lead upwards.
    """
    places: dict[str, _Place] = {}
    lines: list[tuple[_Place, _Place, Drawn | None]] = []
    for place in (_place(name, group) for name in nodes):
        places.setdefault(place.name, place)
    for edge in edges:
        sender, reader = _place(edge.sender, 1), _place(edge.reader, group)
        if not sender.row < reader.row:
            raise ValueError(f"{edge.reader} reads the stream before {edge.sender} writes into it")
        lines.append((sender, reader, edge))
        for place in (sender, reader):
            places.setdefault(place.name, place)
    lines += [(a, b, None) for a, b in _shared(places, group)]

    rows = sorted({place.row for place in places.values()})
    boxes = {
        name: _Vertex(rows.index(place.row), name, place.title) for name, place in places.items()
    }
    ranks: list[list[_Vertex]] = [[] for _ in rows]
    for box in boxes.values():
        ranks[box.row].append(box)
    paths = [_lead(boxes[a.name], boxes[b.name], ranks) for a, b, _ in lines]
    ranks = _order(ranks)
    _straighten(ranks)
    return _svg(rows, ranks, list(boxes.values()), lines, paths, unit, label)


def graph_of_edges(ds: xr.Dataset, edges: Sequence[Drawn], label: str, unit: str = "") -> str:
    """Return `draw_graph` of edges of a model, from the embeddings to the logits.

    `ds` is the Dataset of an analysis of edges, which says how many heads share keys and values.
    """
    nodes = ("embed", "logits")
    return draw_graph(nodes, edges, group=heads_per_key(ds), unit=unit, label=label)


def heads_per_key(ds: xr.Dataset) -> int:
    """Return how many query heads read one key-value head, in the model of an analysis."""
    return int(ds.attrs["n_heads"]) // int(ds.attrs["n_kv_heads"])


def _place(name: str, group: int) -> _Place:
    """Return the box of a component."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} names no component; write embed, a3.h2, a7.h1.q, m5 or logits")
    if name == "embed":
        return _Place(name, "what enters the first block", (-1.0, 0))
    if name == "logits":
        return _Place(name, "the final norm and the unembedding", (float("inf"), 0))
    if match[4] is not None:
        return _Place(name, f"the MLP of layer {match[4]}", (float(match[4]), 2))
    layer, head, kind = int(match[1]), int(match[2]), match[3]
    port = _PORTS.get(kind or "", 0)
    if kind in ("k", "v") and group > 1:
        heads = f"{head * group} to {(head + 1) * group - 1}"
        return _Place(
            f"a{layer}.kv{head}",
            f"key-value head {head} of layer {layer}, which heads {heads} share",
            (float(layer), 0),
            port,
        )
    return _Place(f"a{layer}.h{head}", f"head {head} of layer {layer}", (float(layer), 1), port)


def _shared(places: dict[str, _Place], group: int) -> list[tuple[_Place, _Place]]:
    """Return (key-value head, query head) for each query head with a box."""
    pairs = []
    for name, place in places.items():
        layer, kv, head = name.partition(".kv")
        if kv:
            query_heads = (f"{layer}.h{int(head) * group + i}" for i in range(group))
            pairs += [(place, places[one]) for one in query_heads if one in places]
    return pairs


def _lead(first: _Vertex, last: _Vertex, ranks: list[list[_Vertex]]) -> list[_Vertex]:
    """Return the vertices of a line, with a new lane in every row between its ends."""
    lanes = [_Vertex(row) for row in range(first.row + 1, last.row)]
    path = [first, *lanes, last]
    for lane in lanes:
        ranks[lane.row].append(lane)
    for below, above in itertools.pairwise(path):
        below.above.append(above)
        above.below.append(below)
    return path


def _order(ranks: list[list[_Vertex]]) -> list[list[_Vertex]]:
    """Return the rows, ordered for few crossings of lines.

    Sweeps alternate upwards and downwards and sort each row by the mean place of its neighbours;
    the order with the fewest crossings is kept.
    """
    place = {v: float(i) for row in ranks for i, v in enumerate(row)}
    best, fewest = [list(row) for row in ranks], _crossings(ranks)
    for sweep in range(_SWEEPS):
        up = sweep % 2 == 0
        for row in ranks if up else reversed(ranks):
            means: dict[_Vertex, float] = {}
            for v in row:
                near = v.below if up else v.above
                means[v] = sum(place[n] for n in near) / len(near) if near else place[v]
            row.sort(key=means.__getitem__)
            for i, v in enumerate(row):
                # places are centred, so that rows of different lengths compare
                place[v] = i - (len(row) - 1) / 2
        crossings = _crossings(ranks)
        if crossings < fewest:
            best, fewest = [list(row) for row in ranks], crossings
    return best


def _crossings(ranks: Sequence[Sequence[_Vertex]]) -> int:
    """Return the number of pairs of lines that cross."""
    total = 0
    for row, above in itertools.pairwise(ranks):
        place = {v: i for i, v in enumerate(above)}
        seen: list[int] = []
        for v in row:
            ends = sorted(place[n] for n in v.above)
            total += sum(len(seen) - bisect_right(seen, end) for end in ends)
            for end in ends:
                insort(seen, end)
    return total


def _straighten(ranks: Sequence[Sequence[_Vertex]]) -> None:
    """Set every x close to the mean of its neighbours' x, in the row's order and with gaps."""
    for row in ranks:
        _spread(row, [0.0] * len(row))
    for sweep in range(2 * _SWEEPS):
        for row in ranks if sweep % 2 == 0 else reversed(ranks):
            targets = []
            for v in row:
                # lanes have a large weight, so that long lines bend only near their ends
                near = [(n.x, 1.0 if v.label or n.label else 6.0) for n in (*v.below, *v.above)]
                total = sum(weight for _, weight in near)
                targets.append(sum(x * w for x, w in near) / total if near else v.x)
            _spread(row, targets)


def _spread(row: Sequence[_Vertex], wanted: Sequence[float]) -> None:
    """Set x closest to `wanted` (least squares) that keeps the row's order and gaps."""
    offset = [0.0]
    for left, right in itertools.pairwise(row):
        room = _GAP if left.label or right.label else 0
        offset.append(offset[-1] + left.half + right.half + room)
    blocks: list[tuple[float, int]] = []  # mean, size; neighbours that touch form a block
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
    # small effects last, so that a thin line lies over a wide one and keeps its tooltip
    ordered = sorted(
        zip(lines, paths, strict=True), key=lambda x: -abs(x[0][2].value) if x[0][2] else 0.0
    )
    for (_, reader, edge), path in ordered:
        points = [(v.x, y(v)) for v in path]
        points[0] = (path[0].x, y(path[0]) - _BOX[1] / 2)
        port = reader.port if edge is not None else 0
        points[-1] = (path[-1].x + port, y(path[-1]) + _BOX[1] / 2)
        drawn.append(_line(points, edge, largest, unit))
    ports = {(reader.name, edge.reader[-1]) for _, reader, edge in lines if edge and reader.port}
    ports |= {(r.name, "k") for _, r, edge in lines if edge and edge.reader.endswith(".k")}
    drawn += [_box(v, y(v), sorted(p for name, p in ports if name == v.label)) for v in boxes]
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
    """Yield the background of the layers: every other one shaded, each with its name."""
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
    """Return a smooth SVG path through all points, vertical at its ends, without overshoot."""
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
    """Return a box with its name, and below it the letters of the ports where lines end."""
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
