"""The report's tables: largest effects, noise, bf16 error, cost and provenance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, plural, token_html
from patchsweep.report.html import numbers, table, table_of_bodies
from patchsweep.report.views import View
from patchsweep.results import accessor as summary
from patchsweep.results.rounding import NOISE, bf16_error, noise_of
from patchsweep.store import journal
from patchsweep.store.attributes import attributes
from patchsweep.store.difference import DIGEST, IDENTITY

N_LARGEST = 8  # rows per site in the table of largest effects

# ends of the interval of a mean effect, p, and the number of pairs that ran
_Spread = tuple[float, float, float, int]
_NO_SPREAD: _Spread = (np.nan, np.nan, np.nan, 0)
_PLAN = ("n_patches", "n_live", "n_dead", "token_layers", "loop_token_layers")


def seconds_of(store: str) -> dict[str, float]:
    """Return the time of each site in the journal beside a store; empty if there is none."""
    seconds: dict[str, float] = {}
    for event in journal.read_journal(store):
        if event["event"] == journal.UNIT:
            site = event["variable"]
            seconds[site] = seconds.get(site, 0.0) + event["seconds"]
    return seconds


def largest_table(ds: xr.Dataset, names: tuple[str, ...], metric: str, view: View) -> str:
    """Return an HTML table of the largest effects, grouped by site of `names`."""
    n_pairs = ds.sizes["pair"]
    spread = view.pair is None and n_pairs > 1
    effects = {site: summary.largest(ds, site, metric, N_LARGEST, pair=view.pair) for site in names}
    listed = [e for of_site in effects.values() for e in of_site]
    if not listed:
        below = any(site + NOISE in ds for site in names) * " by more than the noise floor"
        return f'<p class="empty">No patch that has run changes this metric{below}.</p>'

    def some(field: str) -> bool:
        return any(getattr(e, field) is not None for e in listed)

    signed = partial(number, sign=True)
    # whether it is needed, its name, and the cell of an effect with its spread over pairs
    columns: list[tuple[bool, str, Callable[[summary.Effect, _Spread], str]]] = [
        (True, "layer", lambda e, x: _cell(e.layer)),
        (some("pos"), "position", lambda e, x: _cell(e.pos)),
        (some("pos"), "token", lambda e, x: f"<td>{token_html(e.token) if e.token else ''}</td>"),
        (some("head"), "head", lambda e, x: _cell(e.head)),
        (True, "value", lambda e, x: _number(e.value)),
        (True, "effect", lambda e, x: numbers(signed(e.effect), kind=_side(e))),
        (some("noise"), "noise floor", lambda e, x: _number(e.noise)),
        (some("error"), "stated error", lambda e, x: _number(e.error)),
        (True, "recovered", lambda e, x: _number(e.recovered)),
        (spread, "95 % interval", lambda e, x: numbers(f"{signed(x[0])} … {signed(x[1])}")),
        (spread, "p", lambda e, x: _number(x[2])),
        (spread, "q", lambda e, x: _number(e.q)),
        (spread, "pairs", lambda e, x: _cell(x[3])),
    ]
    needed = [(name, cell) for is_needed, name, cell in columns if is_needed]
    bodies = []
    for site, of_site in effects.items():
        spreads = _spread(ds, site, metric, of_site) if spread else [_NO_SPREAD] * len(of_site)
        rows = [
            "".join(cell(e, x) for _, cell in needed) for e, x in zip(of_site, spreads, strict=True)
        ]
        first = f'<th scope="rowgroup" rowspan="{len(rows)}">{esc(site)}</th>'
        inner = "</tr><tr>".join(rows)
        bodies.append(f"<tbody>{f'<tr>{first}{inner}</tr>' if rows else ''}</tbody>")
    heads = ["site", *(name for name, _ in needed)]
    return table_of_bodies(heads, bodies, ("site", "token")) + _explain(spread, n_pairs)


def cost_table(ds: xr.Dataset, seconds: Mapping[str, float]) -> str:
    """Return an HTML table of patches, token-layers and time per site, and those of a loop."""
    plan = attributes(ds).get("plan")
    if not isinstance(plan, Mapping) or not plan:
        return '<p class="empty">The store does not say what the run planned.</p>'
    rows, total = [], sum(seconds.values()) if seconds else None
    for site, entry in plan.items():
        counts = {key: float(entry.get(key, 0)) for key in _PLAN}
        rows.append(_cost_row(esc(site), counts, seconds.get(site) if seconds else None))
    if len(rows) > 1:
        rows.append(_cost_row("all", totals(ds), total, "total"))
    columns = ["site", "patches", "live", "dead", "token-layers", "a loop needs", "ratio"]
    return table([*columns, *(["seconds"] if seconds else [])], rows, ("site",))


def bf16_table(ds: xr.Dataset) -> str:
    """Return an HTML table of a bf16 sweep's measured error; "" for other sweeps."""
    rows = [
        f'<tr><th scope="row">{esc(e.site)}</th>'
        + numbers(e.n_again, *map(number, (e.median, e.quantile_99, e.worst, e.spearman, e.noise)))
        + "</tr>"
        for e in bf16_error(ds)
    ]
    if not rows:
        return ""
    columns = ("site", "run again in fp32", "median error", "99 %", "worst", "rank agreement")
    return (
        "<p>Matrix products ran in bf16. The largest effects and a random sample were run again in "
        "fp32; their values are the fp32 ones. Effects below the noise floor are rounding.</p>"
        + table((*columns, "noise floor"), rows, ("site",))
    )


