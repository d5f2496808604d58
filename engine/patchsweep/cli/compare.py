"""`patchsweep compare STORE`: compares the estimates of a store with its exact effects."""

from __future__ import annotations

import json
from dataclasses import replace

import xarray as xr

from patchsweep.cli import parsers
from patchsweep.cli.again import run_again
from patchsweep.cli.console import stdout
from patchsweep.results.compare import compare
from patchsweep.results.render import as_dict, render
from patchsweep.results.tolerance import tolerance_notes
from patchsweep.store.backends.credentials import scrub
from patchsweep.store.contents import understood
from patchsweep.store.dataset import open_store
from patchsweep.store.store import Store
from patchsweep.sweeps.sample import draw


def main(arguments: list[str]) -> int:
    """Print the comparison."""
    options = parsers.compare(arguments)
    store: str | xr.Dataset = options.store
    if options.sample:
        store = with_sample(options.store, options.words, options.sample, options.seed)
    with understood(scrub(options.store)):
        ds = store if isinstance(store, xr.Dataset) else open_store(store)
        if notes := tolerance_notes(ds):  # such a run has no estimates beside its values
            stdout().print("\n".join(notes))
            return 0
        comparison = compare(ds)
    if options.json:
        print(json.dumps(as_dict(comparison), indent=2))
    else:
        stdout().print(render(comparison))
    return 0


def with_sample(url: str, words: list[str], n: int, seed: int) -> xr.Dataset:
    """Return the store's Dataset with exact values of `n` random patches for sites without any.

    The patches run on the model and the task of `words`.

    Raises:
        PatchsweepError: `words` name another model, task or metric than the store was made with.
    """
    store = Store.open(url)
    request, config = run_again(store, words, "compare")
    ds = store.dataset().load()
    missing = tuple(plan for plan in request.plans if plan.site.name not in ds)
    if not missing:
        return ds
    sample = draw(replace(request, plans=missing), n, seed, config.runner.name)  # type: ignore[arg-type]
    return ds.assign({plan.site.name: sample[plan.site.name] for plan in missing})
