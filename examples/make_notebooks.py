"""The examples as notebooks: the same cells, without output.

python examples/make_notebooks.py    # writes examples/notebooks
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_pages import ROOT, SCRIPTS, cells_of  # beside this file

FOLDER = ROOT / "examples" / "notebooks"
# a notebook's kernel begins in its own folder, and plots.py lies one up
FIRST = 'import sys\n\nsys.path.insert(0, "..")'


def notebook_of(name: str) -> str:
    """The script called `name` as a notebook, in the JSON of nbformat 4.5."""
    title, *cells = cells_of((ROOT / "examples" / f"{name}.py").read_text())
    parts = [(title.is_prose, title.text), (False, FIRST)]
    parts += [(cell.is_prose, cell.text) for cell in cells]
    made: list[dict[str, Any]] = []
    for number, (is_prose, text) in enumerate(parts):
        cell: dict[str, Any] = {
            "cell_type": "markdown" if is_prose else "code",
            "id": f"cell-{number}",
            "metadata": {},
            "source": text.splitlines(keepends=True),
        }
        if not is_prose:
            cell |= {"execution_count": None, "outputs": []}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook = {
        "cells": made,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each in SCRIPTS:
        (FOLDER / f"{each}.ipynb").write_text(notebook_of(each), encoding="utf-8")
