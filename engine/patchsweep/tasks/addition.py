"""Two-digit addition after a few worked examples."""

from __future__ import annotations

import random

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.data.records import PromptRecord
from patchsweep.tasks.base import Draw, Task, number_digits, swap

N_SHOTS = 4
LABELS = ("a", "b", "end")


def prepare(model: TransformerBridge) -> Draw:
    """Return a function that draws one pair.

    Sums stay below 100. Where the tokenizer splits numbers into digits, the answer is the
    first digit of the sum.
    """
    # the space before the sum is a separate token unless the tokenizer joins it to the number
    with_space = number_digits(model, before=" ") == 2
    digits = 2 if with_space else number_digits(model)
    question = "{a} + {b} =" if with_space else "{a} + {b} = "

    def summands(rng: random.Random) -> tuple[int, int]:
        total = rng.randint(20, 99)
        first = rng.randint(10, total - 10)
        return first, total - first

    def draw(rng: random.Random) -> PromptRecord:
        shots = [summands(rng) for _ in range(N_SHOTS)]
        examples = "".join(f"{a} + {b} = {a + b}\n" for a, b in shots)
        # b <= 79 leaves first summands whose sum has another first digit
        b = rng.randint(10, 79)
        a = rng.randint(10, 99 - b)
        first = str(a + b)[:digits]
        other = rng.choice([n for n in range(10, 100 - b) if str(n + b)[:digits] != first])
        space = " " if with_space else ""
        answers = f"{space}{first}", f"{space}{str(other + b)[:digits]}"
        fields = {"a": str(a), "b": str(b)}
        return swap(examples + question, fields, {"a": str(other)}, answers, LABELS)

    return draw


ADDITION = Task(
    name="addition",
    description=(
        "The sum of two two-digit numbers after four worked examples; the corrupted prompt has "
        "another first summand"
    ),
    source=(
        "Stolfo, Belinkov & Sachan 2023, A Mechanistic Interpretation of Arithmetic Reasoning in "
        "Language Models using Causal Mediation Analysis, arXiv:2305.15054. The layout of the "
        "examples is ours; where numbers are split into digits, only the tens are asked for"
    ),
    labels=LABELS,
    prepare=prepare,
    needs_model=True,
)
