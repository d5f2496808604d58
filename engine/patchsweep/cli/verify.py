"""`patchsweep verify STORE`: its files, and a sample of its values run again."""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from transformers.utils import logging as transformers_logging

from patchsweep.api import prepare_runner
from patchsweep.cli.console import stdout
from patchsweep.config import from_identity, request_of
from patchsweep.identity import request_difference
from patchsweep.planner import SitePlan
from patchsweep.selection import TOLERANCE
from patchsweep.store import Store
from patchsweep.store.check import verify_structure
from patchsweep.store.difference import IDENTITY
from patchsweep.store.layout import Unit
from patchsweep.store.status import EXIT_COMPLETE, EXIT_INCOMPLETE

EXIT_PROBLEMS = 4  # files are damaged, or values differ


@dataclass(frozen=True)
class Cell:
    """One patch of the store."""

    unit: Unit
    patch: int  # index into the site's plan


def main(arguments: list[str]) -> int:
    """Check a store; 0 sound and complete, 3 sound and incomplete, 4 not sound."""
    parser = argparse.ArgumentParser(
        "patchsweep verify",
        description="Check a store: every file is read back, and a random sample of the values "
        "is run again, one forward pass through the model's hooks each.",
        epilog="Exit codes: 0 sound and complete; 2 there is no such store, or its model or task "
        "cannot be loaded; 3 sound so far, not complete; 4 files are damaged or values differ.",
    )
    parser.add_argument("store", help="folder or URL")
    parser.add_argument("-n", type=int, default=24, metavar="N", help="values to run again (24)")
    parser.add_argument("--seed", type=int, default=None, help="of the sample (another each time)")
    options = parser.parse_args(arguments)
    console = stdout()
    store = Store.open(options.store)
    problems = verify_structure(store)
    pending = store.pending()
    n_units = len(store.units())
    console.print(f"files: {len(problems)} problems; {n_units - len(pending)} of {n_units} units")
    if options.n > 0 and not problems:
        problems += recompute(store, options.n, options.seed, console)
    for problem in problems:
        console.print(f"PROBLEM {problem}")
    if problems:
        return EXIT_PROBLEMS
    complete = not pending and not store.missing_fixed()
    console.print("sound and complete" if complete else "sound, not complete")
    return EXIT_COMPLETE if complete else EXIT_INCOMPLETE


def recompute(store: Store, n_cells: int, seed: int | None, console: Console) -> list[str]:
    """Run random cells of the units that are done again; a line for each that differs.

    Raises:
        PatchsweepError: the store holds no config, or what it names cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    provenance = store.attrs["provenance"]
    config = from_identity(provenance["config"])
    request = request_of(config)
    other = request_difference(request, store.attrs)
    if other is not None:
        return [
            f"the values cannot be run again: {other}; give the model, the prompts and the "
            "settings that the store was made with"
        ]
    if IDENTITY not in store.attrs:
        console.print("weights and prompts: not compared, since this old store tells of neither")
    plans = {plan.site.name: plan for plan in request.plans}
    pending = set(store.pending())
    done = [u for u in store.units() if u not in pending and u.variable in plans]
    sample = _sample(plans, done, n_cells, np.random.default_rng(seed))
    if not sample:
        console.print("values: none to run again")
        return []
    runner = prepare_runner(request, "hooked", config.runner.max_tokens).runner
    by_unit: dict[Unit, list[int]] = defaultdict(list)
    for cell in sample:
        by_unit[cell.unit].append(cell.patch)
    dtype = (
        "bfloat16"
        if config.precision == "bf16"
        else provenance.get("compute_dtype", provenance["dtype"])
    )
    tolerance = TOLERANCE.get(dtype, 1e-3)
    problems, worst, n_again = [], 0.0, 0
    screened = "screen" in store.attrs
    for unit, patches in by_unit.items():
        plan = plans[unit.variable]
        kept = _stored(store, plan, unit, patches)
        for batch in request.batches(unit.pairs):
            mine = np.array([p for p in patches if plan.pair[p] in batch.pairs], dtype=np.int64)
            if not len(mine):
                continue
            loaded = runner.load(batch, request.intervention)
            again = runner.run(loaded, plan, mine, request.metrics).numpy()
            for column, patch in enumerate(mine.tolist()):
                if screened and np.isnan(kept[patch]).all():
                    continue  # the screen left this one out
                n_again += 1
                difference = float(np.abs(kept[patch] - again[:, column]).max())
                worst = max(worst, difference)
                if not difference <= tolerance:  # NaN included
                    problems.append(
                        f"{unit.name}: {plan.place_of(patch)} holds {kept[patch].tolist()}, and "
                        f"run again gives {again[:, column].tolist()}"
                    )
    console.print(f"values: {n_again} run again, largest difference {worst:.1e}")
    return problems


def _sample(
    plans: dict[str, SitePlan], units: list[Unit], n_cells: int, rng: np.random.Generator
) -> list[Cell]:
    """Random patches of `units`, each unit as likely as it has patches."""
    inside = [plans[u.variable].patches(u.pairs, u.layers) for u in units]
    ends = np.cumsum([len(patches) for patches in inside])
    if not len(ends) or not ends[-1]:
        return []
    chosen = rng.choice(ends[-1], size=min(n_cells, int(ends[-1])), replace=False)
    cells = []
    for number in np.sort(chosen).tolist():
        which = int(np.searchsorted(ends, number, side="right"))
        offset = number - (int(ends[which - 1]) if which else 0)
        cells.append(Cell(units[which], int(inside[which][offset])))
    return cells


def _stored(store: Store, plan: SitePlan, unit: Unit, patches: list[int]) -> dict[int, np.ndarray]:
    """patch -> values `[metric]`, as the store has them."""
    variable = store.variables[unit.variable]
    block = store.dataset()[unit.variable][variable.slices(unit)].values
    shape = (len(unit.pairs), len(unit.layers), *plan.shape[2:])
    flat = block.reshape(len(block), -1)
    found = {}
    for patch in patches:
        pair, layer, pos, units = np.unravel_index(int(plan.cell[patch]), plan.shape)
        at = (pair - unit.pairs.start, layer - unit.layers.start, pos, units)
        found[patch] = flat[:, np.ravel_multi_index(at, shape)]
    return found
