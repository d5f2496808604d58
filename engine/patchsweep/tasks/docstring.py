"""Docstring arguments: the model predicts the parameter that is documented next."""

from __future__ import annotations

import random

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Draw, Task, compose, end_of, words

TEMPLATE = '''def {function}(self, {a_def}, {b_def}, {c_def}, {d_def}):
    """{words}

    :param {a_doc}: {a_words}
    :param {b_doc}: {b_words}
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


def prepare(model: TransformerBridge | None) -> Draw:
    """Return a function that draws one pair."""

    def draw(rng: random.Random) -> PromptRecord:
        a, b, c, d, other = rng.sample(ARGUMENTS, 5)
        filler = rng.sample(WORDS, 7)
        fields = {
            "function": rng.choice(FUNCTIONS),
            "words": " ".join(filler[:3]),
            "a_words": " ".join(filler[3:5]),
            "b_words": " ".join(filler[5:]),
            **{"a_def": a, "b_def": b, "d_def": d, "a_doc": a, "b_doc": b},
        }
        clean, spans = compose(TEMPLATE, {**fields, "c_def": c})
        corrupted, _ = compose(TEMPLATE, {**fields, "c_def": other})
        labels = {
            "A_def": spans["a_def"],
            "B_def": spans["b_def"],
            "C_def": spans["c_def"],
            "A_doc": spans["a_doc"],
            "B_doc": spans["b_doc"],
            "end": end_of(clean),
        }
        return PromptRecord(clean, corrupted, f" {c}", f" {other}", labels)

    return draw


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
    labels=("A_def", "B_def", "C_def", "A_doc", "B_doc", "end"),
    prepare=prepare,
)
