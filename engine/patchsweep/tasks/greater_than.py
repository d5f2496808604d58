"""Greater-than: the end of a year range must come after its start."""

from __future__ import annotations

import random

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Draw, Task, number_digits, swap, words

TEMPLATE = "The {noun} lasted from the year {century}{start} to the year {prefix}"
LABELS = ("noun", "start", "prefix", "end")
NOUNS = words(
    """
    war campaign conflict siege reign rebellion revolution dynasty empire expedition famine
    drought plague dispute rivalry alliance truce treaty blockade occupation crusade voyage
    mission project construction trial strike boycott feud journey partnership marriage
    friendship tradition festival epidemic career dictatorship monarchy regime
    """
)


def prepare(model: TransformerBridge) -> Draw:
    """Return a function that draws one pair.

    One prompt starts early in its century, the other late. The answer to each is a later year
    nearby, and the answer to the early start comes before the late start. Where the tokenizer
    splits years into digits, the answer is the decade.
    """
    digits = number_digits(model)

    def draw(rng: random.Random) -> PromptRecord:
        noun, century = rng.choice(NOUNS), rng.randint(11, 17)
        early, late = rng.randint(2, 39), rng.randint(60, 88)
        # at least ten years later, so that the digit of the decade decides
        early_end, late_end = early + rng.randint(10, 14), late + 10
        if digits == 1:
            ends = {early: str(early_end // 10), late: str(late_end // 10)}
        else:
            ends = {early: f"{early_end:02}", late: f"{late_end:02}"}
        start, other = (early, late) if rng.random() < 0.5 else (late, early)
        years = {"century": str(century), "start": f"{start:02}", "prefix": str(century)}
        swapped, answers = {"start": f"{other:02}"}, (ends[start], ends[other])
        return swap(TEMPLATE, {"noun": noun, **years}, swapped, answers, LABELS)

    return draw


GREATER_THAN = Task(
    name="greater_than",
    description=(
        "A range of years whose end must come after its start; one prompt starts late in its "
        "century, the other early, and the early one's answer would come too soon for the late one"
    ),
    source=(
        "Hanna, Liu & Variengien 2023, How does GPT-2 compute greater-than?: Interpreting "
        "mathematical abilities in a pre-trained language model, arXiv:2305.00586. That work "
        "compares the summed probability of later and earlier years against a start in year 01; "
        "a pair here compares two years, or two decades where years are split into digits"
    ),
    labels=LABELS,
    prepare=prepare,
    needs_model=True,
)
