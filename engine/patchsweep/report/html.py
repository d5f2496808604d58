"""Text for a page: embedded JSON, and the HTML of tokens and numbers from `data.show`."""

from __future__ import annotations

import json

from patchsweep.data.show import count, esc, number, percent, plural, rank, token_html, visible

__all__ = [
    "count",
    "embed_json",
    "esc",
    "number",
    "percent",
    "plural",
    "rank",
    "token_html",
    "visible",
]


def embed_json(value: object) -> str:
    """Return `value` as JSON for a <script type="application/json">, which it cannot close."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" could close the element; some parsers treat U+2028 and U+2029 as line ends
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
