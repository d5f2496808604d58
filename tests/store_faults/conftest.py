"""Collects what each fault did to a store; PATCHSWEEP_FAULT_TABLE=file.md writes the tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_rows: list[tuple[str, str]] = []
_damage: list[tuple[str, ...]] = []
HEAD = """# Faults

What was done to a store on purpose, and what happened. The tests in `tests/store_faults` do it and
write this page: `PATCHSWEEP_FAULT_TABLE=docs/faults.md pytest tests/store_faults`.

## While a run writes

| fault | what happened |
|---|---|
"""
DAMAGE = """
## Afterwards

One file of a finished store is damaged. `status` looks at names and lengths, `verify` at every
byte. *The same run* is the command that wrote the store. `verify` calls nothing sound that is not,
and no verb ends in a traceback.

| file | damage | `status` | `verify` | the same run | `report` |
|---|---|---|---|---|---|
"""


@pytest.fixture
def observed() -> Callable[[str, str], None]:
    """Call it at the end of a test with (fault, what happened); a failed test leaves no row."""

    def add(fault: str, outcome: str) -> None:
        _rows.append((fault, outcome))

    return add


@pytest.fixture
def damaged_row() -> Callable[..., None]:
    """Likewise, with a file, its damage, and what each verb said."""

    def add(*cells: str) -> None:
        _damage.append(cells)

    return add


@pytest.fixture(scope="session", autouse=True)
def _fault_table() -> Iterator[None]:
    yield
    if target := os.environ.get("PATCHSWEEP_FAULT_TABLE"):
        Path(target).write_text(HEAD + _table(sorted(set(_rows))) + DAMAGE + _table(_damage))


def _table(rows: list[tuple[str, ...]]) -> str:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)
