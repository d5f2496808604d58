"""The page of a lens: the grid of predictions, curves of the answer, effects of sublayers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from patchsweep.analyses.logit_lens import findings as lens_findings
from patchsweep.analyses.logit_lens.findings import Place, Removal
from patchsweep.data.show import esc, number, plural, rank, token_html, visible
from patchsweep.report.figure import SERIES, figure, figure_scripts, plain
from patchsweep.report.html import choice, fact_list, numbers, table, word_list
from patchsweep.report.question import behind_means
from patchsweep.report.shell import page, resource, section
from patchsweep.report.tables import provenance_table
from patchsweep.store.attributes import attributes

MAX_PAIRS = 12  # pairs of which the page holds the grid; the mean of the rest would say no words
N_REMOVALS = 12
_GRID_NUMBERS = ("top_prob", "answer_prob", "answer_rank", "wrong_prob", "wrong_rank")


def build(ds: xr.Dataset) -> str:
    """Return the page of `ds`, the Dataset of `lens`, of `sublayers`, or of both merged."""
    grid = "top_token" in ds
    sections = [
        _header(ds),
        _grid_section(ds) if grid else "",
        _curves(ds) if grid else "",
        _sublayers(ds) if "without" in ds else "",
        section("provenance", "Where the numbers come from", provenance_table(ds)),
        section("words", "Words", word_list(_WORDS)),
    ]
    return page(
        f"The lens on {_model(ds)}",
        sections,
        data=_data(ds) if grid else None,
        scripts=[
            *figure_scripts(),
            *([resource("numbers.js") + resource("lens.js")] if grid else []),
        ],
        style=resource("lens.css"),
    )


def _header(ds: xr.Dataset) -> str:
    name = f'<span class="name">{esc(_model(ds))}</span>'
    prompt = esc(ds.attrs.get("prompt", ""))
    if "top_token" not in ds:
        return (
            f"<header><h1>Which sublayer of {name} brings the answer in?</h1>"
            f'<p class="lead">The {prompt} prompt, with each sublayer removed in turn, over '
            f"{plural(ds.sizes['pair'], 'pair')}.</p></header>"
        )
    done = _done(ds)
    also = f" Beside it the same run <b>patched</b>: {done}." if done else ""
    return (
        f"<header><h1>What would {name} say if it stopped here?</h1>"
        '<p class="lead">The lens takes the residual stream at every layer and position and reads '
        f"it as if it were the last: through the model's own final norm and unembedding. The run "
        f"reads the {prompt} prompt of {plural(ds.sizes['pair'], 'pair')}.{also}</p>"
        f"{_facts(ds)}</header>"
    )


def _done(ds: xr.Dataset) -> str:
    """Return HTML text that describes the patches."""
    descriptions = []
    for patch in attributes(ds).get("patches", []):
        layers, heads = _listed(patch.get("layer")), _listed(patch.get("head"))
        pos = patch.get("pos", "all")
        words = f"<code>{esc(patch['site'])}</code>"
        words += f" of layer {esc(layers)}" if layers else ""
        words += f", head {esc(heads)}," if heads else ""
        where = "every position" if pos == "all" else f"{esc(pos)}"
        where = f"position {where}" if isinstance(pos, int) else where
        words += f" at {where} ({esc(patch.get('intervention', ''))})"
        means = behind_means(patch.get("means")).removesuffix(".")
        descriptions.append(f"{words}.{means}" if means else words)
    return "; ".join(descriptions)


def _listed(value: Any) -> str:
    if value is None:
        return ""
    return " and ".join(map(str, value)) if isinstance(value, Sequence) else str(value)


def _facts(ds: xr.Dataset) -> str:
    """Return HTML of the answer's final probability and rank, of one pair or as means."""
    pairs, runs = _pairs(ds), _runs(ds)
    facts = []
    if len(pairs) == 1:
        facts.append(("answer", token_html(str(ds["answer"].values[0]))))
    for run in runs:
        ends = [lens_findings.at_answer(ds, "answer_prob", run, pair)[-1] for pair in pairs]
        up = [lens_findings.comes_up(ds, run, pair) for pair in pairs]
        words = f", {run}" if len(runs) > 1 else ""
        mean = "mean " if len(pairs) > 1 else ""
        facts.append((f"{mean}probability at the end{words}", number(float(np.mean(ends)))))
        if len(pairs) == 1:
            where = up[0].words if up[0] else "never"
            facts.append((f"first guess from{words}", esc(where)))
        else:
            n_first = sum(place is not None for place in up)
            facts.append((f"first guess at the end{words}", f"{n_first} of {len(pairs)}"))
    return fact_list(facts)


