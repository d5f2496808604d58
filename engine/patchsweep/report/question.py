"""Texts that describe a run: the patched run, the patch values, the prompts and the metrics."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import xarray as xr

from patchsweep.data.show import count, esc, number, percent, plural, token_html
from patchsweep.report.html import fact_list, word_list
from patchsweep.report.views import View, has_source
from patchsweep.results import accessor as summary
from patchsweep.results.stated import stated_errors
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.store.attributes import attributes

N_SHOWN = 3  # pairs whose prompts are printed beside the mean
_INTERVENTIONS = {
    "resample": (
        "replaced by its value from the <b>source</b> run, on the {} prompt",
        "resampling",
    ),
    "zero": ("set to zero", "zero ablation"),
    "mean": ("replaced by its mean over clean prompts of the same length", "mean ablation"),
    "mean_all": (
        "replaced by its mean over every position of clean prompts",
        "mean ablation",
    ),
    "mean_label": (
        "replaced by its mean over clean prompts' positions of the same label",
        "mean ablation",
    ),
    "shuffle": ("replaced by its value in another pair's source run", "shuffling pairs"),
}

_WORDS = {
    "patch": "One intervention: one activation (site, layer, position, head) of the base run is "
    "replaced, the rest of the model runs on, and the metric is read.",
    "base": "The run that is patched into.",
    "source": "The run that the patched-in values come from.",
    "site": "A kind of activation, under its TransformerLens name.",
    "effect": "Patched metric minus base metric, in the metric's unit. Positive: the patch raises "
    "the metric.",
    "gap": "Source metric minus base metric: what there is to recover.",
    "recovered": "Effect over gap. 0: as the base run. 1: as the source run. Below 0: further "
    "away than the base run. Above 1: past the source run. Over several pairs it is the sum of "
    "effects over the sum of gaps.",
    "live, dead": "A dead patch provably cannot change the metric (before the first differing "
    "token, say), so its value is known without running; the live ones are run.",
    "token-layer": "One token through one block: the unit of cost. A loop runs every token "
    "through every block for every patch.",
}


def title(ds: xr.Dataset) -> str:
    """Return the report's headline as plain text."""
    return _headline(ds).format(model_name(ds))


def headline(ds: xr.Dataset) -> str:
    """Return the report's headline as HTML in which the model's name does not wrap."""
    return _headline(ds).format(f'<span class="name">{esc(model_name(ds))}</span>')


def lead(ds: xr.Dataset) -> str:
    """Return an HTML paragraph that describes the patches, the metrics and the prompts."""
    base, source = _roles(ds)
    intervention = _intervention(ds)
    known = _INTERVENTIONS.get(intervention)
    how, method = known or ("replaced by values of the user's own", esc(intervention))
    direction = "noising" if _noising(ds) else "denoising"
    again = "are read again" if len(ds["metric"]) > 1 else "is read again"
    kind = (
        f"That is <i>{direction}</i>, by {method}"
        if intervention == "resample"
        else (f"The intervention is {method}")
    )
    names = [str(m) for m in ds["metric"].values]
    units = [str(u) for u in ds["metric_unit"].values] if "metric_unit" in ds.variables else []
    metrics = ", ".join(
        f"<code>{esc(name)}</code>" + (f" (in {esc(unit)})" if unit else "")
        for name, unit in itertools.zip_longest(names, units, fillvalue="")
    )
    aside = ""
    if intervention != "resample" and has_source(ds):
        aside = (
            f" How far that goes is told as a share of the gap to the <b>source</b> run, on the "
            f"{source} prompt."
        )
    return (
        f'<p class="lead">The <b>base</b> run reads the {base} prompt. One activation at a time is '
        f"{how.format(source)}, and {metrics} {again}. {kind}, over "
        f"{plural(ds.sizes['pair'], 'prompt pair')}.{behind_means(attributes(ds).get('means'))}"
        f"{aside}</p>"
    )


def behind_means(means: Any) -> str:
    """Return an HTML sentence on the number of activations per mean; "" without means."""
    if not isinstance(means, dict):
        return ""
    parts = ", ".join(f"{esc(key)}: {count(int(n))}" for key, n in means["behind"].items())
    unit = "prompts" if means["per"] == "position" else "positions"
    return f" Means are taken over {esc(means['over'])}; different {unit} behind each: {parts}."


