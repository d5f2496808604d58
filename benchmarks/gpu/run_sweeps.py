"""Measure whole sweeps on this machine's GPU beside the TransformerLens loop (`make bench-gpu`).

Same model object, same prompts. A sample of the loop's patches is timed and scaled up: all of
them would take hours. Some patches of both are held against the same model in a wider type; a
sweep that is further off than the loop is an error, not a fast one. The same sweep is timed with a
tolerance and by attribution, and nnsight beside it where it is installed. Entries are written one
by one, failures too, and those that a file of this commit has are not measured again.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import patchsweep as ps
import record
import torch
import transformer_lens.patching as tl_patching
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
# other ways to the same sweep
WAYS: dict[str, dict[str, Any]] = {
    "tolerance": {"tolerance": "1%", "compute_dtype": "float32"},
    "attribution": {"method": "atp"},
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

    # the loop computes in the model's own dtype, so the sweep does
    def sweep(**settings: Any) -> NDArray[np.float32]:
        ds = ps.sweep(model, pairs, site, **{"compute_dtype": "model"} | settings)
        found: NDArray[np.float32] = next(iter(ds.data_vars.values())).values[0, 0]
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
    ways = {name: _way(partial(sweep, **settings), device) for name, settings in WAYS.items()}
    ways["nnsight"] = _way(partial(_nnsight, loop, site, sample, len(every)), device)
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
        "ways": ways,
    }


def _way(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Return the seconds of another way's second run, or why it gives none.

    What `run` returns is the factor by which its time is scaled up, if it is a float.
    """
    try:
        run()
        scale: list[Any] = []
        seconds = _seconds(lambda: scale.append(run()), device)
        factor = scale[0] if isinstance(scale[0], float) else 1.0
    except Exception as error:  # it may refuse a model or not be installed
        return {"refuses": f"{type(error).__name__}: {error}"[:300]}
    return {"seconds": seconds * factor}


def _nnsight(loop: Loop, site: str, sample: pd.DataFrame, n_patches: int) -> float:
    """Run a layer's positions by nnsight, one invoke each; return how many times that is the sweep.

    Raises:
        ImportError: nnsight is not installed.
        NotImplementedError: the site has no case here.
    """
    import nnsight

    if site != "resid_pre":
        raise NotImplementedError("only resid_pre is measured beside nnsight")
    model = nnsight.LanguageModel(loop.model.original_model, tokenizer=loop.model.tokenizer)
    inner = loop.model.original_model
    blocks = "transformer.h" if hasattr(inner, "transformer") else "model.layers"
    block = model
    for name in (*blocks.split("."), 0):
        block = block[name] if isinstance(name, int) else getattr(block, name)
    length = loop.clean.shape[1]
    with torch.no_grad():
        with model.trace(loop.clean):
            source = block.input.save()
        with model.trace() as tracer:
            logits = list().save()  # noqa: C408  # a call, so that nnsight can keep it
            for pos in range(length):
                with tracer.invoke(loop.corrupted):
                    block.input[:, pos] = source[:, pos]
                    logits.append(model.lm_head.output[:, -1])
    assert len(logits) == length
    return n_patches / length


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
    parser.add_argument("--minutes", type=float, default=5.0, help="no case is begun after them")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print(record.NO_GPU, file=sys.stderr)
        return 2
    device = torch.device("cuda")
    kept = record.Record(given.results, torch.cuda.get_device_name(device))
    until = time.monotonic() + 60 * given.minutes
    measure_all(CASES, device, kept, until, rounds=given.rounds)
    return 0


def measure_all(
    cases: Sequence[SweepCase],
    device: torch.device,
    kept: record.Record,
    until: float,
    *,
    trial: bool = False,
    rounds: int = 5,
) -> None:
    """Put an entry into `kept` for each case and site that it lacks, until that time."""
    for case in cases:
        for site in SETTERS:
            key = {
                "name": case.name,
                "site": site,
                "dtype": str(case.dtype).removeprefix("torch."),
            }
            if kept.has("sweeps", **key):
                continue
            if time.monotonic() > until:
                print("time is up; the same command goes on", file=sys.stderr)
                return
            print(f"{case.name}: {site}", file=sys.stderr, flush=True)
            try:
                entry = measure_sweep(case, site, device, trial=trial, rounds=rounds)
            except Exception as error:
                entry = record.failure(error)
            kept.add("sweeps", entry, **key)
            gc.collect()  # bridges and their modules are cycles
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    raise SystemExit(main())