def _grid_section(ds: xr.Dataset) -> str:
    runs, pairs = _runs(ds), _pairs(ds)
    shown = pairs[:MAX_PAIRS]
    texts = [visible(str(ds["answer"].sel(pair=pair).item()))[:20] for pair in shown]
    answers = [(i, f"{shown[i]}: {text}") for i, text in enumerate(texts)]
    parts = [
        choice("pair", "Pair", answers),
        choice("run", "Run", list(enumerate(runs)) + ([("change", "change")] if runs[1:] else [])),
        choice("rows", "Rows", [("blocks", "after each block"), ("all", "after attention too")]),
        choice(
            "colour",
            "Colour",
            [
                ("top", "probability of the first guess"),
                ("answer", "probability of the answer"),
                ("rank", "rank of the answer"),
            ],
        ),
    ]
    rest = len(pairs) - len(shown)
    more = f"<span>{plural(len(pairs), 'pair')} in the store; here the first {len(shown)}.</span>"
    change_note = (
        " In <i>change</i> the words are those of the patched run, and colours say how far the "
        'patch moved the answer among all tokens: <b class="blue">blue</b> up, '
        '<b class="red">red</b> down; the full colour is a hundredfold.'
        if runs[1:]
        else ""
    )
    how = (
        "<p>Each cell is the token that the model would predict after the tokens up to there, if "
        "the stream at that layer were the last. Read a column upwards: how the guess forms. "
        "The darker a cell, the more probable the guess, or the higher what <i>Colour</i> names. "
        "Point at a cell, or tap it, for the best tokens and where the answers stand. "
        '<span class="key right">the answer</span> <span class="key wrong">the wrong answer</span>'
        f"{change_note}</p>"
    )
    nav = f'<nav class="controls" aria-label="What is shown">{"".join(parts)}'
    nav += f"{more if rest else ''}</nav>"
    grid = '<div class="scroll lens" id="grid" tabindex="0" aria-label="Grid of predictions"></div>'
    return section("grid-section", "Layer by layer, word by word", f"{how}{nav}{grid}") + (
        '<div id="told" role="status" hidden></div>'
    )


def _curves(ds: xr.Dataset) -> str:
    """Return figures of both answers by depth at the answer's position; a script sets the pair."""
    traces = _curve_traces(ds, _pairs(ds)[0])
    axis = {"title": {"text": "blocks passed", "standoff": 6}}
    probability = figure(
        "curve-prob",
        traces["prob"],
        {"xaxis": axis, "yaxis": {"title": {"text": "probability"}, "rangemode": "tozero"}},
        title="Probability of the answers",
        wide=False,
    )
    rank = figure(
        "curve-rank",
        traces["rank"],
        {
            "xaxis": axis,
            "yaxis": {"title": {"text": "place among all tokens"}, "type": "log"}
            | {"autorange": "reversed", "dtick": 1},
        },
        title="Place of the answers among all tokens",
        wide=False,
    )
    how = (
        "<p>The answers at the position after which they are expected, from the embedding (0) "
        "through every attention and MLP. Place 1 is the first guess. A rise between two whole "
        "numbers of blocks is attention's, one up to a whole number the MLP's. The pair is the "
        "one chosen above.</p>"
    )
    return section(
        "curves", "How the answer rises", f'{how}<div class="grid">{probability}{rank}</div>'
    )


