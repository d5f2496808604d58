"""`patchsweep verify STORE`: checks every file's digest and runs a sample of values again."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import xarray as xr
from rich.console import Console
from transformers.utils import logging as transformers_logging

from patchsweep.cli import parsers
from patchsweep.cli.again import run_again, said_by
from patchsweep.cli.console import stdout
from patchsweep.cli.parsers import N_CELLS
from patchsweep.data.show import number
from patchsweep.errors import ConfigError, printable
from patchsweep.results.tolerance import allowed_error
from patchsweep.runners.select import TOLERANCE
from patchsweep.spec.plan import SitePlan
from patchsweep.store.attributes import attributes
from patchsweep.store.layout import Unit
from patchsweep.store.status import EXIT_COMPLETE, EXIT_INCOMPLETE
from patchsweep.store.store import Store
from patchsweep.store.survey import Survey
from patchsweep.store.verify import check_store
from patchsweep.sweeps.api import prepare_runner
from patchsweep.sweeps.means import check_means

EXIT_PROBLEMS = 4  # files are damaged, or values differ


def main(arguments: list[str]) -> int:
    """Check a store; return 0 (sound and complete), 3 (sound, incomplete) or 4 (not sound)."""
    options = parsers.verify(arguments)
    console = stdout()
    checked = check_store(options.store)
    if checked.kind is not None and options.words:
        raise ConfigError(
            f"{options.words[0]}: values of `patchsweep {checked.kind}` are not run again, only "
            "those of a sweep; leave it out"
        )
    problems = checked.problems + check_means(options.store)
    done = ""
    if checked.survey is not None and checked.store is not None:
        n_units = len(checked.store.units())
        done = f"; {n_units - len(checked.survey.to_do)} of {n_units} units"
    elif checked.kind is not None:
        done = f"; results of `patchsweep {checked.kind}`"
    console.print(f"files: {len(problems)} problems{done}")
    n_cells = N_CELLS if options.n is None else options.n
    if checked.store is not None and checked.survey is not None and not problems:
        if options.words and n_cells > 0:
            problems += recompute(
                checked.store, checked.survey, options.words, n_cells, options.seed, console
            )
        else:
            console.print(
                f"values: not run again; for that name model=... task=...{said_by(checked.store)}"
            )
    for problem in problems:
        console.print(f"PROBLEM {printable(problem)}")
    if problems:
        return EXIT_PROBLEMS
    complete = checked.survey is None or checked.survey.complete
    console.print("sound and complete" if complete else "sound, not complete")
    return EXIT_COMPLETE if complete else EXIT_INCOMPLETE


def recompute(
    store: Store,
    survey: Survey,
    words: list[str],
    n_cells: int,
    seed: int | None,
    console: Console,
) -> list[str]:
    """Run random cells of finished units again and return a line for each that differs.

    The cells run on the model and the task of `words`, through the hooked runner.

    Raises:
        PatchsweepError: `words` name another model, task or metric than the store was made with,
            or one that cannot be loaded.
    """
    transformers_logging.disable_progress_bar()
    request, config = run_again(store, words, "verify")
    plans = {plan.site.name: plan for plan in request.plans}
    to_do = set(survey.to_do)
    done = [u for u in store.units() if u not in to_do and u.variable in plans]
    sample = _sample(plans, done, n_cells, np.random.default_rng(seed))
    if not sample:
        console.print("values: none to run again")
        return []
    runner = prepare_runner(request, "hooked", config.runner.max_tokens).runner
    provenance = store.attrs["provenance"]
    is_bf16 = provenance["config"]["precision"] == "bf16"
    dtype = provenance.get("compute_dtype", provenance["dtype"])
    tolerance = TOLERANCE.get("bfloat16" if is_bf16 else str(dtype), 1e-3)
    problems, differences = [], []
    ds = store.dataset()
    screened = "screen" in attributes(ds)
    allowed = tolerance + allowed_error(ds)  # [metric, pair]
    for unit, patches in sample.items():
        plan = plans[unit.variable]
        stored = _stored(store, ds, plan, unit, patches)
        for batch in request.batches(unit.pairs):
            selected = np.array([p for p in patches if plan.pair[p] in batch.pairs], dtype=np.int64)
            if not len(selected):
                continue
            loaded = runner.load(batch, request.intervention)
            rerun = runner.run(loaded, plan, selected, request.metrics).numpy()
            for column, patch in enumerate(selected.tolist()):
                if screened and np.isnan(stored[patch]).all():
                    continue  # the screen did not select this patch
                difference = np.abs(stored[patch] - rerun[:, column])
                differences.append(float(difference.max()))
                if not (difference <= allowed[:, plan.pair[patch]]).all():  # NaN included
                    problems.append(
                        f"{unit.name}: {plan.place_of(patch)} holds {stored[patch].tolist()}, and "
                        f"run again gives {rerun[:, column].tolist()}"
                    )
    worst = np.max(differences, initial=0.0)  # np.max propagates NaN
    console.print(f"values: {len(differences)} run again, largest difference {number(worst)}")
    return problems


def _sample(
    plans: dict[str, SitePlan], units: list[Unit], n_cells: int, rng: np.random.Generator
) -> dict[Unit, list[int]]:
    """Return random patches by unit (indices into the site's plan), uniform over all patches."""
    unit_patches = [plans[u.variable].patches(u.pairs, u.layers) for u in units]
    ends = np.cumsum([len(patches) for patches in unit_patches])
    if not len(ends) or not ends[-1]:
        return {}
    drawn = rng.choice(ends[-1], size=min(n_cells, int(ends[-1])), replace=False)
    sample: dict[Unit, list[int]] = defaultdict(list)
    for place in np.sort(drawn).tolist():
        unit = int(np.searchsorted(ends, place, side="right"))
        offset = place - (int(ends[unit - 1]) if unit else 0)
        sample[units[unit]].append(int(unit_patches[unit][offset]))
    return sample


def _stored(
    store: Store, ds: xr.Dataset, plan: SitePlan, unit: Unit, patches: list[int]
) -> dict[int, np.ndarray]:
    """Return the stored values: patch -> `[metric]`."""
    variable = store.variables[unit.variable]
    block = ds[unit.variable][variable.slices(unit)].values
    shape = (len(unit.pairs), len(unit.layers), *plan.shape[2:])
    flat = block.reshape(len(block), -1)
    values = {}
    for patch in patches:
        pair, layer, pos, units = np.unravel_index(int(plan.cell[patch]), plan.shape)
        at = (pair - unit.pairs.start, layer - unit.layers.start, pos, units)
        values[patch] = flat[:, np.ravel_multi_index(at, shape)]
    return values
