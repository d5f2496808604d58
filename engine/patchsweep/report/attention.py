"""The page of attention views: patterns of the top-k heads in both runs, with attributions."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from patchsweep.analyses.attention import RankedHead, ranked_heads
from patchsweep.data.show import count, esc, number, percent, plural, token_html, visible
from patchsweep.report.figure import BLUES, RED_BLUE
from patchsweep.report.html import choice, marked, numbers, pack, table
from patchsweep.report.question import model_name
from patchsweep.report.shell import page, resource, section

N_PAIRS = 8  # pairs whose maps are on the page, as far as they stay within `MAP_BYTES`
MAP_BYTES = 6 * 2**20


def build(ds: xr.Dataset) -> str:
    """Return the page of the Dataset of `patchsweep.analyses.attention.attention`."""
    model = model_name(ds)
    metrics = [str(name) for name in ds["metric"].values]
    n_shown = _n_shown(ds)
    title = f"Attention in {model}: the heads that matter to {metrics[0]}"
    blocks = [
        f'<div data-pair="{pair}"{"" if pair == 0 else " hidden"}>{_pair(ds, pair)}</div>'
        for pair in range(n_shown)
    ]
    tables = [
        f'<div data-pair="{pair}" data-metric="{number_}"'
        f"{'' if pair == number_ == 0 else ' hidden'}>{_ranking(ds, metric, pair)}</div>"
        for pair in range(n_shown)
        for number_, metric in enumerate(metrics)
    ]
    parts = [
        _header(ds, model),
        _controls(ds, n_shown),
        section("prompts", "What the model says next", "".join(blocks)),
        section("ranking", "The heads", _READING + "".join(tables)),
        section("maps", "Where they look", _MAPS + _cards(ds)),
    ]
    return page(
        title,
        parts,
        data=_data(ds, n_shown),
        scripts=[resource("numbers.js") + resource("attention.js")],
        style=resource("attention.css"),
    )


_READING = (
    "<p><b>Attribution</b> of a cell is (source pattern &minus; base pattern) &times; gradient: "
    "to first order, what the metric of the base run would gain if that query looked at that key "
    "as strongly as it does in the source run. A head's number is the sum over its cells, the mean "
    "over all pairs; heads are ordered by the sum of absolute values. <b>Exact</b> is the "
    "effect of replacing the head's whole pattern, run and not estimated; where the two disagree, "
    "believe it. In both, patterns alone move: what is read at a key stays the base run's.</p>"
)
_MAPS = (
    "<p>Rows are queries (the token that looks), columns keys (the token looked at); only earlier "
    "tokens can be looked at. Blue on the left maps is attention probability; on the third, blue "
    "raises the metric and red lowers it. The frame marks the cell of largest attribution. Point "
    "at a cell for its tokens and numbers. Attention to the first token is mostly rest: choose "
    "<i>weighted by |v|</i> to see what the value there is worth.</p>"
)


def _header(ds: xr.Dataset, model: str) -> str:
    denoising = ds.attrs["direction"] == "denoising"
    base, source = ("corrupted", "clean") if denoising else ("clean", "corrupted")
    n_heads = ds.sizes["layer"] * ds.sizes["head"]
    return (
        f'<header><h1>Attention in <span class="name">{esc(model)}</span></h1>'
        f'<p class="lead">{plural(ds.sizes["rank"], "head")} of {count(n_heads)}, and how '
        f"each attends in the <b>base</b> run (the {base} prompt) and in the <b>source</b> run "
        f"(the {source} prompt). Which of the differences move the answer is what attribution "
        "tells.</p></header>"
    )


def _controls(ds: xr.Dataset, n_shown: int) -> str:
    right, wrong = (
        [visible(str(text)) for text in ds[name].values] for name in ("answer", "wrong_answer")
    )
    pairs = [f"{pair}: {right[pair]} or {wrong[pair]}" for pair in range(n_shown)]
    metrics = [str(name) for name in ds["metric"].values]
    weighted = [("", "probability"), ("1", "weighted by |v|")]
    n_pairs = ds.sizes["pair"]
    note = f"<span>{plural(n_pairs, 'pair')} in the store; here the first {n_shown}.</span>"
    return (
        '<div class="controls">'
        f"{choice('pair', 'pair', [*enumerate(pairs)], always=True)}"
        f"{choice('metric', 'metric', [*enumerate(metrics)], always=True)}"
        f"{choice('weighted', 'patterns', weighted)}"
        f"{note if n_shown < n_pairs else ''}</div>"
    )


def _pair(ds: xr.Dataset, pair: int) -> str:
    """Return HTML of both prompts of a pair, their metrics and their next tokens."""
    base, source = (_tokens(ds, run, pair) for run in ("base", "source"))
    rows = []
    for run, tokens, others in (("base", base, source), ("source", source, base)):
        differs = (token != other for token, other in zip(tokens, others, strict=True))
        rows.append(f"<tr><th>{run}</th><td>{''.join(marked(tokens, differs))}</td></tr>")
    values = ", ".join(
        f"{esc(str(name))} {number(float(ds['base_metric'][i, pair]), sign=True)} in the base run, "
        f"{number(float(ds['source_metric'][i, pair]), sign=True)} in the source run"
        for i, name in enumerate(ds["metric"].values)
    )
    guesses = "".join(_guesses(ds, run, pair) for run in ("base", "source"))
    return (
        f'<table class="prompt">{"".join(rows)}</table><p class="ends">{values}</p>'
        f'<div class="guess">{guesses}</div>'
    )


def _guesses(ds: xr.Dataset, run: str, pair: int) -> str:
    one = ds.sel(run=run).isel(pair=pair)
    answers = {str(one["answer"].values), str(one["wrong_answer"].values)}
    rows = []
    for token, prob, logit in zip(
        one["top_token"].values, one["top_prob"].values, one["top_logit"].values, strict=True
    ):
        mark = ' class="right"' if str(token) in answers else ""
        rows.append(
            f"<tr{mark}><th>{token_html(str(token))}</th>"
            f'<td class="n">{percent(float(prob))}</td>'
            f'<td><span class="bar" style="width:{8 * float(prob):.2f}rem"></span></td>'
            f'<td class="n">{number(float(logit))}</td></tr>'
        )
    answers_html = " and ".join(
        f"{token_html(str(one[name].values))} {percent(float(one[prob_name]))}"
        for name, prob_name in (("answer", "answer_prob"), ("wrong_answer", "wrong_prob"))
    )
    return (
        f"<div><h3>after the {run} prompt</h3><p class='note'>the answers: {answers_html}</p>"
        + table(("next token", "probability", "", "logit"), rows, ("next token", ""))
        + "</div>"
    )


def _ranking(ds: xr.Dataset, metric: str, pair: int) -> str:
    tokens = _tokens(ds, "base", pair)
    rows = [
        f"<tr><th>{rank + 1}</th><td>a{head.layer}.h{head.head}</td>"
        f"{_signed(head.attribution)}{_signed(head.exact)}{numbers(number(head.size))}"
        f"<td>{_place(head, tokens)}</td>{_signed(head.cell)}"
        f"{numbers(f'{number(head.base)} → {number(head.source)}')}</tr>"
        for rank, head in enumerate(ranked_heads(ds, metric, pair))
    ]
    unit = str(ds["metric_unit"].values[list(ds["metric"].values).index(metric)])
    texts = ("", "head", "largest cell of this pair")
    ends = ("its attribution", "probability, base → source")
    measured = (f"attribution, {unit}", f"exact, {unit}", "sum of |cells|")
    return table((*texts[:2], *measured, texts[2], *ends), rows, texts)


def _place(head: RankedHead, tokens: list[str]) -> str:
    return (
        f"{token_html(tokens[head.dest])} <small>{head.dest}</small> looks at "
        f"{token_html(tokens[head.src])} <small>{head.src}</small>"
    )


def _signed(value: float) -> str:
    return numbers(number(value, sign=True), kind="up" if value > 0 else "down")


def _cards(ds: xr.Dataset) -> str:
    cards = []
    for rank in range(ds.sizes["rank"]):
        name = f"a{int(ds['rank_layer'][rank])}.h{int(ds['rank_head'][rank])}"
        maps = "".join(
            f'<figure><figcaption data-caption="{kind}"></figcaption><div class="map">'
            f'<canvas data-map="{kind}" role="img" aria-label="{name}, {words}"></canvas>'
            "</div></figure>"
            for kind, words in (
                ("base", "pattern of the base run"),
                ("source", "pattern of the source run"),
                ("attribution", "attribution of each cell"),
            )
        )
        cards.append(
            f'<article class="head" data-rank="{rank}"><h3>{name}<small></small>'
            f'<button type="button" aria-pressed="false">enlarge</button></h3>'
            f'<div class="maps">{maps}</div></article>'
        )
    return (
        f'<div class="heads">{"".join(cards)}</div><div class="tip" hidden></div>'
        "<noscript><p>The maps are drawn by a script inside this page.</p></noscript>"
    )


def _tokens(ds: xr.Dataset, run: str, pair: int) -> list[str]:
    tokens = [str(token) for token in ds["token"].sel(run=run).isel(pair=pair).values]
    return tokens[: _length(ds, pair)]


def _length(ds: xr.Dataset, pair: int) -> int:
    """Return the number of tokens of the pair's prompts, from the last query with a pattern."""
    pattern = ds["pattern"].isel(run=0, pair=pair, rank=0, src=0).values
    return int(np.flatnonzero(~np.isnan(pattern))[-1]) + 1


