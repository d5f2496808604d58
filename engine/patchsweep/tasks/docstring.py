"""Docstring arguments: the model predicts the parameter that is documented next."""

from __future__ import annotations

import random

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Task, swap, words

TEMPLATE = '''def {function}(self, {A_def}, {B_def}, {C_def}, {D_def}):
    """{words}

    :param {A_doc}: {A_words}
    :param {B_doc}: {B_words}
    :param'''
FUNCTIONS = words(
    """
    port create update build check convert open merge render collect handle parse prepare
    process register send
    """
)
ARGUMENTS = words(
    """
    load size files last date table line item user group task event test client server order code
    page node path state model value key image text color level option parent child source target
    field limit index count label title message filter offset length version result project shape
    """
)
WORDS = words(
    """
    oil column piece crime population unit dark river garden animal summer window music paper
    winter market bridge village story island sugar engine metal forest weather mountain kitchen
    coffee silver doctor history farmer dinner painting morning
    """
)


LABELS = ("A_def", "B_def", "C_def", "A_doc", "B_doc", "end")


def draw(rng: random.Random) -> PromptRecord:
    """Return one pair."""
    a, b, c, d, other = rng.sample(ARGUMENTS, 5)
    filler = rng.sample(WORDS, 7)
    fields = {
        "function": rng.choice(FUNCTIONS),
        "words": " ".join(filler[:3]),
        "A_words": " ".join(filler[3:5]),
        "B_words": " ".join(filler[5:]),
        **{"A_def": a, "B_def": b, "C_def": c, "D_def": d, "A_doc": a, "B_doc": b},
    }
    return swap(TEMPLATE, fields, {"C_def": other}, (f" {c}", f" {other}"), LABELS)


DOCSTRING = Task(
    name="docstring",
    description=(
        "A docstring that has documented two arguments of a function goes on to the third; the "
        "corrupted prompt has another third argument"
    ),
    source=(
        "Heimersheim & Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only "
        "transformer, https://www.alignmentforum.org/posts/u6KXXmKFbXfWzoAXn"
    ),
    labels=LABELS,
    prepare=lambda model: draw,
)
