"""The pages of the examples: run a script, and write its prose, code, output and pictures.

    python examples/make_pages.py                       # all of them, some minutes
    python examples/make_pages.py activation_patching   # one

A script is made of cells: `# %% [markdown]` begins prose, `# %%` code. Prose is copied; code is
run, all cells in one namespace, and copied with what it prints. A cell that ends in a `Picture`
puts it into docs/images/examples.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (
    "activation_patching",
    "attribution_patching",
    "early_decoding",
    "head_ablation",
    "factual_recall",
)
PAGES = ROOT / "docs" / "examples"
IMAGES = ROOT / "docs" / "images" / "examples"


@dataclass(frozen=True)
class Cell:
    """One part of a script."""

    is_prose: bool
    text: str  # Markdown, or Python
    line: int  # where it begins in the script, from 0


def cells_of(script: str) -> list[Cell]:
    """The cells of a script's text, in order, empty ones left out."""
    found: list[Cell] = []
    lines = script.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("# %%")] + [len(lines)]
    for start, stop in pairwise(starts):
        is_prose = "[markdown]" in lines[start]
        inside = lines[start + 1 : stop]
        if is_prose:
            inside = [line.removeprefix("#").removeprefix(" ") for line in inside]
        text = "\n".join(inside).strip("\n")
        if text:
            found.append(Cell(is_prose, text, start + 1))
    return found


def page_of(name: str) -> str:
    """Run the script called `name`; its page as Markdown. Its pictures are written."""
    path = ROOT / "examples" / f"{name}.py"
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    parts: list[str] = []
    n_pictures = 0
    for cell in cells_of(path.read_text()):
        if cell.is_prose:
            parts.append(cell.text)
            continue
        parts.append(f"```python\n{cell.text}\n```")
        printed, last = run(cell, path, namespace)
        if printed:
            parts.append(f"```text\n{printed}\n```")
        if hasattr(last, "_repr_svg_"):
            n_pictures += 1
            image = IMAGES / f"{name}-{n_pictures}.svg"
            image.write_text(last._repr_svg_())
            parts.append(f"![{last.alt}](../images/examples/{image.name})")
    title, rest = parts[0].split("\n", 1)
    origin = (
        f"*Made by `python examples/make_pages.py {name}` from "
        f"[examples/{name}.py](../../examples/{name}.py).*"
    )
    return "\n\n".join([title, origin, rest.strip("\n"), *parts[1:]]) + "\n"


def run(cell: Cell, path: Path, namespace: dict[str, Any]) -> tuple[str, Any]:
    """(what the cell prints, the value of its last line if that is an expression)."""
    # blank lines in front, so that a traceback names the script's own line
    tree = ast.parse("\n" * cell.line + cell.text, str(path))
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, str(path), "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), str(path), "eval"), namespace)
    return printed.getvalue().strip("\n"), value


def main() -> None:
    """Write the pages that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SCRIPTS)}")
    names = parser.parse_args().names or SCRIPTS
    for name in names:
        if name not in SCRIPTS:
            parser.error(f"there is no example {name!r}; use {', '.join(SCRIPTS)}")
    sys.path.insert(0, str(ROOT / "examples"))
    PAGES.mkdir(parents=True, exist_ok=True)
    IMAGES.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"running {name}", file=sys.stderr)
        (PAGES / f"{name}.md").write_text(page_of(name))


if __name__ == "__main__":
    main()
