"""`patchsweep compare STORE`: how far the estimates of a store can be trusted."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import xarray as xr

from patchsweep.cli.console import stdout
from patchsweep.compare import as_dict, compare, render
from patchsweep.config import from_identity, request_of
from patchsweep.errors import StoreError
from patchsweep.identity import request_difference
from patchsweep.sample import draw
from patchsweep.store import Store


def main(arguments: list[str]) -> int:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        "patchsweep compare",
        description="Attribution's estimates beside the exact effects of one store: correlations, "
        "the largest misses by name, and which sites they may be trusted on.",
    )
    parser.add_argument("store", help="folder or URL, of a run with estimates")
    parser.add_argument(
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="run N random patches of each site exactly, where the store holds estimates alone",
    )
    parser.add_argument("--seed", type=int, default=0, help="of that sample (0)")
    parser.add_argument("--json", action="store_true", help="all numbers, for scripts")
    options = parser.parse_args(arguments)
    found = compare(
        with_sample(options.store, options.sample, options.seed)
        if options.sample
        else options.store
    )
    if options.json:
        print(json.dumps(as_dict(found), indent=2))
    else:
        stdout().print(render(found))
    return 0


def with_sample(url: str, n: int, seed: int) -> xr.Dataset:
    """The store's values, and exact ones of random patches of the sites that have none."""
    store = Store.open(url)
    config = from_identity(store.attrs["provenance"]["config"])
    request = request_of(config)
    difference = request_difference(request, store.attrs)
    if difference is not None:
        raise StoreError(
            f"no sample can be drawn for {url}: {difference}; give the model, the prompts and the "
            "settings that the store was made with"
        )
    ds = store.dataset().load()
    missing = tuple(plan for plan in request.plans if plan.site.name not in ds)
    if not missing:
        return ds
    sample = draw(replace(request, plans=missing), n, seed, config.runner.name)  # type: ignore[arg-type]
    return ds.assign({plan.site.name: sample[plan.site.name] for plan in missing})