def noise_table(ds: xr.Dataset) -> str:
    """Return an HTML table of the noise floor per site and metric; "" for runs in fp32."""
    rows = [
        f'<tr><th scope="row">{esc(n.site)}</th><td>{esc(n.metric)}</td>'
        f"{numbers(number(n.floor), count(n.n_above), count(n.n_cells))}</tr>"
        for n in noise_of(ds)
    ]
    if not rows:
        return ""
    texts = ("site", "metric")
    return (
        "<p>This run was not computed in fp32, so rounding moves the metric whatever is patched. "
        "The noise floor was measured in the run, by patches that change the last bit of a value "
        "alone: effects below it are rounding. Tables and lists stop there; maps show every cell. "
        "Where there are several pairs, the largest floor is given.</p>"
        + table((*texts, "noise floor", "effects above", "of"), rows, texts)
    )


def totals(ds: xr.Dataset) -> dict[str, float]:
    """Return the plan's counts summed over sites; empty if the store has no plan."""
    plan = attributes(ds).get("plan")
    if not isinstance(plan, Mapping):
        return {}
    return {key: sum(float(entry.get(key, 0)) for entry in plan.values()) for key in _PLAN}


def provenance_table(ds: xr.Dataset) -> str:
    """Return an HTML table of the run's provenance; nested parts are JSON behind a fold."""
    known = attributes(ds).get("provenance")
    parts: dict[str, object] = {"patchsweep": ds.attrs.get("patchsweep_version", "unknown")}
    parts |= known if isinstance(known, Mapping) else {}
    identity = attributes(ds).get(IDENTITY)
    parts["identity"] = identity.get(DIGEST) if isinstance(identity, Mapping) else None
    rows = []
    for key, value in parts.items():
        if value is None or value == "":
            continue
        if isinstance(value, Mapping) and all(isinstance(v, str) for v in value.values()):
            shown = "<br>".join(f"{esc(k)} {esc(v)}" for k, v in value.items())
        elif isinstance(value, Mapping | list):
            text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
            shown = f"<details><summary>show</summary><pre>{esc(text)}</pre></details>"
        else:
            shown = f"<span>{esc(value)}</span>"
        rows.append(f'<tr><th scope="row">{esc(key.replace("_", " "))}</th><td>{shown}</td></tr>')
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def _spread(ds: xr.Dataset, site: str, metric: str, found: list[summary.Effect]) -> list[_Spread]:
    """Return the spread of each effect over pairs."""
    if not found:
        return []
    effects = summary.effect(ds, site).sel(metric=metric)
    unit = summary.unit_dim(effects)
    columns = []
    for e in found:
        at = {"layer": e.layer, "pos": e.pos} | ({unit: e.head} if unit else {})
        cell = effects.sel({k: v for k, v in at.items() if v is not None})
        columns.append(cell.values.astype(np.float64))
    stacked = np.stack(columns, axis=1)
    ran = np.isfinite(stacked).sum(axis=0)
    numbers_of_all = (*summary.bootstrap(stacked), summary.sign_flip(stacked), ran)
    return [
        (float(a), float(b), float(c), int(n)) for a, b, c, n in zip(*numbers_of_all, strict=True)
    ]


def _explain(spread: bool, n_pairs: int) -> str:
    text = f"The {N_LARGEST} largest effects of each site by absolute size"
    if not spread:
        return f'<p class="caption">{text}.</p>'
    text += (
        f", averaged over {plural(n_pairs, 'pair')}; recovered is the sum of effects over the sum "
        "of gaps. Interval: bootstrap of the mean effect over pairs. p: sign-flip test that the "
        "mean is zero, not corrected for having picked the largest cells. q: the same, adjusted "
        "for all cells of the site (Benjamini and Hochberg): of the cells with at most this q, "
        "that share is false on average"
    )
    if n_pairs < 10:
        text += f". With {plural(n_pairs, 'pair')}, read both as rough"
    return f'<p class="caption">{text}.</p>'


def _cell(value: int | str | None) -> str:
    return numbers("" if value is None else esc(value))


def _number(value: float | None) -> str:
    return numbers("" if value is None else number(value))


def _side(e: summary.Effect) -> str:
    """Return the class of the colour that the cell has in its map."""
    return "down" if (e.recovered if np.isfinite(e.recovered) else e.effect) < 0 else "up"


def _cost_row(name: str, counts: Mapping[str, float], seconds: float | None, kind: str = "") -> str:
    ratio = counts["loop_token_layers"] / counts["token_layers"] if counts["token_layers"] else 0
    cells = [count(counts[key]) for key in _PLAN]
    cells.append(f"{ratio:,.1f} &times;" if ratio else "\u2013")
    if seconds is not None:
        cells.append(f"{seconds:,.2f}")
    return f'<tr class="{kind}"><th scope="row">{name}</th>{numbers(*cells)}</tr>'