def _curve_traces(ds: xr.Dataset, pair: int) -> dict[str, list[dict[str, Any]]]:
    places = lens_findings.places(ds)
    traces: dict[str, list[dict[str, Any]]] = {"prob": [], "rank": []}
    runs = _runs(ds)
    for run in runs:
        for i, kind in enumerate(("answer", "wrong")):
            answer = ds["answer" if kind == "answer" else "wrong_answer"].sel(pair=pair)
            token = plain(visible(str(answer.item())))
            name = f"{token}, {run}" if len(runs) > 1 else token
            common = {
                "type": "scatter",
                "mode": "lines",
                "name": name,
                "x": [place.depth for place in places],
                "line": {"color": SERIES[i], "dash": "solid" if run == runs[-1] else "dot"},
                "hovertext": [f"{name}<br>after {place.words}" for place in places],
                "hovertemplate": "%{hovertext}<br>%{y:.3~g}<extra></extra>",
            }
            prob = lens_findings.at_answer(ds, f"{kind}_prob", run, pair)
            rank = lens_findings.at_answer(ds, f"{kind}_rank", run, pair)
            traces["prob"].append({**common, "y": prob})
            traces["rank"].append({**common, "y": rank + 1})
    return traces


def _sublayers(ds: xr.Dataset) -> str:
    removals = lens_findings.removals(ds)
    unpatched = ds["whole"].mean("pair")
    n_pairs = ds.sizes["pair"]
    over = f", mean of {plural(n_pairs, 'pair')}" if n_pairs > 1 else ""
    traces = [
        _bars([r for r in removals if r.sublayer == kind], name, SERIES[i])
        for i, (kind, name) in enumerate((("attn", "attention"), ("mlp", "MLP")))
    ]
    most = ", ".join(f"{esc(r.words)} (to {number(r.values['prob'])})" for r in removals[:3])
    caption = (
        f"<strong>From probability {number(float(unpatched.sel(metric='prob')))}{over}, the answer "
        f"falls most without the {most}.</strong> Bars down: the sublayer helps the answer. Bars "
        "up: the model would give it more without it."
    )
    bars = figure(
        "removals",
        traces,
        {
            "barmode": "group",
            "bargap": 0.2,
            "xaxis": {"title": {"text": "layer", "standoff": 6}, "showgrid": False},
            "yaxis": {
                "title": {"text": "change of log-probability (nats)"},
                "zeroline": True,
                "zerolinecolor": "#545d66",
            },
        },
        title="What the answer loses without each sublayer",
        caption=caption,
    )
    how = (
        "<p>Each sublayer's write is set to zero at every position, one sublayer at a time, and "
        "the rest of the run goes on. What is gone then is the write and whatever later layers "
        "made of it; the first layers, whose writes everything reads, break most of what follows "
        "and say little about this answer. Compare the change of the logit difference: a sublayer "
        "that lifts both answers alike does not choose between them.</p>"
    )
    return section(
        "sublayers",
        "Which sublayer brings the answer in?",
        how + bars + _table(removals, unpatched),
    )


def _bars(removals: Sequence[Removal], name: str, colour: str) -> dict[str, Any]:
    rows = sorted(removals, key=lambda r: r.layer)
    return {
        "type": "bar",
        "name": name,
        "x": [r.layer for r in rows],
        "y": [r.changes["log_prob"] for r in rows],
        "marker": {"color": colour},
        "hovertext": [
            f"without {r.words}<br>probability {number(r.values['prob'])}, "
            f"rank {rank(r.values['rank'])}"
            f"<br>log-probability {number(r.changes['log_prob'], sign=True)}"
            f"<br>logit difference {number(r.changes['logit_diff'], sign=True)}"
            for r in rows
        ],
        "hoverinfo": "text",
    }


