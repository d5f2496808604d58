"""What a sweep's store has of its values: done, to do, and what is wrong with what is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from patchsweep.store.backends.base import NOT_A_FILE, Folder
from patchsweep.store.contents import Contents
from patchsweep.store.digest import SEAL_BYTES, seal, sealed_size
from patchsweep.store.layout import (
    FIXED,
    PROGRESS,
    REFERENCES,
    Unit,
    Variable,
    fixed_key,
    references_key,
)


@dataclass(frozen=True)
class Survey:
    """All units, and the unpatched metrics of all pairs."""

    pending: tuple[Unit, ...]  # have no flag
    damaged: Mapping[Unit, str]  # have a flag; what is wrong with the file
    pending_pairs: tuple[int, ...]  # whose unpatched metrics have no flag
    damaged_pairs: Mapping[int, str]

    @property
    def to_do(self) -> list[Unit]:
        """Units that have not run, and those that must run again."""
        return [*self.pending, *self.damaged]

    @property
    def pairs_to_do(self) -> list[int]:
        """Likewise, pairs whose unpatched metrics are needed."""
        return sorted((*self.pending_pairs, *self.damaged_pairs))

    @property
    def problems(self) -> list[str]:
        """A line for each damaged file."""
        lines = [f"{unit.name}: {problem}" for unit, problem in self.damaged.items()]
        return lines + list(self.damaged_pairs.values())

    @property
    def complete(self) -> bool:
        return not self.to_do and not self.pairs_to_do


def survey(
    folder: Folder, contents: Contents, variables: Mapping[str, Variable], *, read: bool
) -> Survey:
    """Look at the files of all units and all unpatched metrics; `read`: at every byte too."""
    units = [unit for variable in variables.values() for unit in variable.units()]
    pending, damaged = survey_units(folder, contents, variables, units, read=read)
    pending_pairs, damaged_pairs = survey_pairs(folder, contents, read=read)
    return Survey(tuple(pending), damaged, tuple(pending_pairs), damaged_pairs)


def survey_units(
    folder: Folder,
    contents: Contents,
    variables: Mapping[str, Variable],
    units: Sequence[Unit],
    *,
    read: bool,
) -> tuple[list[Unit], dict[Unit, str]]:
    """Those of `units` without a flag, and those whose file is not what its flag says."""
    names = dict.fromkeys(unit.variable for unit in units)
    files, flags = [], []
    for unit in units:
        variable = variables[unit.variable]
        files.append(variable.shard_key(unit))
        flags.append(variable.flag_key(unit))
    look = _Look(folder, contents.identity, read)
    pending: list[Unit] = []
    damaged: dict[Unit, str] = {}
    for unit, problem in zip(units, look.at(names, names, files, flags), strict=True):
        if problem is None:
            pending.append(unit)
        elif problem:
            damaged[unit] = problem
    return pending, damaged


def survey_pairs(
    folder: Folder, contents: Contents, *, read: bool
) -> tuple[list[int], dict[int, str]]:
    """Pairs whose unpatched metrics have no flag, and those whose files are not what it says."""
    look = _Look(folder, contents.identity, read)
    pairs = range(contents.fixed_shape()[1])
    flags = [references_key(pair) for pair in pairs]
    pending: list[int] = []
    damaged: dict[int, str] = {}
    for i, name in enumerate(FIXED):
        files = [fixed_key(name, pair) for pair in pairs]
        found = look.at([name], [REFERENCES], files, flags, part=i, n_parts=len(FIXED))
        for pair, problem in zip(pairs, found, strict=True):
            if problem is None and i == 0:
                pending.append(pair)
            elif problem:
                damaged.setdefault(pair, problem)
    return pending, damaged


@dataclass(frozen=True)
class _Look:
    folder: Folder
    identity: bytes
    read: bool

    def at(
        self,
        arrays: Iterable[str],
        flag_arrays: Iterable[str],
        files: Sequence[str],
        flags: Sequence[str],
        part: int = 0,
        n_parts: int = 1,
    ) -> Iterator[str | None]:
        """For each of `files` what is wrong with it: nothing (""), or it was not written (None).

        Each flag stands for `n_parts` files, of which `files` holds the `part`-th.
        """
        sizes = self._sizes(arrays)
        flagged = self._sizes(f"{PROGRESS}/{name}" for name in flag_arrays)
        sealed = self.folder.read_many(flag for flag in flags if flag in flagged)
        written = (key for key, flag in zip(files, flags, strict=True) if flag in flagged)
        contents = self.folder.read_many(written if self.read else ())
        for key, flag in zip(files, flags, strict=True):
            if flag not in flagged:
                yield None
                continue
            parts = next(sealed) or b""
            data = next(contents) if self.read else None
            if len(parts) != n_parts * SEAL_BYTES:
                yield f"its flag {flag} is no digest"
                continue
            mine = parts[part * SEAL_BYTES :][:SEAL_BYTES]
            problem = "is lost" if key not in sizes else _of_size(sizes[key], sealed_size(mine))
            if not problem and self.read:
                if data is None:
                    problem = "is lost"
                elif seal(self.identity, key, data) != mine:
                    problem = "is not as it was written"
            yield f"{key} {problem}" if problem else ""

    def _sizes(self, prefixes: Iterable[str]) -> dict[str, int | None]:
        return {k: n for prefix in prefixes for k, n in self.folder.sizes(prefix).items()}


def _of_size(size: int | None, wanted: int) -> str:
    """What the length of a file tells; empty if nothing is wrong."""
    if size == NOT_A_FILE:
        return "is a link or a pipe, and no file"
    if size is None or size == wanted:
        return ""
    return "is empty" if not size else f"has {size} bytes, and had {wanted}"
