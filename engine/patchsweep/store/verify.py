"""Checks of a store on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patchsweep.errors import DamagedError
from patchsweep.store.backends.address import open_folder
from patchsweep.store.backends.base import PARTIAL
from patchsweep.store.contents import DELETE, MEND, Contents, read_contents
from patchsweep.store.layout import FIXED, fixed_key, references_key
from patchsweep.store.store import Store
from patchsweep.store.survey import Survey


@dataclass(frozen=True)
class Checked:
    """Result of reading each file of a store and checking its digest."""

    problems: list[str]  # a line per problem
    kind: str | None  # the analysis that wrote the store; None for a sweep
    store: Store | None  # the store of a sweep, if it can be opened
    survey: Survey | None  # pending and damaged shards of `store`


def check_store(url: str | Path, *, storage_options: Mapping[str, Any] | None = None) -> Checked:
    """Read and check each file of the store of a sweep or an analysis.

    Raises:
        StoreError: there is no store, or one of another program.
    """
    try:
        contents = read_contents(open_folder(url, storage_options))
    except DamagedError as error:
        return Checked([str(error)], None, None, None)
    problems = [f"{problem}; {MEND}" for problem in contents.problems]
    if not contents.is_sweep:
        problems = [f"{problem}; {DELETE}" for problem in contents.problems]
        return Checked(problems + _strays(contents, set()), contents.kind, None, None)
    if problems:
        return Checked(problems, None, None, None)
    store = Store(contents)
    survey = store.survey(read=True)
    return Checked(problems_of(store, survey), None, store, survey)


def problems_of(store: Store, survey: Survey) -> list[str]:
    """Return a line for each problem that `survey` or a finished shard's values show."""
    problems = [f"{problem}; {MEND}" for problem in survey.problems]
    possible = {references_key(pair) for pair in range(store.n_pairs)}
    possible |= {fixed_key(name, pair) for name in FIXED for pair in range(store.n_pairs)}
    to_do = set(survey.to_do)
    for variable in store.variables.values():
        form = store.contents.form(variable.name)
        units = variable.units()
        possible |= {key(unit) for unit in units for key in (variable.shard_key, variable.flag_key)}
        done = [unit for unit in units if unit not in to_do]
        files = store.folder.read_many(variable.shard_key(unit) for unit in done)
        for unit, data in zip(done, files, strict=True):
            try:
                if data is not None and np.isnan(form.decode(data)).all():
                    problems.append(f"{unit.name}: holds nothing but NaN")
            except ValueError as error:
                problems.append(f"{unit.name}: holds no values ({error}); do not trust it")
    return problems + _strays(store.contents, possible)


def _strays(contents: Contents, possible: set[str]) -> list[str]:
    """Return a line for each file that does not belong to the store."""
    problems = []
    named = {problem.partition(":")[0] for problem in contents.problems}
    for key in sorted(contents.folder.sizes().keys() - contents.files.keys() - possible - named):
        if key.endswith(PARTIAL):
            problems.append(
                f"{key}: left by a killed process; running the command again removes it"
            )
        else:
            problems.append(f"{key}: is no file of this store; delete it")
    return problems
