"""Writes modules.md, a table of all modules, from the first line of each module's docstring.

python docs/modules.py
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "modules.md"
PACKAGES = ("engine/patchsweep", "kernels/patchsweep_kernels")


def tables() -> str:
    """A table for each folder of modules, the library's own first."""
    folders = [
        folder
        for package in PACKAGES
        for folder in [ROOT / package, *sorted((ROOT / package).rglob("*/"))]
        if any(folder.glob("*.py"))
    ]
    return "\n".join(_table(folder) for folder in folders)


def _table(folder: Path) -> str:
    rows = [
        f"| `{path.stem}` | {_first_line(path)} |"
        for path in sorted(folder.glob("*.py"))
        if not path.stem.startswith("__")
    ]
    about = _first_line(folder / "__init__.py")
    head = [f"### {folder.relative_to(ROOT)}", "", about, ""]
    return "\n".join([*head, *(["| module | |", "|---|---|", *rows, ""] if rows else [])])


def _first_line(path: Path) -> str:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n\n")[0].replace("\n", " ").replace("|", r"\|")


def page() -> str:
    """modules.md as it should be."""
    return (
        "# Modules\n\nEvery module in one line, made by `python docs/modules.py` from docstrings; "
        "[structure.md](structure.md) is the\nmap.\n\n" + tables()
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