def prompts(ds: xr.Dataset, metric: str, view: View) -> str:
    """Return HTML of the prompts of `view`, differing tokens marked, and the unpatched metrics."""
    pairs = [int(p) for p in ds["pair"].values]
    shown = pairs[:N_SHOWN] if view.pair is None else [view.pair]
    blocks = [_prompt(ds, pair) for pair in shown]
    lengths = (
        {sum(1 for t in ds["base_token"].sel(pair=p).values if t) for p in pairs}
        if (view.pair is None and "base_token" in ds.variables)
        else set()
    )
    rest = len(pairs) - len(shown)
    if view.pair is None and rest:
        blocks.append(f'<p class="more">… and {plural(rest, "more pair")}.</p>')
    if len(lengths) > 1:
        blocks.append(
            f'<p class="notice">Prompts are {min(lengths)} to {max(lengths)} tokens long. '
            f"{_alignment(ds)}</p>"
        )
    return "".join(blocks) + _ends(ds, metric, view)


def _alignment(ds: xr.Dataset) -> str:
    """Return how prompts of unequal lengths share positions, in words."""
    if "pos" not in ds.coords or ds["pos"].dtype.kind != "i":
        return "Positions are those of their labels."
    if (ds["pos"] < 0).any():
        return "Positions count from the end of each, and the first ones average fewer pairs."
    return "Positions count from the start, and the later ones average fewer pairs."


def banner(ds: xr.Dataset, names: tuple[str, ...]) -> str:
    """Return a notice with the share of cells that have not run, and of pairs without unpatched
    metrics; "" if all have."""
    parts = {site: summary.missing(ds, site) for site in names}
    absent = sum(a for a, _ in parts.values())
    total = sum(n for _, n in parts.values())
    screened = ds.attrs.get("method") == "screen"
    lacking, note = [], ""
    if absent and screened:
        note = (
            f'<p class="notice" role="status">Screened: {percent(1 - absent / total)} of the cells '
            "were run exactly, those that the estimates rank highest; the rest are left grey.</p>"
        )
    elif absent:
        by_site = ", ".join(f"{esc(s)} {percent(a / n)}" for s, (a, n) in parts.items() if a)
        lacking.append(
            f"{percent(absent / total)} of its cells have not run ({by_site}). They are grey below "
            "and in no average."
        )
    if without := _without_unpatched(ds):
        lacking.append(
            f"The unpatched metrics of {plural(without, 'pair')} are missing; effects of these "
            "pairs are in no average."
        )
    for text in (*tolerance_notes(ds), *(stated.words for stated in stated_errors(ds))):
        note += f'<p class="notice">{esc(text)}.</p>'
    if not lacking:
        return note
    return (
        f'{note}<p class="notice warn" role="status"><b>This run is unfinished:</b> '
        f"{' '.join(lacking)} Start the same command again to complete it.</p>"
    )


def _without_unpatched(ds: xr.Dataset) -> int:
    """Return the number of pairs that lack a metric of an unpatched run."""
    lost = ds["base_metric"].isnull().any("metric")
    if has_source(ds):
        lost = lost | ds["source_metric"].isnull().any("metric")
    return int(lost.sum())


def words() -> str:
    """Return the legend of terms as an HTML definition list."""
    return word_list(_WORDS)


def _prompt(ds: xr.Dataset, pair: int) -> str:
    """Return HTML of both prompts of one pair, source above base."""
    if not {"base_token", "source_token"} <= set(ds.variables):
        return ""
    base, source = (
        [str(t) for t in ds[name].sel(pair=pair).values] for name in ("base_token", "source_token")
    )
    base_role, source_role = _roles(ds)
    swept = "pos" in ds["base_token"].dims and "pos" in ds.coords
    positions = ds["pos"].values.tolist() if swept else list(range(len(base)))
    rows = []
    paired = has_source(ds)
    for name, role, tokens, others in (
        ("source", source_role, source, base),
        ("base", base_role, base, source if paired else base),
    ):
        if name == "source" and not paired:
            continue
        answer = "answer" if role == "clean" else "wrong_answer"
        expects = ""
        if answer in ds.variables:
            expects = (
                f' <span class="arrow">→</span> {token_html(str(ds[answer].sel(pair=pair).item()))}'
            )
        rows.append(
            f'<tr><th scope="row">{name}<small>{role}</small></th>'
            f"<td>{_marked(tokens, others, positions)}{expects}</td></tr>"
        )
    return f'<table class="prompt"><tbody>{"".join(rows)}</tbody></table>'


