"""Induction: a random sequence, repeated."""

from __future__ import annotations

import random
import re

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.arguments import whole_number
from patchsweep.data.records import CharSpan, PromptRecord
from patchsweep.data.tokenize import token_strings
from patchsweep.errors import PromptError
from patchsweep.tasks.base import Draw, Task, end_of

_WORD = re.compile(r" [a-z]{3,8}")
_N_WORDS = 2000  # first words of the vocabulary: byte-pair tokenizers learn common words first


def prepare(model: TransformerBridge, length: int = 12) -> Draw:
    """Return a function that draws one pair: `length` random words, whose beginning repeats.

    Each word is one token of the vocabulary: a space and 3 to 8 lower-case letters.

    Raises:
        PromptError: `length` is below 3, or the vocabulary has fewer than 4 `length` words.
    """
    whole_number("task 'induction': length", length, least=3, error=PromptError)
    vocabulary = token_strings(model, tuple(range(len(model.tokenizer))))
    words = [text for text in vocabulary if _WORD.fullmatch(text)][:_N_WORDS]
    if len(words) < 4 * length:
        raise PromptError(
            f"task 'induction' needs {4 * length} words of one token for length={length}, this "
            f"tokenizer has {len(words)}; use a smaller length or another model"
        )

    def draw(rng: random.Random) -> PromptRecord:
        *sequence, other = rng.sample(words, length + 1)
        # the prompt ends with the repetition of word `last`, and the answer is the word after it;
        # late enough that the model has seen the repetition
        last = rng.randrange(length // 2, length - 1)
        clean = sequence + sequence[: last + 1]
        corrupted = list(clean)
        corrupted[last + 1] = other
        starts = [0]
        for word in clean:
            starts.append(starts[-1] + len(word))
        text = "".join(clean)
        labels = {
            "previous": CharSpan(starts[last] + 1, starts[last + 1]),
            "copied": CharSpan(starts[last + 1] + 1, starts[last + 2]),
            "end": end_of(text),
        }
        return PromptRecord(text, "".join(corrupted), sequence[last + 1], other, labels)

    return draw


INDUCTION = Task(
    name="induction",
    description=(
        "Random words of one token, begun again from the start; what followed the last word the "
        "first time? The corrupted prompt has another word there"
    ),
    source=(
        "Olsson, Elhage, Nanda, Joseph, DasSarma, Henighan, Mann et al. 2022, In-context Learning "
        "and Induction Heads, arXiv:2209.11895. That work repeats random tokens; here they are "
        "common words, which survive being written as text"
    ),
    labels=("previous", "copied", "end"),
    prepare=prepare,
    needs_model=True,
)
