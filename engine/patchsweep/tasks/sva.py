"""Subject-verb agreement across a relative clause."""

from __future__ import annotations

import random

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Task, swap, words

# clauses that do not show the subject's number
CLAUSES = (
    "that the {attractor} liked",
    "that the {attractor} followed",
    "that the {attractor} helped",
    "that the {attractor} saw",
    "that the {attractor} knew",
    "that visited the {attractor}",
    "that helped the {attractor}",
    "that met the {attractor}",
    "who called the {attractor}",
    "who loved the {attractor}",
)
SUBJECTS = words(
    """
    farmer author pilot teacher doctor lawyer manager officer student actor singer player
    dancer friend worker soldier artist writer driver scientist
    """
)
ATTRACTORS = words(
    """
    parent guard chef customer minister senator architect consultant neighbor judge king
    guest visitor child nurse director
    """
)
# they end the clause clearly: without them the model continues inside the clause
TIMES = ("last year", "last week", "last night", "yesterday", "in the morning")
VERBS = ((" is", " are"), (" was", " were"), (" has", " have"))
LABELS = ("subject", "attractor", "end")
_PLURALS = {"child": "children"}


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, f"{noun}s")


def draw(rng: random.Random) -> PromptRecord:
    """Return one pair."""
    template = f"The {{subject}} {rng.choice(CLAUSES)} {rng.choice(TIMES)}"
    subject, attractor = rng.choice(SUBJECTS), rng.choice(ATTRACTORS)
    if rng.random() < 0.5:
        attractor = _plural(attractor)
    singular, plural = rng.choice(VERBS)
    forms = [(subject, singular), (_plural(subject), plural)]
    rng.shuffle(forms)
    nouns, answers = zip(*forms, strict=True)
    fields = {"subject": nouns[0], "attractor": attractor}
    return swap(template, fields, {"subject": nouns[1]}, answers, LABELS)


SVA = Task(
    name="sva",
    description=(
        "The verb after a relative clause agrees with the subject before it, not with the noun "
        "inside it; the corrupted prompt has the subject in the other number"
    ),
    source=(
        "Marvin & Linzen 2018, Targeted Syntactic Evaluation of Language Models, "
        "arXiv:1808.09031. Its kinds of clause with our own words; the verbs of the clauses are "
        "in the past tense, which does not show number, and the answers are auxiliaries"
    ),
    labels=LABELS,
    prepare=lambda model: draw,
)
