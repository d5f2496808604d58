"""Survey of a sweep's store: which values are done, pending or damaged."""

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
    """Pending and damaged shards and unpatched metrics."""

    pending: tuple[Unit, ...]  # shards without a flag
    damaged: Mapping[Unit, str]  # flagged shard -> problem of its file
    pending_pairs: tuple[int, ...]  # pairs whose unpatched metrics have no flag
    damaged_pairs: Mapping[int, str]  # pair -> problem of a file of its unpatched metrics

    @property
    def to_do(self) -> list[Unit]:
        """Shards that have not run, and damaged shards, which must run again."""
        return [*self.pending, *self.damaged]

    @property
    def pairs_to_do(self) -> list[int]:
        """Pairs whose unpatched metrics are pending or damaged."""
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
    """Check existence and length of all files of values; `read`: their digests too."""
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
    """Return those of `units` without a flag, and shard -> problem where file and flag differ."""
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
    """Return pairs without a flag, and pair -> problem where a file and its flag differ."""
    look = _Look(folder, contents.identity, read)
    pairs = range(contents.fixed_shape()[1])
    flags = [references_key(pair) for pair in pairs]
    pending: list[int] = []
    damaged: dict[int, str] = {}
    for i, name in enumerate(FIXED):
        files = [fixed_key(name, pair) for pair in pairs]
        problems = look.at([name], [REFERENCES], files, flags, part=i, n_parts=len(FIXED))
        for pair, problem in zip(pairs, problems, strict=True):
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
        """Yield the problem of each of `files`: "" if there is none, None if it has no flag.

        Each flag holds the seals of `n_parts` files, of which `files` has the `part`-th.
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
            seal_ = parts[part * SEAL_BYTES :][:SEAL_BYTES]
            problem = "is lost" if key not in sizes else _of_size(sizes[key], sealed_size(seal_))
            if not problem and self.read:
                if data is None:
                    problem = "is lost"
                elif seal(self.identity, key, data) != seal_:
                    problem = "is not as it was written"
            yield f"{key} {problem}" if problem else ""

    def _sizes(self, prefixes: Iterable[str]) -> dict[str, int | None]:
        return {k: n for prefix in prefixes for k, n in self.folder.sizes(prefix).items()}


def _of_size(size: int | None, wanted: int) -> str:
    """Return the problem that a file's length shows; empty if there is none."""
    if size == NOT_A_FILE:
        return "is a link or a pipe, and no file"
    if size is None or size == wanted:
        return ""
    return "is empty" if not size else f"has {size} bytes, and had {wanted}"
