"""All pairs of heads, and a causal trace of one fact, on SmolLM2-135M; each beside a loop.

    python benchmarks/joint_patches.py [pairs] [trace]

Values are compared with hooks first: 200 random pairs of heads, and a part of the trace. A loop's
time is that of one forward pass times the number of runs.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import patchsweep as ps
import torch
from patchsweep.spec.batch import base_and_source


def main(what: list[str]) -> None:
    """Print the measurements named in `what`; default both."""
    print(f"{torch.get_num_threads()} threads")
    model = ps.load_model("smollm2-135m")
    if "pairs" in what or not what:
        pairs_of_heads(model)
    if "trace" in what or not what:
        one_fact(model)


def pairs_of_heads(model) -> None:
    """Time `interactions` of all heads, and compare 200 of its pairs with hooks."""
    pairs = ps.load_task(model, "ioi_demo")
    begun = time.perf_counter()
    ds = ps.interactions(model, pairs)
    took = time.perf_counter() - begun
    n_heads = ds.sizes["head"]
    n_pairs = n_heads * (n_heads - 1) // 2
    rng = np.random.default_rng(0)
    first, second = np.triu_indices(n_heads, k=1)
    chosen = rng.choice(n_pairs, size=200, replace=False)
    expected = by_hooks(model, pairs[0], first[chosen], second[chosen])
    values = ds["patched"].values[0, 0][first[chosen], second[chosen]]
    once = time_of_a_pass(model, pairs[0])
    print(
        f"{n_pairs} pairs of heads: {took:.1f} s; a loop {once * (n_pairs + n_heads):.0f} s; "
        f"largest difference of 200 pairs {np.abs(values - expected).max():.1e}"
    )


def by_hooks(model, pair, first: np.ndarray, second: np.ndarray, rows: int = 20) -> np.ndarray:
    """Return logit_diff with both heads of each pair resampled, `rows` pairs a forward pass."""
    n_heads = model.cfg.n_heads
    base, source = (torch.tensor([x]) for x in base_and_source(pair, "denoising"))
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    kept: dict[str, torch.Tensor] = {}

    def keep(x, hook, name):
        kept[name] = x.clone()

    with torch.no_grad():
        model.run_with_hooks(
            source, fwd_hooks=[(n, lambda x, hook, n=n: keep(x, hook, n)) for n in names]
        )
    values = []
    for begin in range(0, len(first), rows):
        part = np.stack([first[begin : begin + rows], second[begin : begin + rows]])
        hooks = []
        for layer, name in enumerate(names):
            at = [
                (row, head % n_heads)
                for row, heads in enumerate(part.T.tolist())
                for head in heads
                if head // n_heads == layer
            ]

            def write(x, hook, at=at, name=name):
                for row, head in at:
                    x[row, :, head] = kept[name][0, :, head]
                return x

            if at:
                hooks.append((name, write))
        with torch.no_grad():
            logits = model.run_with_hooks(base.expand(part.shape[1], -1), fwd_hooks=hooks)[:, -1]
        values.append(logits[:, pair.answer[0]] - logits[:, pair.wrong_answer[0]])
    return torch.cat(values).numpy()


def one_fact(model) -> None:
    """Time a trace of one fact: all states, three kinds, windows of 10 blocks, 10 samples."""
    facts = ps.load_task(model, "facts", n_pairs=1)
    noise = ps.Noise("subject")
    begun = time.perf_counter()
    ds = ps.trace(model, facts, noise)
    took = time.perf_counter() - begun
    n_runs = noise.samples * (1 + 3 * model.cfg.n_layers * len(facts[0]))
    once = time_of_a_pass(model, facts[0])
    top = float(abs(ds["effect"]).max())
    print(
        f"trace of {len(facts[0])} tokens, {n_runs} runs: {took:.1f} s; a loop "
        f"{once * n_runs:.0f} s; largest effect on the probability {top:.3f}"
    )


def time_of_a_pass(model, pair, repeats: int = 5) -> float:
    """Return the median seconds of one forward pass of the clean prompt."""
    tokens = torch.tensor([pair.clean])
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            model(tokens)
            times.append(time.perf_counter() - begun)
    return float(np.median(times[1:]))


if __name__ == "__main__":
    main(sys.argv[1:])
