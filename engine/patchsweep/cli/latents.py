"""`patchsweep latents`: patches every latent of dictionaries, and stores effects and estimates."""

from __future__ import annotations

import numpy as np
import xarray as xr
from rich.console import Console
from rich.table import Table

from patchsweep.analyses.latents import agreement, largest_latents, latents
from patchsweep.cli.analysis import AnalysisVerb
from patchsweep.cli.schema.latents import LatentsRun
from patchsweep.data.show import number
from patchsweep.results.tolerance import tolerance_notes

N_SHOWN = 10


def _show(console: Console, ds: xr.Dataset, known: bool) -> None:
    n_live, n = int(ds.attrs["n_live"]), int(ds.attrs["n_patches"])
    console.print(f"{n_live:,} of {n:,} latents and positions change; the others are dead")
    for note in tolerance_notes(ds):
        console.print(note)
    for one in agreement(ds):
        if one.n:
            console.print(f"{one.method}: r = {number(one.pearson)} with {one.n:,} exact effects")
    console.print(_table(ds))


def _table(ds: xr.Dataset) -> Table:
    """Return a table of the latents of the first pair with the largest effects."""
    table = Table(title="largest effects in pair 0", title_justify="left")
    for name in ("dictionary", "latent", "position"):
        table.add_column(name)
    for name in ("change", "effect"):
        table.add_column(name, justify="right")
    for one in largest_latents(ds, n=N_SHOWN):
        ran = np.isfinite(one.effect)
        effect = one.effect if ran else next(iter(one.estimates.values()))
        where = f"{one.pos} {one.token!r}"
        table.add_row(
            one.dictionary,
            str(one.latent),
            where,
            number(one.change, sign=True),
            number(effect, sign=True),
        )
    return table


main = AnalysisVerb("latents", LatentsRun, latents, _show)
