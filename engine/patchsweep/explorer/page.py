"""The explorer's page: a form of two prompts, the maps, the pages of a cell, and what to copy."""

from __future__ import annotations

from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.show import esc
from patchsweep.explorer.question import (
    CHOICES,
    CHOSEN,
    DIRECTIONS,
    INTERVENTIONS,
    TOLERANCES,
)
from patchsweep.report.html import choice
from patchsweep.report.page import colours
from patchsweep.report.shell import get_plotlyjs, page, resource, section
from patchsweep.results.accessor import SITE_WORDS
from patchsweep.spec.metrics import METRICS
from patchsweep.tasks.ioi import DEMO_PAIR


def build(model: TransformerBridge, name: str) -> str:
    """Return the page; `name` is what people call the model."""
    short = f'<span class="name">{esc(name.rstrip("/").rpartition("/")[2])}</span>'
    sections = [
        f"<header><h1>Which parts of {short} carry the answer?</h1>"
        '<p class="lead">Type two prompts of as many tokens that differ in the words on which the '
        "answer depends. Each cell of a map is one run of the model in which one activation comes "
        "from the other prompt.</p></header>",
        _form(model),
        '<section id="maps" hidden><h2>What each patch does</h2>'
        f'<div id="prompts"></div><p>{colours(True)} Point at a cell for its numbers, click it for '
        'its lens, attention and edges.</p><div class="grid" id="grid"></div></section>',
        _cell(),
        section("again", "The same elsewhere", _again()).replace("<section", "<section hidden", 1),
    ]
    return page(
        f"patchsweep: {name}",
        sections,
        data={"tolerances": TOLERANCES, "words": {s: SITE_WORDS.get(s, s) for s in CHOICES}},
        scripts=[
            get_plotlyjs(),
            resource("numbers.js") + resource("maps.js"),
            resource("explorer.js", "patchsweep.explorer"),
        ],
        style=resource("explorer.css", "patchsweep.explorer"),
        served=True,
    )


def failure(message: str) -> str:
    """Return a page that says why there is no other."""
    return page("patchsweep", [f'<p class="notice warn" role="alert">{esc(message)}</p>'])


def _form(model: TransformerBridge) -> str:
    sides = [
        _side("clean", "Clean prompt", "answer", str(DEMO_PAIR.clean), DEMO_PAIR.answer),
        _side(
            "corrupted",
            "Corrupted prompt",
            "wrong_answer",
            str(DEMO_PAIR.corrupted),
            DEMO_PAIR.wrong_answer,
        ),
    ]
    sites = "".join(
        f'<label title="{esc(SITE_WORDS.get(site, site))}"><input type="checkbox" value="{site}"'
        f"{' checked' if site in CHOSEN else ''}> <code>{site}</code></label>"
        for site in CHOICES
    )
    tolerance: Any = len(TOLERANCES) - 1
    chat = (
        '<label class="tick"><input type="checkbox" id="chat"> prompts are chat messages</label>'
        if getattr(model.tokenizer, "chat_template", None)
        else ""
    )
    return (
        f'<section id="question" aria-label="The question"><div class="sides">{"".join(sides)}'
        '</div><div id="said" role="status"></div>'
        f'<fieldset id="sites"><legend>Sites</legend>{sites}</fieldset>'
        '<div class="settings">'
        f"{choice('metric', 'Metric', [(name, name) for name in METRICS])}"
        f"{choice('direction', 'Direction', [(name, name) for name in DIRECTIONS])}"
        f"{choice('intervention', 'Patch values', [(name, name) for name in INTERVENTIONS])}"
        f'<label>Tolerance <input type="range" id="tolerance" min="0" max="{tolerance}" step="1" '
        'value="0"> <output id="tolerated" for="tolerance">exact</output></label>'
        f'{chat}<button type="button" id="run" class="main">Sweep</button>'
        '</div><div class="state"><progress id="bar" max="1" value="0" hidden></progress>'
        '<span id="state"></span></div></section>'
    )


def _side(name: str, title: str, answer: str, prompt: str, then: str) -> str:
    return (
        f'<div class="side"><label for="{name}">{title}</label>'
        f'<textarea id="{name}" rows="3" spellcheck="false">{esc(prompt)}</textarea>'
        f'<label for="{answer}">its answer</label>'
        f'<input id="{answer}" type="text" spellcheck="false" autocomplete="off" '
        f'value="{esc(then)}"></div>'
    )


def _cell() -> str:
    tabs = "".join(
        f'<button type="button" role="tab" data-kind="{kind}">{kind.capitalize()}</button>'
        for kind in ("lens", "attention", "edges")
    )
    return (
        '<section id="cell" hidden><h2 id="named"></h2>'
        f'<div class="tabs" role="tablist">{tabs}<a id="apart" target="_blank" rel="noopener">in a '
        'tab of its own</a></div><p id="waits" role="status"></p>'
        '<iframe id="shown" title="The page of the cell"></iframe></section>'
    )


def _again() -> str:
    parts = "".join(
        f'<div class="copy"><h3>{title}<button type="button" data-copy="{name}">Copy</button></h3>'
        f'<pre id="{name}"></pre></div>'
        for name, title in (("command", "On the command line"), ("python", "In Python"))
    )
    return (
        f'{parts}<p><a id="report" target="_blank" rel="noopener">The report of these maps</a>, '
        "one page that opens offline: save it from the browser.</p>"
    )
