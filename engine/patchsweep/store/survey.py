"""Survey of a sweep's store: which values are done, pending or damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from patchsweep.store.backends.base import NOT_A_FILE
from patchsweep.store.contents import Contents
from patchsweep.store.digest import SEAL_BYTES, seal, sealed_size
from patchsweep.store.layout import FIXED, Unit, fixed_key, references_key


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


def survey(contents: Contents, *, read: bool) -> Survey:
    """Check existence and length of all files of values; `read`: their digests too."""
    units = [unit for variable in contents.variables.values() for unit in variable.units()]
    pending, damaged = survey_units(contents, units, read=read)
    pending_pairs, damaged_pairs = survey_pairs(contents, read=read)
    return Survey(tuple(pending), damaged, tuple(pending_pairs), damaged_pairs)


def survey_units(
    contents: Contents, units: Sequence[Unit], *, read: bool
) -> tuple[list[Unit], dict[Unit, str]]:
    """Return those of `units` without a flag, and shard -> problem where file and flag differ."""
    keys = []
    for unit in units:
        variable = contents.variables[unit.variable]
        keys.append((variable.shard_key(unit), variable.flag_key(unit)))
    pending: list[Unit] = []
    damaged: dict[Unit, str] = {}
    for unit, problem in zip(units, _problems(contents, keys, read), strict=True):
        if problem is None:
            pending.append(unit)
        elif problem:
            damaged[unit] = problem
    return pending, damaged


def survey_pairs(contents: Contents, *, read: bool) -> tuple[list[int], dict[int, str]]:
    """Return pairs without a flag, and pair -> problem where a file and its flag differ."""
    pairs = range(contents.fixed_shape()[1])
    pending: list[int] = []
    damaged: dict[int, str] = {}
    for i, name in enumerate(FIXED):
        keys = [(fixed_key(name, pair), references_key(pair)) for pair in pairs]
        problems = _problems(contents, keys, read, i, len(FIXED))
        for pair, problem in zip(pairs, problems, strict=True):
            if problem is None and i == 0:
                pending.append(pair)
            elif problem:
                damaged.setdefault(pair, problem)
    return pending, damaged


def _problems(
    contents: Contents, keys: Sequence[tuple[str, str]], read: bool, part: int = 0, n_parts: int = 1
) -> Iterator[str | None]:
    """Yield the problem of each file: "" if there is none, None if it has no flag.

    `keys`: of the file and of its flag, whose `part` of `n_parts` seals is of this file.
    """
    folder = contents.folder
    arrays = dict.fromkeys(name.rpartition("/")[0] for of_file in keys for name in of_file)
    sizes = {key: n for array in arrays for key, n in folder.sizes(array).items()}
    sealed = folder.read_many(flag for _, flag in keys if flag in sizes)
    values = folder.read_many(key for key, flag in keys if read and flag in sizes)
    for key, flag in keys:
        if flag not in sizes:
            yield None
            continue
        parts = next(sealed) or b""
        data = next(values) if read else None
        if len(parts) != n_parts * SEAL_BYTES:
            yield f"its flag {flag} is no digest"
            continue
        seal_ = parts[part * SEAL_BYTES :][:SEAL_BYTES]
        problem = "is lost" if key not in sizes else _of_size(sizes[key], sealed_size(seal_))
        if not problem and read:
            if data is None:
                problem = "is lost"
            elif seal(contents.identity, key, data) != seal_:
                problem = "is not as it was written"
        yield f"{key} {problem}" if problem else ""


def _of_size(size: int | None, wanted: int) -> str:
    """Return the problem that a file's length shows; empty if there is none."""
    if size == NOT_A_FILE:
        return "is a link or a pipe, and no file"
    if size is None or size == wanted:
        return ""
    return "is empty" if not size else f"has {size} bytes, and had {wanted}"
