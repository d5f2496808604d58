"""Parts of a page as HTML: tables, lists of facts, embedded JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

from patchsweep.data.show import esc


def table(columns: Iterable[str], rows: Iterable[str], texts: Collection[str] = ()) -> str:
    """Return a table that scrolls sideways where it is too wide.

    `columns` are plain texts; they hold numbers, but for those in `texts`. `rows` are HTML.
    """
    return table_of_bodies(columns, [f"<tbody>{''.join(rows)}</tbody>"], texts)


def table_of_bodies(columns: Iterable[str], bodies: Iterable[str], texts: Collection[str]) -> str:
    """Return a `table` of several <tbody> elements."""
    heads = [
        f'<th scope="col">{esc(name)}</th>'
        if name in texts
        else f'<th scope="col" class="n">{esc(name)}</th>'
        for name in columns
    ]
    top = f"<thead><tr>{''.join(heads)}</tr></thead>"
    return f'<div class="scroll"><table>{top}{"".join(bodies)}</table></div>'


def numbers(*cells: object, kind: str = "") -> str:
    """Return the cells (HTML) of a row in columns of numbers; `kind` is a class of style.css."""
    return "".join(f'<td class="{f"n {kind}".strip()}">{cell}</td>' for cell in cells)


def fact_list(facts: Iterable[tuple[str, str]]) -> str:
    """Return a list of names (plain texts) and what is known of each (HTML)."""
    inner = "".join(f"<div><dt>{esc(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{inner}</dl>'


def embed_json(value: object) -> str:
    """Return `value` as JSON for a <script type="application/json">, which it cannot close."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" could close the element; some parsers treat U+2028 and U+2029 as line ends
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
