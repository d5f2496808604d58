"""Indirect object identification, and the fixed pair of the demonstration."""

from __future__ import annotations

import random

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Draw, Task, after, compose, end_of, one_of, words

_SOURCE = (
    "Wang, Variengien, Conmy, Shlegeris & Steinhardt 2022, Interpretability in the Wild: a "
    "Circuit for Indirect Object Identification in GPT-2 small, arXiv:2211.00593"
)
_LABELS = ("IO", "S1", "S1+1", "S2", "end")

# {first} and {second} are the names in order of mention; {subject} repeats one of them
TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {subject} gave a {object} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {subject} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. {subject} decided to give a "
    "{object} to",
    "Then, {first} and {second} were thinking about going to the {place}. {subject} wanted to "
    "give a {object} to",
    "Then, {first} and {second} had a long argument, and afterwards {subject} gave a {object} to",
    "When {first} and {second} got a {object} at the {place}, {subject} decided to give it to",
    "After {first} and {second} went to the {place}, {subject} gave a {object} to",
    "While {first} and {second} were working at the {place}, {subject} gave a {object} to",
    "Once {first} and {second} arrived at the {place}, {subject} handed the {object} to",
    "When {first} and {second} went to the {place}, {subject} gave the {object} to",
    "Yesterday {first} and {second} met at the {place}, and {subject} gave a {object} to",
    "Friends {first} and {second} found a {object} at the {place}. {subject} gave it to",
    "Before {first} and {second} left the {place}, {subject} offered a {object} to",
    "This morning {first} and {second} walked to the {place}. {subject} passed the {object} to",
    "The day that {first} and {second} visited the {place}, {subject} showed a {object} to",
    "As {first} and {second} were leaving the {place}, {subject} sold a {object} to",
    "Last week {first} and {second} came back from the {place}, and {subject} brought a {object} "
    "to",
    "Because {first} and {second} were hungry at the {place}, {subject} handed a {object} to",
)
NAMES = words(
    """
    Aaron Adam Alan Alex Alice Amy Andrew Angela Anna Anthony Arthur Ben Bob Brian Carl Carol
    Charles Charlie Chris Christina Claire Clark Crystal Daniel David Edward Elizabeth Emily Emma
    Eric Eva Frank Fred Gary George Grace Graham Harry Helen Henry Howard Jack Jacob James Jane
    Jason Jeff Jennifer Jeremy Jessica Jim Joe John Joseph Josh Julia Justin Karen Kate Kelly
    Kevin Kim Laura Lee Leon Lily Linda Lisa Lucy Luke Marcus Maria Mark Martin Mary Matt Matthew
    Max Michael Michelle Mike Neil Nick Oliver Patrick Paul Peter Rachel Richard Robert Roger Rose
    Ruth Ryan Sam Samuel Sara Sarah Scott Simon Stephen Steven Sue Susan Thomas Tim Tom Tony
    Victoria Walter William
    """
)
PLACES = words(
    """
    store garden restaurant school hospital office house station park library shops beach
    market museum church farm
    """
)
OBJECTS = words(
    """
    ring drink ball book flower bag snack letter coin basket gift ticket map cake hat
    picture toy key
    """
)


def prepare(
    model: TransformerBridge | None, order: str = "mixed", corruption: str = "swap_subject"
) -> Draw:
    """Return a function that draws one pair.

    `order`: "abba" names the indirect object first, "baba" the subject, "mixed" either.
    `corruption`: "swap_subject" repeats the other name; "swap_names" exchanges the two names
    everywhere, so that each role keeps its positions.
    """
    one_of("ioi", "order", order, ("mixed", "abba", "baba"))
    one_of("ioi", "corruption", corruption, ("swap_subject", "swap_names"))

    def draw(rng: random.Random) -> PromptRecord:
        template = rng.choice(TEMPLATES)
        io, s = rng.sample(NAMES, 2)
        fillers = {"place": rng.choice(PLACES), "object": rng.choice(OBJECTS)}
        abba = rng.random() < 0.5 if order == "mixed" else order == "abba"
        first, second = (io, s) if abba else (s, io)
        clean, spans = compose(
            template, {"first": first, "second": second, "subject": s, **fillers}
        )
        if corruption == "swap_names":
            first, second = second, first
        corrupted, _ = compose(
            template, {"first": first, "second": second, "subject": io, **fillers}
        )
        s1 = spans["second" if abba else "first"]
        labels = {
            "IO": spans["first" if abba else "second"],
            "S1": s1,
            "S1+1": after(clean, s1),
            "S2": spans["subject"],
            "end": end_of(clean),
        }
        return PromptRecord(clean, corrupted, f" {io}", f" {s}", labels)

    return draw


def _demo_pair() -> PromptRecord:
    template = "When {S1} and {IO} went to the shops, {S2} gave a bottle of milk to"
    clean, spans = compose(template, {"S1": "John", "IO": "Mary", "S2": "John"})
    corrupted, _ = compose(template, {"S1": "John", "IO": "Mary", "S2": "Mary"})
    labels = {**spans, "S1+1": after(clean, spans["S1"]), "end": end_of(clean)}
    return PromptRecord(clean, corrupted, " Mary", " John", labels)


DEMO_PAIR = _demo_pair()

IOI = Task(
    name="ioi",
    description=(
        "Two people are named, one acts; to whom? The corrupted prompt repeats the other name, "
        "so that its right answer is the other one"
    ),
    source=f"{_SOURCE}. Some templates are close to those of its appendix E, the others are ours",
    labels=_LABELS,
    prepare=prepare,
)
IOI_DEMO = Task(
    name="ioi_demo",
    description="One fixed pair of indirect object identification, in BABA order",
    source=_SOURCE,
    labels=_LABELS,
    prepare=lambda model: lambda rng: DEMO_PAIR,
    n_pairs=1,
)
