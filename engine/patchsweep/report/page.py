"""Assembles the page of a sweep: maps, tables, comparison, cost and provenance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import xarray as xr

from patchsweep.data.show import esc, plural
from patchsweep.errors import StoreError
from patchsweep.report import comparison, question
from patchsweep.report.heatmap import Figure, draw_site, frame_key
from patchsweep.report.html import choice
from patchsweep.report.shell import get_plotlyjs, page, resource, section
from patchsweep.report.tables import (
    bf16_table,
    cost_table,
    largest_table,
    noise_table,
    provenance_table,
    totals,
)
from patchsweep.report.views import View, choose_views, has_source
from patchsweep.results import accessor as summary
from patchsweep.results.compare import thresholds

_WIDE = 30  # columns from which a map takes the page's full width


def build_page(ds: xr.Dataset, seconds: Mapping[str, float] = MappingProxyType({})) -> str:
    """Return the report of `ds` as self-contained HTML; `seconds` are the times of its sites.

    Raises:
        StoreError: `ds` holds no site, or no unpatched metrics.
    """
    names = shown_sites(ds)
    if not names:
        raise StoreError("the store holds no site yet; run a sweep into it first")
    views = choose_views(ds, names)
    metrics = [str(m) for m in ds["metric"].values]
    figures = [draw_site(ds, name, views) for name in names]
    panels = comparison.compare_panels(ds)
    fragments = _fragments(ds, names, metrics, views, figures)
    first = fragments[frame_key(metrics[0], views[0])]

    data = {
        "metrics": metrics,
        "views": [view_data(view) for view in views],
        "sites": [figure_data(figure) for figure in figures],
        "panels": [p.payload for p in panels],
    }
    sections = [
        f"<header><h1>{question.headline(ds)}</h1>{question.lead(ds)}"
        f"{question.facts(ds, totals(ds), sum(seconds.values()))}"
        f"{question.banner(ds, names)}</header>",
        _controls(ds, metrics, views),
        _slot("prompts", first["prompts"], "section"),
        _maps(ds, figures, first),
        section("largest", "The largest effects", _slot("table", first["table"])),
        _comparison(panels),
        section("noise", "What is rounding", noise_table(ds)),
        section("bf16", "How exact bf16 was here", bf16_table(ds)),
        section("cost", "What the run cost", cost_table(ds, seconds)),
        section("provenance", "Where the numbers come from", provenance_table(ds)),
        section("words", "Words", question.words()),
    ]
    templates = "".join(
        f'<template data-key="{esc(key)}">'
        + "".join(_slot(name, html) for name, html in parts.items())
        + "</template>"
        for key, parts in fragments.items()
    )
    return page(
        question.title(ds),
        sections,
        data=data,
        scripts=[
            get_plotlyjs(),
            resource("numbers.js") + resource("maps.js"),
            resource("report.js"),
        ],
        templates=templates,
    )


def view_data(view: View) -> dict[str, object]:
    """Return a view as JSON data for the page's scripts."""
    return {
        "key": view.key,
        "first": view.first,
        "n_pos": view.n_pos,
        "n_pairs": view.n_pairs,
        "base": view.base_tokens,
        "source": view.source_tokens,
        "differs": view.differs,
    }


def figure_data(figure: Figure) -> dict[str, object]:
    """Return a map and its frames as JSON data for the page's scripts."""
    frames = {key: frame.cells for key, frame in figure.frames.items()}
    return {**figure.payload, "frames": frames}


def shown_sites(ds: xr.Dataset) -> tuple[str, ...]:
    """Return the variables with a map: exact sites, and estimates of sites without exact values."""
    exact = summary.sites(ds)
    alone = [n for n, (site, _) in summary.estimates(ds).items() if site not in exact]
    return (*exact, *alone)