def _marked(tokens: list[str], others: list[str], positions: list[int] | list[str]) -> str:
    parts = []
    first = next((p for token, p in zip(tokens, positions, strict=True) if token), 0)
    # one that counts from the end may be the first token of its prompt
    following: int | str = first if isinstance(first, int) and first < 0 else 0
    for token, other, pos in zip(tokens, others, positions, strict=True):
        if not token:
            continue
        if pos != following:
            parts.append('<span class="skip">…</span>')  # positions that were not swept
        following = pos + 1 if isinstance(pos, int) else ""
        html = token_html(token)
        parts.append(html if token == other else f"<mark>{html}</mark>")
    return "<wbr>".join(parts)


def _ends(ds: xr.Dataset, metric: str, view: View) -> str:
    """Return HTML of both unpatched metrics, with a warning if the gap is small."""
    base, source = (ds[n].sel(metric=metric) for n in ("base_metric", "source_metric"))
    flags = summary.small_gaps(ds).sel(metric=metric)
    if view.pair is not None:
        base, source, flags = (a.sel(pair=view.pair) for a in (base, source, flags))
    a, b = float(base.mean()), float(source.mean())
    mean = "mean " if view.pair is None else ""
    text = f"Unpatched {mean}<code>{esc(metric)}</code>: base <b>{number(a)}</b>"
    if np.isfinite(b):
        text += f", source <b>{number(b)}</b>, gap <b>{number(b - a, sign=True)}</b>"
    html = f'<p class="ends">{text}.</p>'
    flagged = [int(p) for p in np.atleast_1d(flags["pair"].values)[np.atleast_1d(flags.values)]]
    if flagged and np.isfinite(b):
        listed = ", ".join(str(p) for p in flagged[:10]) + (", …" if len(flagged) > 10 else "")
        html += (
            f'<p class="notice">Small gap in {plural(len(flagged), "pair")} ({listed}): under '
            f"{percent(summary.SMALL_GAP)} of the metric's median gap, so a recovered fraction "
            "says little there. They stay in the mean, with the small weight they have.</p>"
        )
    return html


def facts(ds: xr.Dataset, planned: dict[str, float], seconds: float) -> str:
    """Return the run's model, patches, cost and time as an HTML list."""
    shown = [("model", esc(model_name(ds)))]
    if planned.get("n_patches"):
        live = f"{count(planned['n_patches'])} <small>{count(planned['n_live'])} live</small>"
        shown.append(("patches", live))
    if planned.get("token_layers"):
        times = planned["loop_token_layers"] / planned["token_layers"]
        needs = count(planned["loop_token_layers"])
        loop = f"<small>a loop needs {needs}, {count(times)} &times;</small>"
        shown.append(("token-layers", f"{count(planned['token_layers'])} {loop}"))
    if seconds:
        shown.append(("running time", f"{seconds:,.1f} s"))
    return fact_list(shown)


def _headline(ds: xr.Dataset) -> str:
    if _intervention(ds) != "resample":
        return "Which parts of {} does the answer depend on?"
    if _noising(ds):
        return "Which parts of {} take the answer away?"
    return "Which parts of {} bring the answer back?"


def _roles(ds: xr.Dataset) -> tuple[str, str]:
    return ("clean", "corrupted") if _noising(ds) else ("corrupted", "clean")


def _noising(ds: xr.Dataset) -> bool:
    return str(ds.attrs.get("direction", "denoising")) == "noising"


def _intervention(ds: xr.Dataset) -> str:
    return str(ds.attrs.get("intervention", "resample"))


def model_name(ds: xr.Dataset) -> str:
    """Return the last part of the model's name; provenance has its folder or owner too."""
    known = attributes(ds).get("provenance")
    name = str(known.get("model", "")) if isinstance(known, dict) else ""
    return name.rstrip("/").rsplit("/", 1)[-1] or "the model"
