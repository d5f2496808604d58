"""`patchsweep compare STORE`: compares the estimates of a store with its exact effects."""

from __future__ import annotations

import json
from dataclasses import replace

import xarray as xr

from patchsweep.cli.again import HELP, run_again
from patchsweep.cli.console import stdout
from patchsweep.cli.parser import Parser, at_least
from patchsweep.errors import ConfigError
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
    parser = Parser(
        "patchsweep compare",
        description="Attribution's estimates beside the exact effects of one store: correlations, "
        "the largest misses by name, and which sites they may be trusted on.",
    )
    parser.add_argument("store", help="folder or URL, of a run with estimates")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help=f"with --sample: {HELP}")
    parser.add_argument(
        "--sample",
        type=at_least(1),
        metavar="N",
        help="run N random patches of each site exactly, where the store holds estimates alone",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="of that sample (0)")
    parser.add_argument("--json", action="store_true", help="all numbers, for scripts")
    options = parser.parse_intermixed_args(arguments)
    if options.words and not options.sample:
        raise ConfigError(f"{options.words[0]} is for --sample N, which runs patches; leave it out")
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