def _fragments(
    ds: xr.Dataset,
    names: tuple[str, ...],
    metrics: Sequence[str],
    views: Sequence[View],
    figures: Sequence[Figure],
) -> dict[str, dict[str, str]]:
    """Return the HTML that depends on the selectors: "metric|view" -> slot -> HTML."""
    small = ds[
        [n for n, a in ds.data_vars.items() if n in names or set(a.dims) <= {"metric", "pair"}]
    ]
    fragments = {}
    for metric in metrics:
        for view in views:
            key = frame_key(metric, view)
            fragments[key] = {
                "prompts": question.prompts(ds, metric, view),
                "table": largest_table(small, names, metric, view),
                **{f"caption-{i}": f.frames[key].caption for i, f in enumerate(figures)},
            }
    return fragments


def _controls(ds: xr.Dataset, metrics: Sequence[str], views: Sequence[View]) -> str:
    """Return the selectors as HTML; "" if none has two options."""
    parts = []
    if len(metrics) > 1:
        parts.append(choice("metric", "Metric", [(m, m) for m in metrics]))
    if len(views) > 1:
        parts.append(choice("view", "Pairs", [(v.key, v.label) for v in views]))
    n_single, n_pairs = sum(v.pair is not None for v in views), ds.sizes["pair"]
    if n_single < n_pairs:
        parts.append(
            f"<span>{plural(n_pairs, 'pair')} in the store; here the mean and the first "
            f"{n_single}.</span>"
        )
    return (
        f'<nav class="controls" aria-label="What is shown">{"".join(parts)}</nav>' if parts else ""
    )


def _maps(ds: xr.Dataset, figures: Sequence[Figure], first: dict[str, str]) -> str:
    drawn = [
        map_html(index, figure, first[f"caption-{index}"], alone=len(figures) == 1)
        for index, figure in enumerate(figures)
    ]
    how = (
        f"<p>Each cell is one patch. {colours(has_source(ds))} Point at a cell for its numbers.</p>"
    )
    return section("maps", "What each patch does", f'{how}<div class="grid">{"".join(drawn)}</div>')


def colours(paired: bool) -> str:
    """Return what the colours of maps mean, as HTML; `paired`: there is a source run."""
    if paired:
        return (
            '<b class="blue">Blue</b>: the patch moves the metric towards the source run, and at 1 '
            'all the way. White: no change. <b class="red">Red</b>: it moves it the other way. '
            "A token in bold differs between the two prompts."
        )
    return (
        '<b class="blue">Blue</b>: the patch raises the metric. White: no change. '
        '<b class="red">Red</b>: it lowers it.'
    )


def map_html(index: int, figure: Figure, caption: str, *, alone: bool = False) -> str:
    """Return the place of map `index` in a page, with its caption (HTML); maps.js draws it."""
    labels, columns = figure.payload["labels"], figure.payload["columns"]
    assert isinstance(labels, dict)
    wide = " wide" if len(labels.get(columns, ())) >= _WIDE or alone else ""
    choose = (
        f'<label class="choose">position <select data-pick="{index}"></select></label>'
        if figure.payload["full"]
        else ""
    )
    note = f'<p class="note">{figure.note}</p>' if figure.note else ""
    return (
        f'<figure class="map{wide}"><h3>{esc(figure.title)} <code>{esc(figure.site)}</code>'
        f"{choose}</h3>{note}"
        f'<div class="plot" id="map-{index}" role="img" aria-label="{esc(figure.title)}"></div>'
        f"{_slot(f'caption-{index}', caption, 'figcaption')}</figure>"
    )


def _comparison(panels: Sequence[comparison.Panel]) -> str:
    if not panels:
        return ""
    how = (
        "<p>Each point is one patch: its exact effect across, its estimate up. On the diagonal "
        f"the estimate is right. {thresholds()}</p>"
    )
    grid = f'<div class="grid">{"".join(p.html for p in panels)}</div>'
    return section("comparison", "How far the estimates can be trusted", how + grid)


def _slot(name: str, html: str, tag: str = "div") -> str:
    return f'<{tag} data-slot="{name}">{html}</{tag}>'
