"""Tokens and numbers as people read them, in text and in HTML."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

_MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}


def esc(text: object) -> str:
    """Return `text` escaped for HTML, inside an element or a quoted attribute."""
    return escape(str(text), quote=True)


def visible(token: str) -> str:
    """Return `token` with white space and unprintable characters made visible; not escaped."""
    return "".join(_MARKS.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in token)


def token_html(token: str) -> str:
    """Return `token` as HTML: visible, escaped, with dimmed marks for white space.

    <bdi> keeps right-to-left text from reordering the text around it.
    """
    marks = set(_MARKS.values())
    inner = "".join(f'<i class="ws">{c}</i>' if c in marks else esc(c) for c in visible(token))
    return f'<bdi class="token">{inner}</bdi>'


def number(x: float, *, sign: bool = False) -> str:
    """Return `x` for people to read: the one text that every page, figure and table shows.

    Three decimals, fewer if large, an exponent if tiny, thin spaces between thousands, no minus
    before a zero, a dash for NaN and infinity: 0.123, 123.4, 23 600, 1.2e-4 with a true minus.
    The scripts of pages say the same: `number` of numbers.js.
    """
    if not math.isfinite(x):
        return "\u2013"
    size = abs(x)
    if 0 < size < 5e-4:
        text = re.sub(r"e([+-])0", r"e\1", f"{x:+.1e}" if sign else f"{x:.1e}")
    else:
        decimals = 0 if size >= 1000 else 1 if size >= 100 else 3
        text = f"{x + 0.0:+,.{decimals}f}" if sign else f"{x + 0.0:,.{decimals}f}"
    return text.replace("-", "\u2212").replace(",", "\u202f")


def rank(n: float) -> str:
    """Return a rank, or a mean of ranks: decimals only where it is no whole number."""
    return count(n) if math.isfinite(n) and n == round(n) else number(n)


def count(n: float) -> str:
    """Return `n` rounded to a whole number, with thin spaces between thousands."""
    return f"{round(n):,}".replace(",", "\u202f")


def plural(n: int, noun: str) -> str:
    """Return text such as "1 pair" or "3 pairs"."""
    return f"{count(n)} {noun}{'' if n == 1 else 's'}"


def percent(fraction: float) -> str:
    """Return a share in per cent; only exact 0 and 1 print as such: "0.3 %", "over 99.9 %"."""
    if 0 < fraction < 0.001:
        return "under 0.1 %"
    if 0.999 < fraction < 1:
        return "over 99.9 %"
    return f"{100 * fraction:.1f} %".replace(".0 %", " %")


def table_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as HTML, with a style of its own; `columns` are texts, cells are HTML."""
    head = "".join(f"<th>{esc(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    return (
        '<table class="patchsweep" style="font-variant-numeric:tabular-nums">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