def _table(found: Sequence[Removal], whole: xr.DataArray) -> str:
    columns = ("probability", "rank", "change of log-probability", "change of logit difference")
    prob, mean_rank = (float(whole.sel(metric=name)) for name in ("prob", "rank"))
    rows = [
        '<tr class="total"><th scope="row">nothing removed</th>'
        f"{numbers(number(prob), rank(mean_rank))}<td></td><td></td></tr>"
    ]
    for r in found[:N_REMOVALS]:
        cells = "".join(
            numbers(number(change, sign=True), kind="down" if change < 0 else "up")
            for change in (r.changes["log_prob"], r.changes["logit_diff"])
        )
        rows.append(
            f'<tr><th scope="row">{esc(r.words)}</th>'
            f"{numbers(number(r.values['prob']), rank(r.values['rank']))}{cells}</tr>"
        )
    return (
        table(("without", *columns), rows, ("without",))
        + f'<p class="caption">The {min(N_REMOVALS, len(found))} sublayers without which the '
        "answer loses the most log-probability.</p>"
    )


def _data(ds: xr.Dataset) -> dict[str, Any]:
    """Return the input of lens.js: distinct words, and the grid's numbers per pair and run."""
    places = lens_findings.places(ds)
    words: dict[str, int] = {}
    shown = _pairs(ds)[:MAX_PAIRS]
    return {
        "rows": [
            {"name": _row_name(place), "words": place.words, "block": place.point != "resid_mid"}
            for place in places
        ],
        "pairs": [
            {
                "tokens": [visible(str(t)) for t in ds["token"].sel(pair=pair).values if str(t)],
                "answer": visible(str(ds["answer"].sel(pair=pair).item())),
                "wrong": visible(str(ds["wrong_answer"].sel(pair=pair).item())),
                "at": int(ds["answer_pos"].sel(pair=pair)),
                "runs": [_run_data(ds, run, pair, places, words) for run in _runs(ds)],
                "curves": {
                    key: [
                        {"y": _digits(t["y"]), "name": t["name"], "hovertext": t["hovertext"]}
                        for t in traces
                    ]
                    for key, traces in _curve_traces(ds, pair).items()
                },
            }
            for pair in shown
        ],
        "words": list(words),
    }


def _run_data(
    ds: xr.Dataset, run: str, pair: int, every: Sequence[Place], words: dict[str, int]
) -> dict[str, Any]:
    n_pos = sum(1 for t in ds["token"].sel(pair=pair).values if str(t))
    one = ds.sel(run=run, pair=pair).isel(pos=slice(n_pos))

    def stacked(name: str) -> np.ndarray:
        return np.stack([one[name].sel(layer=p.layer, point=p.point).values for p in every])

    top = stacked("top_token")
    return {
        "top": [
            [[words.setdefault(visible(str(t)), len(words)) for t in cell] for cell in row]
            for row in top
        ],
        **{name: _digits(stacked(name)) for name in _GRID_NUMBERS},
    }


def _digits(values: np.ndarray) -> Any:
    """Return nested lists of `values` with three digits, as the page shows; NaN is null."""
    if values.ndim > 1:
        return [_digits(part) for part in values]
    return [float(f"{x:.3g}") if np.isfinite(x) else None for x in values.tolist()]


def _row_name(place: Place) -> str:
    if place.point == "resid_pre":
        return "embedding"
    return f"{place.layer} attn" if place.point == "resid_mid" else f"{place.layer}"


def _pairs(ds: xr.Dataset) -> list[int]:
    return [int(pair) for pair in ds["pair"].values]


def _runs(ds: xr.Dataset) -> list[str]:
    return [str(run) for run in ds["run"].values]


def _model(ds: xr.Dataset) -> str:
    provenance = attributes(ds).get("provenance")
    known = provenance.get("model") if isinstance(provenance, Mapping) else None
    return str(known or "the model")


_WORDS = {
    "residual stream": "The sum that every block reads and adds to; one vector for each position.",
    "lens": "Reading that sum before the end as if it were the end (nostalgebraist's logit lens). "
    "Early layers speak a basis of their own, so their words are often noise.",
    "rank": "How many tokens the model holds more probable; 0 is the first guess.",
    "answer, wrong answer": "The right continuation of the clean prompt, and of the corrupted "
    "one. Of answers of several tokens the grid reads the first that tells the two answers apart, "
    "after those that they share.",
    "sublayer": "The attention or the MLP of one layer: what writes into the stream.",
}
