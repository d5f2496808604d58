"""`python -m tools.architectures [FILE]`: try every architecture, write the table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tools.architectures.configs import causal_architectures, left_out
from tools.architectures.page import page
from tools.architectures.plain import compare
from tools.architectures.table import compatibility_table, families_table


def main(arguments: list[str]) -> None:
    """Write the page to the file named, by default `docs/families.md`. Takes five minutes."""
    parser = argparse.ArgumentParser(
        "python -m tools.architectures", description="Try every architecture, write the table."
    )
    parser.add_argument("file", nargs="?", default="docs/families.md", help="(docs/families.md)")
    path = Path(parser.parse_args(arguments).file)
    plain = [compare(architecture) for architecture in causal_architectures()]
    text = page(families_table(), plain, compatibility_table(), left_out())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    sys.stdout.write(f"wrote {path}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
