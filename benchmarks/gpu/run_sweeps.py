"""Measure whole sweeps on this machine's GPU beside the TransformerLens loop (`make bench-gpu`).

Same model object, same prompts. A sample of the loop's patches is timed and scaled up: all of
them would take hours. Some patches of both are held against the same model in a wider type; a
sweep that is further off than the loop is an error, not a fast one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import patchsweep as ps
import record
import torch
import transformer_lens.patching as tl_patching
from kernel_table import write_page
from numpy.typing import NDArray
from patchsweep.data.pairs import PromptPairs
from sweep_cases import CASES, SweepCase, make_model, make_pairs
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformer_lens.model_bridge import TransformerBridge

WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32}
SETTERS = {
    "resid_pre": tl_patching.layer_pos_patch_setter,
    "z": tl_patching.layer_pos_head_vector_patch_setter,
}
CHECKED = 8  # patches that are run again in the wider type
# The sweep sums in another order than the loop, so single cells may be a few times as far off; a
# thousandth of what the cells range over is for the case that the loop happens to be exact.
SLACK = (4.0, 1e-3)


class Loop:
    """The TransformerLens loop over chosen patches, one forward pass each."""

    def __init__(self, model: TransformerBridge, pairs: PromptPairs, site: str) -> None:
        device = next(model.original_model.parameters()).device
        pair = pairs[0]
        self.model, self.site = model, site
        self.clean, self.corrupted = (
            torch.tensor([tokens], device=device) for tokens in (pair.clean, pair.corrupted)
        )
        self.answer, self.wrong = pair.answer[0], pair.wrong_answer[0]
        hook = "hook_resid_pre" if site == "resid_pre" else "attn.hook_z"
        with torch.no_grad():
            _, self.cache = model.run_with_cache(
                self.clean, names_filter=lambda name: name.endswith(hook)
            )

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        return (logits[:, -1, self.answer] - logits[:, -1, self.wrong]).mean()

    @torch.no_grad()
    def __call__(self, patches: pd.DataFrame) -> NDArray[np.float64]:
        values = tl_patching.generic_activation_patch(
            self.model,
            self.corrupted,
            self.cache,
            self.metric,
            SETTERS[self.site],
            self.site,
            index_df=patches,
        )
        return values.double().cpu().numpy()


def measure_sweep(
    case: SweepCase, site: str, device: torch.device, *, trial: bool = False, rounds: int = 5
) -> dict[str, Any]:
    """One entry of the file's `sweeps`.

    Raises:
        AssertionError: the sweep is further from the model in a wider type than the loop is.
    """
    model = make_model(case, device, trial=trial)
    n_pos = 5 if trial else case.n_pos
    pairs = make_pairs(model.cfg.d_vocab, n_pos)
    loop = Loop(model, pairs, site)
    sizes = [model.cfg.n_layers, n_pos] + ([model.cfg.n_heads] if site == "z" else [])
    names = ["layer", "pos", "head_index"][: len(sizes)]
    every = pd.DataFrame(np.argwhere(np.ones(sizes)), columns=names)
    sample = every.sample(min(len(every), case.loop_sample), random_state=0)
    sample = sample.sort_values(names).reset_index(drop=True)

    def sweep() -> NDArray[np.float32]:
        found: NDArray[np.float32] = ps.sweep(model, pairs, site)[site].values[0, 0]
        return found

    sweep()  # tests the runner, compiles the kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_seconds(sweep, device) for _ in range(rounds)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    loop(sample.head(3))
    loop_seconds = _seconds(lambda: loop(sample), device) / len(sample) * len(every)

    checked = sample.iloc[np.linspace(0, len(sample) - 1, min(CHECKED, len(sample))).astype(int)]
    ours, theirs = sweep()[tuple(checked.to_numpy().T)], loop(checked)
    launches = _launches(sweep, device)
    wider = WIDER[case.dtype]
    model.original_model.to(wider)
    model.cfg.dtype = wider
    exact = Loop(model, pairs, site)(checked)
    our_error, their_error = (float(np.abs(x - exact).max()) for x in (ours, theirs))
    limit = SLACK[0] * their_error + SLACK[1] * float(np.ptp(exact))
    assert our_error <= limit, f"{case.name}, {site}: error {our_error:.2e} > {limit:.2e}"
    return {
        "name": case.name,
        "site": site,
        "dtype": str(case.dtype).removeprefix("torch."),
        "n_pos": n_pos,
        "n_patches": len(every),
        "seconds": {
            name: float(np.quantile(times, q))
            for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))
        },
        "loop_seconds": loop_seconds,
        "loop_patches_timed": len(sample),
        "largest_error": our_error,
        "loop_largest_error": their_error,
        "peak_bytes": peak,
        "launches": launches,
    }


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Wall time of `run`, with all its work on the device done."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    synchronise(device)
    start = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - start


def _launches(run: Callable[[], object], device: torch.device) -> dict[str, float] | None:
    """How many kernels and copies `run` puts on the GPU, and seconds that it is busy with them.

    What remains of the time of a sweep, the GPU waits for the host.
    """
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize(device)
    on_device = [e for e in profiler.events() or [] if e.device_type == DeviceType.CUDA]
    busy = sum(e.time_range.elapsed_us() for e in on_device) / 1e6
    return {"n_launches": len(on_device), "busy_seconds": busy}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=record.RESULTS, help="folder of the JSON")
    parser.add_argument("--rounds", type=int, default=5, help="sweeps that are timed")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print(record.NO_GPU, file=sys.stderr)
        return 2
    device = torch.device("cuda")
    sweeps = []
    for case in CASES:
        for site in SETTERS:
            print(f"{case.name}: {site}", file=sys.stderr, flush=True)
            sweeps.append(measure_sweep(case, site, device, rounds=given.rounds))
            torch.cuda.empty_cache()
    record.add(given.results, torch.cuda.get_device_name(device), {"sweeps": sweeps})
    write_page(given.results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
