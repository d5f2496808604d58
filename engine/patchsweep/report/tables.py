"""The report's tables: largest effects, noise, bf16 error, cost and provenance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from patchsweep.report.html import count, esc, number, plural, token_html
from patchsweep.report.views import View
from patchsweep.results import accessor as summary
from patchsweep.results.rounding import NOISE, bf16_error, noise_of
from patchsweep.store import journal
from patchsweep.store.attributes import attributes
from patchsweep.store.difference import DIGEST, IDENTITY

N_LARGEST = 8
"""Rows per site in the table of largest effects."""

_PLAN = ("n_patches", "n_live", "n_dead", "token_layers", "loop_token_layers")


@dataclass(frozen=True)
class Journal:
    """Times from a run's journal."""

    seconds: Mapping[str, float] = field(default_factory=dict)  # per site

    @property
    def total(self) -> float:
        """Seconds of all units, summed over processes."""
        return sum(self.seconds.values())


def read_journal(store: str) -> Journal:
    """Return the times in the journal beside a store; empty if there is none."""
    seconds: dict[str, float] = {}
    for event in journal.read_journal(store):
        if event["event"] == journal.UNIT:
            site = event["variable"]
            seconds[site] = seconds.get(site, 0.0) + event["seconds"]
    return Journal(seconds)


def largest_table(ds: xr.Dataset, names: tuple[str, ...], metric: str, view: View) -> str:
    """Return an HTML table of the largest effects, grouped by site of `names`."""
    n_pairs = ds.sizes["pair"]
    spread = view.pair is None and n_pairs > 1
    groups = []
    heads = positions = noisy = stated = False
    for site in names:
        effects = summary.largest(ds, site, metric, N_LARGEST, pair=view.pair)
        heads |= any(e.head is not None for e in effects)
        positions |= any(e.pos is not None for e in effects)
        noisy |= any(e.noise is not None for e in effects)
        stated |= any(e.error is not None for e in effects)
        groups.append((site, effects, _spread(ds, site, metric, effects) if spread else []))
    if not any(effects for _, effects, _ in groups):
        below = any(site + NOISE in ds for site in names) * " by more than the noise floor"
        return f'<p class="empty">No patch that has run changes this metric{below}.</p>'
    columns = [("site", ""), ("layer", "n")]
    columns += [("position", "n"), ("token", "")] if positions else []
    columns += [("head", "n")] if heads else []
    columns += [("value", "n"), ("effect", "n")]
    columns += [("noise floor", "n")] if noisy else []
    columns += [("stated error", "n")] if stated else []
    columns += [("recovered", "n")]
    columns += [("95 % interval", "n"), ("p", "n"), ("q", "n"), ("pairs", "n")] if spread else []
    top = "".join(f'<th scope="col" class="{kind}">{name}</th>' for name, kind in columns)
    bodies = []
    for site, effects, extra in groups:
        rows = []
        for index, e in enumerate(effects):
            first = (
                f'<th scope="rowgroup" rowspan="{len(effects)}">{esc(site)}</th>'
                if not index
                else ""
            )
            cells = [_cell(e.layer)]
            if positions:
                cells += [_cell(e.pos), f"<td>{token_html(e.token) if e.token else ''}</td>"]
            if heads:
                cells.append(_cell(e.head))
            cells += [
                f'<td class="n">{number(e.value)}</td>',
                f'<td class="n {_side(e)}">{number(e.effect, sign=True)}</td>',
            ]
            if noisy:
                cells.append(f'<td class="n">{"" if e.noise is None else number(e.noise)}</td>')
            if stated:
                cells.append(f'<td class="n">{"" if e.error is None else number(e.error)}</td>')
            cells.append(f'<td class="n">{number(e.recovered)}</td>')
            if spread:
                low, high, p, ran = extra[index]
                cells += [
                    f'<td class="n">{number(low, sign=True)} … {number(high, sign=True)}</td>',
                    f'<td class="n">{number(p)}</td>',
                    f'<td class="n">{"" if e.q is None else number(e.q)}</td>',
                    f'<td class="n">{ran}</td>',
                ]
            rows.append(f"<tr>{first}{''.join(cells)}</tr>")
        bodies.append(f"<tbody>{''.join(rows)}</tbody>")
    table = f"<table><thead><tr>{top}</tr></thead>{''.join(bodies)}</table>"
    return f'<div class="scroll">{table}</div>{_explain(spread, n_pairs)}'


