"""Two-digit addition after a few worked examples."""

from __future__ import annotations

import random

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.records import CharSpan, PromptRecord
from patchsweep.tasks.base import Draw, Task, compose, end_of, number_digits

N_SHOTS = 4


def prepare(model: TransformerBridge) -> Draw:
    """How to draw one pair.

    Sums stay below 100. Where the tokenizer splits numbers into digits, the answer is the
    first digit of the sum.
    """
    digits = number_digits(model)

    def summands(rng: random.Random) -> tuple[int, int]:
        total = rng.randint(20, 99)
        first = rng.randint(10, total - 10)
        return first, total - first

    def draw(rng: random.Random) -> PromptRecord:
        shots = [summands(rng) for _ in range(N_SHOTS)]
        examples = "".join(f"{a}+{b}={a + b}\n" for a, b in shots)
        a, b = summands(rng)
        answer = str(a + b)[:digits]
        others = [n for n in range(10, 100 - b) if str(n + b)[:digits] != answer]
        other = rng.choice(others)
        clean, spans = compose("{a}+{b}=", {"a": str(a), "b": str(b)})
        corrupted, _ = compose("{a}+{b}=", {"a": str(other), "b": str(b)})
        shift = len(examples)
        labels = {name: CharSpan(s.start + shift, s.stop + shift) for name, s in spans.items()}
        labels["end"] = end_of(examples + clean)
        return PromptRecord(
            examples + clean, examples + corrupted, answer, str(other + b)[:digits], labels
        )

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
    labels=("a", "b", "end"),
    prepare=prepare,
    needs_model=True,
)
