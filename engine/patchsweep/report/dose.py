"""The page of dose curves: the metric against the coefficient, beside random vectors."""

from __future__ import annotations

import numpy as np
import xarray as xr

from patchsweep.data.show import esc, plural
from patchsweep.report.figure import SERIES, figure, figure_scripts, plain
from patchsweep.report.question import model_name
from patchsweep.report.shell import page, section

N_CURVES = 24  # curves on the page: the places at which the given vector moves the metric most


def build(ds: xr.Dataset) -> str:
    """Return the page of the Dataset of `patchsweep.analyses.joint.dose`."""
    model = model_name(ds)
    metric, site = str(ds["metric"].values[0]), str(ds.attrs["site"])
    n_controls = ds.sizes["vector"] - 1
    header = (
        f'<header><h1>Doses of a direction in <span class="name">{esc(model)}</span></h1>'
        f'<p class="lead">{esc(metric)}, mean over {plural(ds.sizes["pair"], "pair")}, when a '
        f"multiple of one vector is added to {esc(site)}; grey: "
        f"{plural(n_controls, 'random vector')} of the same norm.</p></header>"
    )
    mean = ds["patched"].sel(metric=metric).mean("pair")
    base = float(ds["base_metric"].sel(metric=metric).mean())
    size = abs(mean.isel(vector=0) - base).max("coefficient").values
    order = np.argsort(-size, axis=None, kind="stable")[:N_CURVES]
    places = sorted(tuple(map(int, np.unravel_index(i, size.shape))) for i in order)
    drawn = "".join(_curve(ds, mean, base, metric, layer, place) for layer, place in places)
    note = "" if size.size <= N_CURVES else f"<p>The {N_CURVES} of {size.size} that move most.</p>"
    return page(
        f"Doses of a direction in {model}",
        [header, section("curves", "Curves", f'{note}<div class="grid">{drawn}</div>')],
        scripts=figure_scripts(),
    )


def _curve(
    ds: xr.Dataset, mean: xr.DataArray, base: float, metric: str, layer: int, place: int
) -> str:
    x = ds["coefficient"].values
    one = mean.isel(layer=layer, place=place)
    traces = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": plain(vector),
            "x": x,
            "y": one.isel(vector=i).values,
            "line": {"color": SERIES[0] if i == 0 else "#b8bfc6"},
        }
        for i, vector in reversed([*enumerate(ds["vector"].values)])
    ]
    where = str(ds["place"].values[place])
    title = f"layer {int(ds['layer'].values[layer])}, " + (
        "all positions" if where == "all" else f"position {where}"
    )
    layout = {
        "xaxis": {"title": {"text": "coefficient"}},
        "yaxis": {"title": {"text": plain(metric)}},
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": base, "y1": base,
                    "line": {"dash": "dot", "width": 1}}],
    }  # fmt: skip
    return figure(f"dose-{layer}-{place}", traces, layout, title=title, wide=False)
