"""The page of a causal trace: a map of each kind, as in the paper, and the largest effects."""

from __future__ import annotations

import numpy as np
import xarray as xr

from patchsweep.analyses.tracing import largest_effects
from patchsweep.data.show import esc, number, plural, token_html
from patchsweep.report.figure import RED_BLUE, figure, figure_scripts, plain
from patchsweep.report.html import marked, numbers, table
from patchsweep.report.question import model_name
from patchsweep.report.shell import page, section
from patchsweep.store.attributes import attributes
from patchsweep.store.difference import IDENTITY

N_PAIRS = 8  # pairs whose maps are on the page
_WORDS = {
    "state": "One state restored",
    "mlp": "MLP writes of a window restored",
    "attn": "Attention writes of a window restored",
    "state without mlp": "One state restored, later MLP writes held",
    "state without attn": "One state restored, later attention writes held",
}


def build(ds: xr.Dataset) -> str:
    """Return the page of the Dataset of `patchsweep.analyses.tracing.trace`."""
    model = model_name(ds)
    metric = str(ds["metric"].values[0])
    n_pairs = ds.sizes["pair"]
    shown = range(min(n_pairs, N_PAIRS))
    rest = "" if n_pairs <= N_PAIRS else f" The first {N_PAIRS} of {n_pairs} pairs are drawn."
    settings = attributes(ds)[IDENTITY]["corruption"]
    header = (
        f'<header><h1>Causal trace of <span class="name">{esc(model)}</span></h1>'
        f'<p class="lead">Noise of {float(settings["scale"]):g} standard deviations on the '
        f"marked tokens takes the answer away; one place at a time has its clean value again. Blue "
        f"brings {esc(metric)} back. Means over {plural(int(settings['samples']), 'draw')} of the "
        f"noise.{rest}</p></header>"
    )
    parts = [header, *(_pair(ds, metric, pair) for pair in shown)]
    return page(f"Causal trace of {model}", parts, scripts=figure_scripts())


def _pair(ds: xr.Dataset, metric: str, pair: int) -> str:
    one = ds.sel(metric=metric, pair=pair)
    n_pos = int((one["token"] != "").sum())
    tokens = [str(token) for token in one["token"].values[:n_pos]]
    noisy = one["noised"].values[:n_pos]
    prompt = "".join(marked(tokens, noisy))
    clean, noised = (float(one[f"{x}_metric"]) for x in ("clean", "noised"))
    drawn = "".join(
        _map(one.sel(kind=kind), str(kind), tokens, noisy, f"map-{pair}-{i}")
        for i, kind in enumerate(one["kind"].values)
    )
    words = (
        f"<p>{prompt}</p><p>{esc(metric)} of {esc(str(one['answer'].values))}: {number(clean)} on "
        f"the clean prompt, {number(noised)} under noise.</p>"
    )
    return section(
        f"pair-{pair}",
        f"Pair {pair}",
        f'{words}<div class="grid">{drawn}</div>{_table(ds, metric, pair)}',
    )


def _map(one: xr.Dataset, kind: str, tokens: list[str], noisy: np.ndarray, name: str) -> str:
    """Return the map of one kind: tokens are rows, layers columns."""
    values = one["effect"].transpose("pos", "layer").values[: len(tokens)]
    limit = float(np.nanmax(np.abs(values))) or 1.0
    names = [
        plain(f"{pos} {token}{'*' if marked else ''}")
        for pos, (token, marked) in enumerate(zip(tokens, noisy, strict=True))
    ]
    trace = {
        "type": "heatmap",
        "x": one["layer"].values,
        "y": names,
        "z": values,
        "colorscale": RED_BLUE,
        "colorbar": {"exponentformat": "e"},
        "zmin": -limit,
        "zmax": limit,
        "text": [[number(x, sign=True) for x in row] for row in values.tolist()],
        "hovertemplate": "layer %{x}, token %{y}: %{text}<extra></extra>",
    }
    layout = {
        "height": 120 + 22 * len(tokens),
        "xaxis": {"title": {"text": "layer"}},
        "yaxis": {"autorange": "reversed"},
    }
    return figure(name, [trace], layout, title=_WORDS[kind], wide=False)


def _table(ds: xr.Dataset, metric: str, pair: int) -> str:
    rows = []
    for kind in map(str, ds["kind"].values):
        for place in largest_effects(ds, kind, metric, pair, n=3):
            low, effect, high = (
                number(x, sign=True) for x in (place.low, place.effect, place.high)
            )
            rows.append(
                f"<tr><td>{esc(kind)}</td>{numbers(place.layer)}"
                f"<td>{place.pos} {token_html(place.token)}</td>"
                f"{numbers(effect, f'{low} to {high}')}</tr>"
            )
    columns = ("kind", "layer", "position", "effect", "95 % interval")
    return table(columns, rows, ("kind", "position"))
