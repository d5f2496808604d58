"""Induction: a random sequence, repeated."""

from __future__ import annotations

import random
import re

from transformer_lens.model_bridge import TransformerBridge

from patchsweep.errors import PromptError
from patchsweep.records import CharSpan, PromptRecord
from patchsweep.tasks.base import Draw, Task, end_of
from patchsweep.tokens import token_ids, token_strings

_WORD = re.compile(r" [a-z]{3,8}")


def prepare(model: TransformerBridge, length: int = 12) -> Draw:
    """How to draw one pair of `length` random words, the beginning of which comes again.

    Words are tokens of the vocabulary that are a space and lower-case letters.

    Raises:
        PromptError: `length` is below 2, or the vocabulary has fewer than 4 `length` words.
    """
    if length < 2:
        raise PromptError(f"task 'induction' needs length >= 2, got {length}; use 12 or so")
    n_vocab = len(model.tokenizer)
    words = [word for word in token_strings(model, tuple(range(n_vocab))) if _WORD.fullmatch(word)]
    if len(words) < 4 * length:
        raise PromptError(
            f"task 'induction' needs {4 * length} words of one token for length={length}, this "
            f"tokenizer has {len(words)}; use a smaller length or another model"
        )

    def draw(rng: random.Random) -> PromptRecord:
        *sequence, other = rng.sample(words, length + 1)
        again = rng.randrange(length - 1)  # the word that comes again last; its successor is asked
        clean = sequence + sequence[: again + 1]
        corrupted = list(clean)
        corrupted[again + 1] = other
        starts = [0]
        for word in clean:
            starts.append(starts[-1] + len(word))
        text = "".join(clean)
        labels = {
            "previous": CharSpan(starts[again] + 1, starts[again + 1]),
            "copied": CharSpan(starts[again + 1] + 1, starts[again + 2]),
            "end": end_of(text),
        }
        return PromptRecord(text, "".join(corrupted), sequence[again + 1], other, labels)

    return draw


INDUCTION = Task(
    name="induction",
    description=(
        "Random words of one token, begun again from the start; what followed the last word the "
        "first time? The corrupted prompt has another word there"
    ),
    source=(
        "Olsson, Elhage, Nanda, Joseph, DasSarma, Henighan, Mann et al. 2022, In-context Learning "
        "and Induction Heads, arXiv:2209.11895. Sequences are of whole words, so that they "
        "survive being written as text"
    ),
    labels=("previous", "copied", "end"),
    prepare=prepare,
    needs_model=True,
)
