"""The documentation says what the code is."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from patchsweep.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_modules_lists_every_module() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "modules.py"))["page"]()
    assert made == (ROOT / "docs" / "modules.md").read_text(), "run: python docs/modules.py"


def test_every_verb_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    assert [verb for verb in VERBS if f"| `{verb}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []
