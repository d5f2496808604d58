"""The frame of every page: one HTML text that holds its style, scripts and data.

The page of a new kind of result is a module `report/<kind>.py` with `build(ds) -> str`:

    from patchsweep.data.show import esc, token_html
    from patchsweep.report.figure import figure, figure_scripts
    from patchsweep.report.html import fact_list, table
    from patchsweep.report.shell import page, resource, section

    def build(ds: xr.Dataset) -> str:
        curve = {"type": "scatter", "x": ds["layer"].values, "y": ds["answer_prob"].values}
        drawn = figure("curve", [curve], {"yaxis": {"title": {"text": "probability"}}})
        parts = [
            "<header><h1>What the model would say</h1><p>How to read it.</p></header>",
            section("curves", "Layer by layer", drawn),
        ]
        return page("Lens of a model", parts, scripts=figure_scripts())

Plotly figures need no other JavaScript. A page that needs some keeps it in a file of this folder,
passes `scripts=[*figure_scripts(), resource("lens.js")]` and `data=...`, and reads the data with
`JSON.parse(document.getElementById("report-data").textContent)`. The page's policy runs only
those scripts: no inline handlers, no URLs. Escape text from a store with `esc` or
`token_html`, and in plotly's labels with `figure.plain`. Small pictures are SVG or tables in
the sections. Style rules of a kind go to `style.css` or the argument `style`.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from patchsweep.data.show import esc
from patchsweep.report.html import embed_json

_LONG = 100_000  # characters from which a script is packed


def page(
    title: str,
    sections: Sequence[str],
    *,
    data: object | None = None,
    scripts: Sequence[str] = (),
    templates: str = "",
    style: str = "",
    served: bool = False,
) -> str:
    """Return a page as self-contained HTML.

    Args:
        title: plain text; escaped here.
        sections: HTML, in order inside <main>; empty ones are left out.
        data: input of the scripts, as JSON in the element `report-data`.
        scripts: JavaScript texts, run in this order after the rest of the page.
        templates: HTML of <template> elements for the scripts.
        style: CSS rules after the shared style.
        served: the page may talk to the server that it comes from, and show its pages in frames.
    """
    embedded = (
        ""
        if data is None
        else f'<script type="application/json" id="report-data">{embed_json(data)}</script>\n'
    )
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts, served)}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{esc(title)}</title><style>{resource('style.css')}{style}</style></head>\n"
        "<body><main>\n"
        + "\n".join(s for s in sections if s)
        + f"\n</main>{templates}\n{embedded}{_scripts(scripts)}\n</body></html>\n"
    )


def section(name: str, heading: str, html: str) -> str:
    """Return a section with id `name`; `heading` and `html` are HTML. "" if `html` is empty."""
    return f'<section id="{name}"><h2>{heading}</h2>{html}</section>' if html else ""


def resource(name: str, package: str = "patchsweep.report") -> str:
    """Return the text of a file of a package, such as `lens.js`."""
    return resources.files(package).joinpath(name).read_text(encoding="utf-8")


@cache
def get_plotlyjs() -> str:
    """Return plotly.js 4.1.1 with the traces of plots on two axes alone (MIT licence)."""
    packed = resources.files("patchsweep.report").joinpath("plotly-cartesian.min.js.gz")
    return gzip.decompress(packed.read_bytes()).decode("utf-8")


def _scripts(scripts: Sequence[str]) -> str:
    """Return the scripts as HTML; where one is long, all are run by unpack.js, in order."""
    if not any(len(script) > _LONG for script in scripts):
        return "\n".join(f"<script>{script}</script>" for script in scripts)
    parts = [
        f'<script type="text/plain" data-script="gzip">{_packed(script)}</script>'
        if len(script) > _LONG
        else f'<script type="text/plain" data-script="text">{script}</script>'
        for script in scripts
    ]
    return "\n".join([*parts, f"<script>{resource('unpack.js')}</script>"])


@cache
def _packed(script: str) -> str:
    return base64.b64encode(gzip.compress(script.encode("utf-8"), 9, mtime=0)).decode("ascii")


def _policy(scripts: Sequence[str], served: bool) -> str:
    """Return a content security policy that runs only these inline scripts and fetches nothing.

    `served`: its own server is fetched from and framed.
    """
    run = [*scripts, *([resource("unpack.js")] if any(len(s) > _LONG for s in scripts) else [])]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in run
    )
    # plotly adds a style element and draws maps as images with data: URLs
    return (
        f"default-src 'none'; script-src {hashes or chr(39) + 'none' + chr(39)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        + ("; connect-src 'self'; frame-src 'self'" if served else "")
    )
