"""Collects what each fault did to a store; PATCHSWEEP_FAULT_TABLE=file.md writes the table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

_rows: list[tuple[str, str]] = []


@pytest.fixture
def observed() -> Callable[[str, str], None]:
    """Call it at the end of a test with (fault, what happened); a failed test leaves no row."""

    def add(fault: str, outcome: str) -> None:
        _rows.append((fault, outcome))

    return add


@pytest.fixture(scope="session", autouse=True)
def _fault_table() -> Iterator[None]:
    yield
    if target := os.environ.get("PATCHSWEEP_FAULT_TABLE"):
        lines = ["| fault | what happened |", "|---|---|"]
        lines += [f"| {fault} | {outcome} |" for fault, outcome in sorted(set(_rows))]
        Path(target).write_text("\n".join(lines) + "\n")
