"""Parts of a page as HTML: tables, lists of facts, embedded JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from patchsweep.data.show import esc, token_html


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


def word_list(words: Mapping[str, str]) -> str:
    """Return terms and what they mean, both plain texts, as a list."""
    items = "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in words.items())
    return f'<dl class="words">{items}</dl>'


def choice(
    name: str, label: str, options: Sequence[tuple[object, str]], *, always: bool = False
) -> str:
    """Return a selector of (value, plain text).

    It is hidden, but there for scripts, if it has one option and is not to be shown `always`.
    """
    inner = "".join(f'<option value="{esc(v)}">{esc(text)}</option>' for v, text in options)
    hidden = " hidden" if len(options) < 2 and not always else ""
    return f'<label{hidden}>{label} <select id="{name}">{inner}</select></label>'


def marked(tokens: Iterable[str], marks: Iterable[bool]) -> list[str]:
    """Return each token as HTML, those with a mark in <mark>."""
    html = ((token_html(token), mark) for token, mark in zip(tokens, marks, strict=True))
    return [f"<mark>{token}</mark>" if mark else token for token, mark in html]


def embed_json(value: object) -> str:
    """Return `value` as JSON for a <script type="application/json">, which it cannot close."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" could close the element; some parsers treat U+2028 and U+2029 as line ends
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def pack(array: np.ndarray, dtype: str) -> str:
    """Return an array as base64 text for the page's scripts."""
    return base64.b64encode(np.ascontiguousarray(array, dtype=dtype).tobytes()).decode("ascii")