def _n_shown(ds: xr.Dataset) -> int:
    n = ds.sizes["dest"]
    size = 2 * (2 + ds.sizes["metric"]) * ds.sizes["rank"] * n * (n + 1) // 2
    return max(1, min(ds.sizes["pair"], N_PAIRS, MAP_BYTES // size))


def _data(ds: xr.Dataset, n_shown: int) -> dict[str, Any]:
    """Return the input of attention.js: maps of the lower triangle as 16-bit numbers."""
    units = zip(ds["metric"].values, ds["metric_unit"].values, strict=True)
    return {
        "colours": {
            "pattern": [colour for _, colour in BLUES],
            "attribution": [colour for _, colour in RED_BLUE],
        },
        "metrics": [{"name": str(name), "unit": str(unit)} for name, unit in units],
        "pairs": [_pair_data(ds.isel(pair=pair), _length(ds, pair)) for pair in range(n_shown)],
    }


def _pair_data(one: xr.Dataset, n: int) -> dict[str, Any]:
    rows, columns = np.tril_indices(n)
    prompt = {"dest": slice(n), "src": slice(n)}
    pattern = one["pattern"].isel(prompt).transpose("run", "rank", "dest", "src").values
    cells = one["attribution"].isel(prompt).transpose("metric", "rank", "dest", "src").values
    limit = np.abs(cells).max(axis=(-2, -1))
    scaled = cells / np.where(limit > 0, limit, 1)[..., None, None]
    norm = one["value_norm"].isel(src=slice(n)).transpose("run", "rank", "src").values
    return {
        "n": n,
        "tokens": [
            [visible(str(token)) for token in one["token"].sel(run=run).values[:n]]
            for run in ("base", "source")
        ],
        # [run, rank, cell] in 0..1 and [metric, rank, cell] in -1..1 of `limit`
        "pattern": pack(np.rint(pattern[..., rows, columns] * 65535), "<u2"),
        "attribution": pack(np.rint(scaled[..., rows, columns] * 32767), "<i2"),
        "limit": [[float(f"{x:.6g}") for x in row] for row in limit],
        "total": [[float(f"{x:.6g}") for x in row] for row in cells.sum(axis=(-2, -1))],
        "exact": [[float(f"{x:.6g}") for x in row] for row in one["exact"].values],
        "norm": [[[float(f"{x:.4g}") for x in row] for row in run] for run in norm],
    }
