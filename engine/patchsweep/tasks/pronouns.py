"""Gendered pronouns: the model predicts he or she from a first name."""

from __future__ import annotations

import random

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Task, swap, words

TEMPLATES = (
    "So {name} is a really great {role}, isn't",
    "So {name} was such a good {role}, wasn't",
    "I met {name}, the new {role}, and I have to say that",
    "{name} worked as a {role} until",
    "My friend {name} is a {role}, and",
    "The {role} is called {name}, and everybody knows that",
    "When {name} was young,",
    "{name} is tired because",
)
MALE = words(
    """
    John David James Robert Michael William Richard Thomas Charles George Paul Mark Peter Henry
    Kevin Brian Edward Frank Jack Adam Daniel Stephen Steven Matthew Andrew Joseph Patrick Simon
    Arthur Walter
    """
)
FEMALE = words(
    """
    Mary Anna Emma Sarah Alice Jane Elizabeth Helen Laura Susan Linda Lisa Karen Emily Jennifer
    Jessica Maria Rachel Rose Ruth Kate Lucy Julia Victoria Amy Angela Grace Margaret Michelle
    Claire
    """
)
ROLES = words(
    """
    friend cook teacher singer leader student writer neighbor player doctor driver
    dancer swimmer lawyer scientist
    """
)


LABELS = ("name", "end")


def draw(rng: random.Random) -> PromptRecord:
    """Return one pair."""
    template, role = rng.choice(TEMPLATES), rng.choice(ROLES)
    people = [(rng.choice(MALE), " he"), (rng.choice(FEMALE), " she")]
    rng.shuffle(people)
    names, answers = zip(*people, strict=True)
    fields = {"name": names[0], "role": role}
    return swap(template, fields, {"name": names[1]}, answers, LABELS)


PRONOUNS = Task(
    name="pronouns",
    description="A pronoun for a person known by first name; the corrupted name is of the other "
    "gender",
    source=(
        "Mathwin & Corlouer 2023, Identifying a Preliminary Circuit for Predicting Gendered "
        "Pronouns in GPT-2 Small (a hackathon report; the tag-question templates follow it), and "
        "Vig, Gehrmann, Belinkov, Qian, Nevo, Sakenis, Huang, Singer & Shieber 2020, Causal "
        "Mediation Analysis for Interpreting Neural NLP: The Case of Gender Bias, arXiv:2004.12265"
    ),
    labels=LABELS,
    prepare=lambda model: draw,
)
