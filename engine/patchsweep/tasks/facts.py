"""Factual recall: the two prompts of a pair share a relation and differ in the subject."""

from __future__ import annotations

import random
from dataclasses import dataclass

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Draw, Task, one_of, swap


@dataclass(frozen=True)
class Relation:
    """A kind of fact, such as the capital of a country."""

    templates: tuple[str, ...]  # with the field {subject}; the answer follows the text
    facts: tuple[tuple[str, str], ...]  # (subject, answer)


def _pairs(lines: str) -> tuple[tuple[str, str], ...]:
    """Parse "subject: answer" entries between semicolons into (subject, answer) tuples."""
    entries = [entry.split(":") for entry in lines.split(";") if entry.strip()]
    return tuple((subject.strip(), answer.strip()) for subject, answer in entries)


RELATIONS = {
    "capital": Relation(
        (
            "The capital of {subject} is",
            "{subject}'s capital city is called",
            "Q: What is the capital of {subject}?\nA: The capital is",
            "We flew to {subject} and stayed in its capital,",
        ),
        _pairs(
            "France: Paris; Germany: Berlin; Spain: Madrid; Italy: Rome; Japan: Tokyo; "
            "China: Beijing; Russia: Moscow; England: London; Austria: Vienna; Greece: Athens; "
            "Ireland: Dublin; Portugal: Lisbon; Poland: Warsaw; Hungary: Budapest; "
            "Egypt: Cairo; Cuba: Havana; Peru: Lima; Norway: Oslo; Sweden: Stockholm; "
            "Finland: Helsinki; Denmark: Copenhagen; Belgium: Brussels; Turkey: Ankara; "
            "Iran: Tehran; Iraq: Baghdad; Syria: Damascus; Lebanon: Beirut; Kenya: Nairobi; "
            "Thailand: Bangkok; Vietnam: Hanoi; Indonesia: Jakarta; Canada: Ottawa; "
            "Argentina: Buenos; Chile: Santiago; Nepal: Kathmandu; "
            "Afghanistan: Kabul; Libya: Tripoli"
        ),
    ),
    "landmark": Relation(
        (
            "The {subject} is in the city of",
            "Tourists who want to see the {subject} travel to the city of",
            "Q: In which city is the {subject}?\nA: It is in",
        ),
        _pairs(
            "Eiffel Tower: Paris; Louvre Museum: Paris; Colosseum: Rome; Trevi Fountain: Rome; "
            "Brandenburg Gate: Berlin; Tower Bridge: London; Buckingham Palace: London; "
            "British Museum: London; Empire State Building: New; Golden Gate Bridge: San; "
            "Red Square: Moscow; Kremlin: Moscow; Forbidden City: Beijing; Parthenon: Athens; "
            "Acropolis: Athens; Prado Museum: Madrid; White House: Washington; "
            "Lincoln Memorial: Washington; Space Needle: Seattle; Willis Tower: Chicago; "
            "Liberty Bell: Philadelphia; Hollywood Sign: Los; Sydney Opera House: Sydney; "
            "Hermitage Museum: Saint; Hagia Sophia: Istanbul; Blue Mosque: Istanbul; "
            "Sistine Chapel: Rome; Western Wall: Jerusalem; Statue of Liberty: New"
        ),
    ),
    "company": Relation(
        (
            "The {subject} is a product made by the company",
            "The {subject} was developed by",
            "Q: Which company makes the {subject}?\nA: It is made by",
        ),
        _pairs(
            "iPhone: Apple; iPad: Apple; MacBook: Apple; Windows operating system: Microsoft; "
            "Xbox: Microsoft; Excel spreadsheet: Microsoft; PlayStation: Sony; Walkman: Sony; "
            "Android operating system: Google; Chrome browser: Google; Galaxy phone: Samsung; "
            "Kindle: Amazon; Photoshop editor: Adobe; Mustang: Ford; Corolla: Toyota; "
            "Prius: Toyota; Civic: Honda; Accord: Honda; Game Boy: Nintendo; "
            "Wii: Nintendo; Pentium processor: Intel; Model T: Ford"
        ),
    ),
    "language": Relation(
        (
            "People in {subject} speak",
            "The official language of {subject} is",
            "Q: Which language do people in {subject} speak?\nA: They speak",
        ),
        _pairs(
            "France: French; Germany: German; Spain: Spanish; Italy: Italian; Japan: Japanese; "
            "China: Chinese; Russia: Russian; England: English; Greece: Greek; "
            "Portugal: Portuguese; Poland: Polish; Hungary: Hungarian; Egypt: Arabic; "
            "Cuba: Spanish; Sweden: Swedish; Finland: Finnish; Denmark: Danish; "
            "Turkey: Turkish; Iran: Persian; Iraq: Arabic; Vietnam: Vietnamese; "
            "Brazil: Portuguese; Mexico: Spanish; Argentina: Spanish; Australia: English; "
            "Korea: Korean; Israel: Hebrew; Norway: Norwegian; Austria: German"
        ),
    ),
    "continent": Relation(
        (
            "{subject} is a country on the continent of",
            "Q: On which continent is {subject}?\nA: It is in",
        ),
        _pairs(
            "Kenya: Africa; Nigeria: Africa; Ghana: Africa; Ethiopia: Africa; Uganda: Africa; "
            "Tanzania: Africa; France: Europe; Germany: Europe; Poland: Europe; Austria: Europe; "
            "Belgium: Europe; Sweden: Europe; China: Asia; India: Asia; Japan: Asia; "
            "Thailand: Asia; Vietnam: Asia; Mongolia: Asia"
        ),
    ),
}


LABELS = ("subject", "end")


def prepare(model: TransformerBridge | None, relation: str = "all") -> Draw:
    """Return a function that draws one pair of `relation`: a key of `RELATIONS`, or "all"."""
    one_of("facts", "relation", relation, ("all", *RELATIONS))
    relations = list(RELATIONS.values()) if relation == "all" else [RELATIONS[relation]]

    def draw(rng: random.Random) -> PromptRecord:
        kind = rng.choice(relations)
        template = rng.choice(kind.templates)
        subject, answer = rng.choice(kind.facts)
        other, wrong_answer = rng.choice([fact for fact in kind.facts if fact[1] != answer])
        answers = f" {answer}", f" {wrong_answer}"
        return swap(template, {"subject": subject}, {"subject": other}, answers, LABELS)

    return draw


FACTS = Task(
    name="facts",
    description=(
        "A fact about a subject; the corrupted prompt asks the same of a subject of as many "
        "tokens with another answer"
    ),
    source=(
        "Meng, Bau, Andonian & Belinkov 2022, Locating and Editing Factual Associations in GPT, "
        "arXiv:2202.05262. The facts are our own list, and the corrupted prompt names another "
        "subject where that work adds noise to the embeddings"
    ),
    labels=LABELS,
    prepare=prepare,
)
