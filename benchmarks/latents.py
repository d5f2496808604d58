"""All live latents of one prompt pair on SmolLM2-135M, exact and estimated.

    python examples/train_dictionaries.py runs/dictionaries
    python benchmarks/latents.py runs/dictionaries

Three dictionaries of 4,096 latents. 50 random patches are compared with a dictionary spliced into
the plain modules; a loop's time is that of one forward pass times the number of patches.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import patchsweep as ps
import torch
from patchsweep.analyses.latents import agreement, largest_latents
from patchsweep.spec.batch import base_and_source


def main(folder: Path) -> None:
    """Print times, agreements and the largest effects."""
    print(f"{torch.get_num_threads()} threads")
    model = ps.load_model("smollm2-135m")
    pairs = ps.load_task(model, "ioi_demo")
    dictionaries = [ps.Dictionary.from_safetensors(place) for place in sorted(folder.iterdir())]
    begun, busy = time.perf_counter(), time.process_time()
    ds = ps.latents(model, pairs, dictionaries, estimates=["atp", "relp", "ig"])
    took, busy = time.perf_counter() - begun, time.process_time() - busy
    expected, values = spliced(model, pairs[0], dictionaries, ds, 50)
    begun = time.perf_counter()
    with torch.no_grad():
        model(torch.tensor([pairs[0].clean]))
    once = time.perf_counter() - begun
    n_live = int(ds.attrs["n_live"])
    effects = np.abs((ds["patched"] - ds["base_metric"]).values[ds["change"].values[None] != 0])
    print(
        f"{n_live:,} live of {int(ds.attrs['n_patches']):,} latents and positions, and three "
        f"estimates: {took:.1f} s ({busy:.1f} s of processors); a loop {once * n_live:.0f} s; "
        f"largest difference of {len(values)} patches {np.abs(values - expected).max():.1e}; "
        f"effects up to {effects.max():.2f}, {np.mean(effects > 0.01):.0%} of them above 0.01"
    )
    for one in dictionaries:
        mine = ds.sel(latent=ds["dictionary"] == one.name)
        words = (f"{x.method} r={x.pearson:.3f} sign={x.same_sign:.0%}" for x in agreement(mine))
        print(f"{one.name}: {agreement(mine)[0].n} patches; {'; '.join(words)}")
    for one in agreement(ds):
        print(f"all: {one.method} r={one.pearson:.3f} sign={one.same_sign:.0%}")
    for found in largest_latents(ds, n=5):
        print(found)


def spliced(model, pair, dictionaries, ds, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return metrics of `n` random patches with the dictionary in the plain modules, and `ds`'s."""
    plain = model.original_model
    base, source = (torch.tensor([x]) for x in base_and_source(pair, "denoising"))
    names = {one.name: one for one in dictionaries}
    live = np.argwhere(ds["change"].values[0] != 0)
    chosen = live[np.random.default_rng(0).choice(len(live), size=n, replace=False)]
    expected, values = [], []
    with torch.no_grad():
        for pos, column in chosen:
            one = names[str(ds["dictionary"].values[column])]
            latent = int(ds["latent_number"].values[column])
            block = plain.model.layers[one.layer]
            streams = []
            keeping = block.register_forward_hook(
                lambda module, args, out, kept=streams: kept.append(
                    (out[0] if isinstance(out, tuple) else out).clone()
                )
            )
            for tokens in (base, source):
                plain(tokens)
            keeping.remove()
            f, f_source = (one.encode(x) for x in streams)
            error = streams[0] - one.decode(f)
            f[0, pos, latent] = f_source[0, pos, latent]

            def splice(module, args, out, one=one, f=f, error=error):
                new = one.decode(f) + error
                return (new, *out[1:]) if isinstance(out, tuple) else new

            splicing = block.register_forward_hook(splice)
            logits = plain(base).logits[0, -1]
            splicing.remove()
            expected.append(float(logits[pair.answer[0]] - logits[pair.wrong_answer[0]]))
            values.append(float(ds["patched"].values[0, 0, pos, column]))
    return np.array(expected), np.array(values)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/dictionaries"))
