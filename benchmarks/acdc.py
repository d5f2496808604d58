"""What ACDC costs an edge tried: GPT-2 small's shape with random weights, pruned to the end.

    PYTHONPATH=. python benchmarks/acdc.py [THRESHOLD]

Prints a row of docs/circuits.md. Random weights hold no circuit: the threshold says how many edges
stay, and with it how many runs are made.
"""

from __future__ import annotations

import sys
import time

import torch
from patchsweep.analyses.circuits import acdc

from benchmarks.gpu.sweep_cases import CASES, make_model, make_pairs

THRESHOLD = 3e-4


def main() -> None:
    threshold = float(sys.argv[1]) if len(sys.argv) > 1 else THRESHOLD
    model = make_model(CASES[0], torch.device("cpu"), trial=False)
    pairs = make_pairs(model.cfg.d_vocab, CASES[0].n_pos)
    start, used = time.perf_counter(), time.process_time()
    ds = acdc(model, pairs, "logit_diff", thresholds=[threshold])
    seconds, used = time.perf_counter() - start, time.process_time() - used
    tried, dead, runs, left = (
        int(ds[name].item()) for name in ("n_candidates", "n_dead", "n_runs", "n_edges")
    )
    print(
        f"threshold {threshold:g}: {tried:,} edges tried, {dead:,} of them dead, {runs:,} runs, "
        f"{left:,} left; {seconds:.0f} s ({used:.0f} s of processor time); "
        f"{1e3 * seconds / tried:.2f} ms an edge tried, {1e3 * seconds / max(1, runs):.2f} ms a run"
    )


if __name__ == "__main__":
    main()