def cost_table(ds: xr.Dataset, journal: Journal) -> str:
    """Return an HTML table of patches and token-layers per site, and those of a hook loop."""
    plan = attributes(ds).get("plan")
    if not isinstance(plan, Mapping) or not plan:
        return '<p class="empty">The store does not say what the run planned.</p>'
    timed = bool(journal.seconds)
    rows = []
    total = dict.fromkeys(_PLAN, 0.0)
    for site, entry in plan.items():
        numbers = {key: float(entry.get(key, 0)) for key in _PLAN}
        total = {key: total[key] + numbers[key] for key in _PLAN}
        rows.append(_cost_row(esc(site), numbers, journal.seconds.get(site) if timed else None))
    if len(rows) > 1:
        rows.append(_cost_row("all", total, journal.total if timed else None, "total"))
    heads = ["patches", "live", "dead", "token-layers", "a loop needs", "ratio"]
    heads += ["seconds"] if timed else []
    top = "".join(f'<th scope="col" class="n">{h}</th>' for h in heads)
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">site</th>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def bf16_table(ds: xr.Dataset) -> str:
    """Return an HTML table of a bf16 sweep's measured error; "" for other sweeps."""
    rows = [
        f'<tr><th scope="row">{esc(e.site)}</th><td class="n">{e.n_again}</td>'
        f'<td class="n">{number(e.median)}</td><td class="n">{number(e.quantile_99)}</td>'
        f'<td class="n">{number(e.worst)}</td><td class="n">{number(e.spearman)}</td>'
        f'<td class="n">{number(e.noise)}</td></tr>'
        for e in bf16_error(ds)
    ]
    if not rows:
        return ""
    heads = ["run again in fp32", "median error", "99 %", "worst", "rank agreement", "noise floor"]
    top = "".join(f'<th scope="col" class="n">{h}</th>' for h in heads)
    return (
        "<p>Matrix products ran in bf16. The largest effects and a random sample were run again in "
        "fp32; their values are the fp32 ones. Effects below the noise floor are rounding.</p>"
        f'<div class="scroll"><table><thead><tr><th scope="col">site</th>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def noise_table(ds: xr.Dataset) -> str:
    """Return an HTML table of the noise floor per site and metric; "" for runs in fp32."""
    rows = [
        f'<tr><th scope="row">{esc(n.site)}</th><td>{esc(n.metric)}</td>'
        f'<td class="n">{number(n.floor)}</td><td class="n">{count(n.n_above)}</td>'
        f'<td class="n">{count(n.n_cells)}</td></tr>'
        for n in noise_of(ds)
    ]
    if not rows:
        return ""
    heads = ["noise floor", "effects above", "of"]
    top = "".join(f'<th scope="col" class="n">{h}</th>' for h in heads)
    return (
        "<p>This run was not computed in fp32, so rounding moves the metric whatever is patched. "
        "The noise floor was measured in the run, by patches that change the last bit of a value "
        "alone: effects below it are rounding. Tables and lists stop there; maps show every cell. "
        "Where there are several pairs, the largest floor is given.</p>"
        '<div class="scroll"><table><thead><tr><th scope="col">site</th>'
        f'<th scope="col">metric</th>{top}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
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


def _spread(
    ds: xr.Dataset, site: str, metric: str, found: list[summary.Effect]
) -> list[tuple[float, float, float, int]]:
    """Return (low, high, p, number of pairs that ran) of each effect, over pairs."""
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
    low, high = summary.bootstrap(stacked)
    p = summary.sign_flip(stacked)
    ran = np.isfinite(stacked).sum(axis=0)
    return [
        (float(a), float(b), float(c), int(n)) for a, b, c, n in zip(low, high, p, ran, strict=True)
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
    return f'<td class="n">{"" if value is None else esc(value)}</td>'


def _side(e: summary.Effect) -> str:
    """Return the class of the colour that the cell has in its map."""
    return "down" if (e.recovered if np.isfinite(e.recovered) else e.effect) < 0 else "up"


def _cost_row(
    name: str, numbers: Mapping[str, float], seconds: float | None, kind: str = ""
) -> str:
    ratio = numbers["loop_token_layers"] / numbers["token_layers"] if numbers["token_layers"] else 0
    cells = [count(numbers[key]) for key in _PLAN]
    cells.append(f"{ratio:,.1f} &times;" if ratio else "\u2013")
    if seconds is not None:
        cells.append(f"{seconds:,.2f}")
    inner = "".join(f'<td class="n">{c}</td>' for c in cells)
    return f'<tr class="{kind}"><th scope="row">{name}</th>{inner}</tr>'
