"""What a tolerance saves for pairs of heads, and for latents, on SmolLM2-135M; and its errors.

    python benchmarks/joint_tolerance.py pairs [N_HEADS ...]
    python examples/train_dictionaries.py runs/dictionaries
    python benchmarks/joint_tolerance.py runs/dictionaries

Prompts of 17 tokens, and of 71 with filler. Half of the heads have the largest estimates, half are
random. Seconds are of a processor and of whole calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import patchsweep as ps
import xarray as xr
from patchsweep.store.attributes import attributes

FILLER = (
    " The weather was fine that day, and the streets were full of people who had come from far away"
    " to see the market."
)
LONG = (
    "When John and Mary went to the shops, {} smiled."
    + 2 * FILLER
    + " Then he gave a bottle of milk to"
)
TOLERANCES = (0.003, 0.01, 0.05)


def prompts(model) -> Iterator[ps.PromptPairs]:
    """Yield the short pair and the long one."""
    yield ps.load_task(model, "ioi_demo")
    yield ps.PromptPairs.from_strings(
        model,
        clean=[LONG.format("John")],
        corrupted=[LONG.format("Mary")],
        answers=[(" Mary", " John")],
    )


def timed(call: Callable[..., xr.Dataset], **settings) -> tuple[xr.Dataset, float]:
    """Return a result and the processor's seconds that it took."""
    begun = time.process_time()
    return call(**settings), time.process_time() - begun


def compare(name: str, call: Callable[..., xr.Dataset]) -> None:
    """Print what tolerances save and how far values are from exact ones."""
    exact, took = timed(call)
    effects = np.abs((exact["patched"] - exact["base_metric"]).values)
    print(f"{name}: exact {took:.1f} s; largest effect {np.nanmax(effects):.3f}")
    for tolerance in TOLERANCES:
        ds, took = timed(call, tolerance=tolerance)
        error = np.nanmax(np.abs(ds["patched"].values - exact["patched"].values))
        sites = attributes(ds)["adaptive"]["sites"].values()
        ran, whole = (
            sum(site[key] for site in sites) for key in ("token_layers", "exact_token_layers")
        )
        print(
            f"  tolerance {tolerance}: {ran:,.0f} of {whole:,.0f} token-layers "
            f"({ran / whole:.2%}), largest error {error:.4f}, {took:.1f} s"
        )


def some_heads(model, pairs: ps.PromptPairs, n: int) -> list[tuple[int, int]]:
    """Return heads, half with the largest estimates and half random."""
    estimates = np.abs(ps.sweep(model, pairs, "z", method="atp")["z_atp"])
    size = estimates.isel(metric=0, pair=0).sum("pos").transpose("layer", "head").values
    order = np.stack(np.unravel_index(np.argsort(-size, axis=None), size.shape), axis=1)
    rest = np.random.default_rng(0).permutation(len(order) - n // 2)[: n - n // 2] + n // 2
    chosen = [*order[: n // 2], *order[rest]]
    return sorted((int(layer), int(head)) for layer, head in chosen)


def main(what: str, sizes: list[int]) -> None:
    """Compare pairs of heads, or the latents of the dictionaries in a folder."""
    model = ps.load_model("smollm2-135m")
    for pairs in prompts(model):
        name = f"{len(pairs[0])} tokens"
        if what == "pairs":
            for n in sizes or [40]:
                heads = some_heads(model, pairs, n)
                compare(f"{name}, {n} heads", partial(ps.interactions, model, pairs, heads=heads))
        else:
            some = [ps.Dictionary.from_safetensors(place) for place in sorted(Path(what).iterdir())]
            compare(f"{name}, latents", partial(ps.latents, model, pairs, some))


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
